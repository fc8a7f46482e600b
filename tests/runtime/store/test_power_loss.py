"""The power fails at any moment: what was acknowledged is there, whatever was not synced."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edje.runtime.store import TokenStore
from power_loss import PowerLoss
from store_history import MEMORY, Operation, Sizes, Witness, random_operation

NUM_OPERATIONS = 9
SHARES = (0.0, 0.5, 0.5, 0.9, 1.0)


@dataclass
class Trial:
    """One store under a recorder that loses power again and again."""

    path: Path
    sizes: Sizes
    pick: random.Random
    syncs: tuple[str, ...] = ("sync", "sync_folder")
    witness: Witness = field(init=False)
    left: Witness | None = None
    begun: Operation | None = None
    num_losses: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizes.create(self.path).close()
        self.witness = Witness(self.path)

    def run(self, patch: pytest.MonkeyPatch, every: float) -> None:
        """Write a random history; after a share of all changes on disk see what a loss leaves.

        Three times: what the last loss left is the store that the next history begins with.
        """
        for _ in range(3):
            with patch.context() as inner:
                self._run_once(inner, every)
            if self.faults or self.left is None:
                return
            shutil.rmtree(self.path)
            self.left.path.rename(self.path)
            self.witness, self.left = Witness(self.path, self.left.model), None

    def _run_once(self, patch: pytest.MonkeyPatch, every: float) -> None:
        recorder = PowerLoss(self.path, syncs=self.syncs)
        recorder.install(patch)
        recorder.on_event = lambda: self._lose_power(recorder, every)
        with TokenStore.open(self.path, mode="a") as store:
            for _ in range(NUM_OPERATIONS):
                self.begun = random_operation(self.pick, self.witness.model)
                self.begun.apply(store)
                self.witness.model = self.begun.after(self.witness.model)
                self.begun = None
        assert recorder.blind_spots() == []

    def _lose_power(self, recorder: PowerLoss, every: float) -> None:
        if self.faults or self.pick.random() > every:
            return
        if self.left:
            shutil.rmtree(self.left.path)
        left = self.path.with_name(f"left-{self.num_losses}")
        recorder.build(left, self.pick, self.pick.choice(SHARES))
        self.num_losses += 1
        self.left = Witness(left, dict(self.witness.model))
        self.faults += self.left.check(self.begun)
        if not self.faults:
            self.faults += self._write_on(self.left)

    def _write_on(self, witness: Witness) -> list[str]:
        """Open for writing what was left, go on, and look again."""
        operation = random_operation(random.Random(self.num_losses), witness.model)
        with TokenStore.open(witness.path, mode="a") as store:
            operation.apply(store)
        witness.model = operation.after(witness.model)
        return witness.check(None)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:  # the disk is a simulated one
        yield Path(name)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_acknowledged_survives_any_power_loss(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, seed: int
) -> None:
    trial = Trial(folder / "s", Sizes(dtype=dtype), random.Random(seed))
    trial.run(monkeypatch, every=0.4)
    assert trial.faults == []
    assert trial.num_losses >= 50


@pytest.mark.parametrize("honest", ["sync", "sync_folder"])
def test_a_disk_that_lies_is_found_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, honest: str
) -> None:
    """The control: with one kind of sync ignored these trials do find losses."""
    trial = Trial(folder / "s", Sizes(), random.Random(5), syncs=(honest,))
    trial.run(monkeypatch, every=0.5)
    assert any("lost" in fault or "damaged" in fault for fault in trial.faults)
