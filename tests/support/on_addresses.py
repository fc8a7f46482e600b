"""A real engine over addresses, for pretended GPUs."""

from __future__ import annotations

from pathlib import Path

from edje.engines.contract import Batch, Engine
from edje.engines.manifest import Profile
from edje.perf import gpu_contest as contest
from edje.perf.gpu_engines import manifest_of
from pretended_gpu import array_at


class OnAddresses(Engine):
    """The lean scorer over memory that a stand-in calls the GPU's."""

    on_device = True

    def __init__(self, bundle: Path, profile: Profile):
        super().__init__(manifest_of(bundle, "stand-in", "0", "fp32", profile))
        self._score = contest.torch_scorer(bundle, "cpu")

    def _enqueue(self, batch, scores, stream):
        names = ("text_ids", "text_length", "query_of_pair", "visual_tokens")
        arrays = [getattr(batch, name) for name in names]
        views = [array_at(a.address, a.shape, a.dtype) for a in arrays]
        array_at(scores.address, scores.shape, scores.dtype)[:] = self._score(Batch(*views))

    def close(self):
        pass
