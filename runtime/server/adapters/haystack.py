"""`EdjeRanker` for Haystack: a component that ranks documents by their images.

In process: Haystack's own Cohere, Jina and vLLM rankers already speak to `edje serve`. A document
names its image in `meta`; without, its id is the image's. Documents whose image the store lacks or
could not read are left out.
"""

from __future__ import annotations

from dataclasses import replace
from math import exp
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from ...reranker import Reranker


@component
class EdjeRanker:
    """Ranks documents; opens engine and store in `warm_up`, so a pipeline with it can be saved."""

    def __init__(self, engine: str, store: str, top_k: int = 10, meta_field: str | None = None):
        """`engine`, `store`: folders; `meta_field`: of `meta`, holds the image's id; None: `id`."""
        self.engine, self.store, self.top_k = engine, store, top_k
        self.meta_field = meta_field
        self._reranker: Reranker | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a saved pipeline holds."""
        given = {name: getattr(self, name) for name in ("engine", "store", "top_k", "meta_field")}
        made: dict[str, Any] = default_to_dict(self, **given)
        return made

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EdjeRanker:
        """Make it again, from a saved pipeline."""
        made: EdjeRanker = default_from_dict(cls, data)
        return made

    def warm_up(self) -> None:
        """Open engine and store."""
        if self._reranker is None:
            self._reranker = Reranker.open(self.engine, store=self.store)

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, documents: list[Document], top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Return the best documents, each with the sigmoid of its logit as `score`."""
        if not documents:
            return {"documents": []}
        self.warm_up()
        assert self._reranker is not None
        field = self.meta_field
        ids = [each.id if field is None else str(each.meta.get(field, "")) for each in documents]
        result = self._reranker.rank(query, ids, top_k=top_k or self.top_k, missing="skip")
        scored = ((documents[hit.index], _sigmoid(hit.score)) for hit in result.hits)
        return {"documents": [replace(document, score=score) for document, score in scored]}


def _sigmoid(logit: float) -> float:
    """Never overflows: exp is only taken of what is not positive."""
    return 1.0 / (1.0 + exp(-logit)) if logit >= 0 else exp(logit) / (1.0 + exp(logit))
