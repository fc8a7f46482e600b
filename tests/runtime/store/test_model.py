"""Random histories of a store against a dict, with readers that keep what they opened."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edje.errors import StoreError
from edje.runtime.store import TokenStore
from edje.tokens import quantize_tokens
from store_history import (
    MEMORY,
    Operation,
    Sizes,
    differences,
    expected_bytes,
    joined,
    served_bytes,
    tokens_of,
    write_segment,
)

# One record a page, several pages, not a whole page; int8: one, two and very many records a group.
SHAPES = {"float16": [(64, 32), (3, 1000), (2, 3)], "int8": [(1024, 1), (700, 9), (64, 64), (2, 3)]}
SEGMENT_BYTES = [1, 4096 * 4, 4096 * 9, 1 << 20]
TRICKY = ["a", "A", "\u00e9", "e\u0301", "\U0001f600", " ", "\n", '"', "\\", "\u2028", "x" * 4096]
IDS = st.sampled_from(TRICKY) | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20
)
MAX_READERS = 3
MAX_EXAMPLES = 60


class StoreMachine(RuleBasedStateMachine):
    """The writer's calls as rules; after each, the store must hold what the dict holds."""

    compared: ClassVar[Counter[int]] = Counter()  # how often stores of how many images

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.model: dict[str, int] = {}
        self.readers: list[tuple[TokenStore, dict[str, int]]] = []
        self.next_version = 0
        self.sealed: list[tuple[Path, Operation]] = []

    @initialize(data=st.data(), dtype=st.sampled_from(["float16", "int8"]))
    def create(self, data: st.DataObject, dtype: str) -> None:
        num_tokens, hidden = data.draw(st.sampled_from(SHAPES[dtype]))
        sizes = Sizes(num_tokens, hidden, dtype, data.draw(st.sampled_from(SEGMENT_BYTES)))
        self.store = sizes.create(self.folder / "s")
        self.layout = self.store.layout

    def records(self, ids: list[str]) -> tuple[tuple[str, int], ...]:
        """Give each id a version of its own."""
        first, self.next_version = self.next_version, self.next_version + len(ids)
        return tuple(zip(ids, range(first, self.next_version), strict=True))

    def apply(self, operation: Operation) -> None:
        operation.apply(self.store)
        self.model = operation.after(self.model)

    def some(self, data: st.DataObject) -> list[str]:
        """Draw ids that are present."""
        present = st.sampled_from(sorted(self.model))
        return data.draw(st.lists(present, min_size=1, max_size=8, unique=True))

    @rule(ids=st.lists(IDS, max_size=9, unique=True))
    def append(self, ids: list[str]) -> None:
        new = [image_id for image_id in ids if image_id not in self.model]
        self.apply(Operation("append", self.records(new)))

    @precondition(lambda self: self.layout.dtype == "int8")
    @rule(ids=st.lists(IDS, max_size=5, unique=True))
    def append_int8(self, ids: list[str]) -> None:
        new = [image_id for image_id in ids if image_id not in self.model]
        operation = Operation("append", self.records(new))
        values, scales = quantize_tokens(tokens_of(operation.records, self.layout))
        self.store.append(operation.ids, values, scales)
        self.model = operation.after(self.model)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        self.apply(Operation("replace", self.records(self.some(data))))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self.apply(Operation("delete", self.records(self.some(data))))

    @rule(max_dead_share=st.sampled_from([0.0, 0.3, 0.9]))
    def compact(self, max_dead_share: float) -> None:
        self.store.compact(max_dead_share)

    @rule(ids=st.lists(IDS, min_size=1, max_size=9, unique=True))
    def write_a_segment(self, ids: list[str]) -> None:
        operation = Operation("commit", self.records(ids[: self.layout.max_rows]))
        self.sealed.append((write_segment(self.store, operation), operation))

    @precondition(lambda self: self.sealed)
    @rule(twice=st.booleans())
    def commit_segments(self, twice: bool) -> None:
        copies = []
        for path, operation in self.sealed:
            copies.append(shutil.copy(path, path.with_name(f"copy-of-{path.name}")))
            num_new = len(set(operation.ids) - self.model.keys())
            report = self.store.commit_segments([path])
            assert (report.num_added, report.num_present) == (
                num_new,
                len(operation.ids) - num_new,
            )
            self.model = operation.after(self.model)
        self.sealed = []
        if twice:
            assert self.store.commit_segments(list(map(Path, copies))).num_added == 0
        else:
            for copy in copies:
                Path(copy).unlink()

    @precondition(lambda self: self.model)
    @rule(data=st.data(), ids=st.lists(IDS, max_size=3, unique=True))
    def refuse_ids_that_do_not_fit(self, data: st.DataObject, ids: list[str]) -> None:
        mixed = self.records([*ids, *(i for i in self.some(data) if i not in ids)])
        tokens = tokens_of(mixed, self.layout)
        names = [image_id for image_id, _ in mixed]
        with pytest.raises(StoreError):
            self.store.append(names, tokens)
        if not set(ids) <= self.model.keys():
            with pytest.raises(StoreError):
                self.store.replace(names, tokens)
            with pytest.raises(StoreError):
                self.store.delete(names)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = TokenStore.open(self.folder / "s", mode="a")

    @precondition(lambda self: len(self.readers) < MAX_READERS)
    @rule(access=st.sampled_from(["cached", "resident"]))
    def open_reader(self, access: str) -> None:
        reader = TokenStore.open(self.folder / "s", access=access)  # type: ignore[arg-type]
        self.readers.append((reader, dict(self.model)))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close_reader(self, data: st.DataObject) -> None:
        reader, snapshot = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        self.check(reader, snapshot)
        reader.close()

    @precondition(lambda self: self.model)
    @rule(batch_size=st.integers(1, 7))
    def iterate(self, batch_size: int) -> None:
        got: dict[str, bytes] = {}
        for batch in self.store.iterate(batch_size):
            assert 1 <= len(batch.ids) <= batch_size
            assert not got.keys() & set(batch.ids), "an id comes once"
            got |= joined(list(batch.ids), np.asarray(batch.tokens), batch.scales)
        assert differences(got, expected_bytes(self.model, self.layout)) == ""

    @invariant()
    def the_store_holds_the_dict(self) -> None:
        if hasattr(self, "store"):
            self.check(self.store, self.model)
            for reader, snapshot in self.readers:
                self.check(reader, snapshot)

    def check(self, store: TokenStore, model: dict[str, int]) -> None:
        assert len(store) == len(model)
        assert all(image_id in store for image_id in model)
        assert sorted(store.ids()) == sorted(model)
        assert differences(served_bytes(store), expected_bytes(model, self.layout)) == ""
        self.compared[len(model)] += 1

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self.check_what_is_left()
        finally:
            shutil.rmtree(self.folder)

    def check_what_is_left(self) -> None:
        """After the last reader: compacted, the folder holds live records only."""
        for reader, _ in self.readers:
            reader.close()
        self.store.compact()
        self.store.close()
        with TokenStore.open(self.folder / "s", mode="a") as store:
            self.check(store, self.model)
            num_segments = store.stat().num_segments
        files = [path.name for path in (self.folder / "s/segments").iterdir()]
        assert len(files) == num_segments, "files of no segment stay behind"
        assert num_segments or not self.model


def test_random_histories_hold_what_a_dict_holds() -> None:
    StoreMachine.compared = Counter()
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=MAX_EXAMPLES,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert len(StoreMachine.compared) > 5, "stores of many sizes were compared with their dicts"
