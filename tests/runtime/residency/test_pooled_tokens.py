"""A pipeline whose tokens partly stay on the device gives the scores of one whose tokens do not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.errors import EdjeError, EngineError
from edje.kernels.device.host import HostDevice
from edje.runtime.pipeline import Pipeline, Request
from edje.runtime.pool import TokenPool
from edje.runtime.resident_map import NOWHERE, ResidentMap
from edje.runtime.slot import Staged
from recording_device import CapturableEngine, RecordingDevice, RecordingStream, RowReadingEngine
from toy_engine import HIDDEN, NUM_TOKENS, ToySource, toy_manifest, toy_request

NUM_ROWS = 60  # that the store has
SEEDS = st.integers(0, 2**32)
CAPACITIES = st.sampled_from([1, 3, 8, 20, NUM_ROWS])
DTYPES = st.sampled_from(["float16", "int8"])


@pytest.fixture(autouse=True)
def watched_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell the recording device that the host writes whatever it looks at (but for scores)."""
    init, host = Staged.__init__, Staged.host

    def keeping_init(self: Any, device: Any, num_elements: int, dtype: str) -> None:
        init(self, device, num_elements, dtype)
        self.device, self.dtype = device, dtype

    def touching_host(self: Any, *shape: int) -> Any:
        array = host(self, *shape)
        if self.dtype != "float32":
            self.device.touch(array, writes=True)
        return array

    monkeypatch.setattr(Staged, "__init__", keeping_init)
    monkeypatch.setattr(Staged, "host", touching_host)


class Rig:
    """A pipeline with a pool on a recording device."""

    def __init__(
        self,
        seed: int,
        capacity: int,
        dtype: str = "float16",
        *,
        num_slots: int = 3,
        known: int = NUM_ROWS,
        checks_finite: bool = False,
        by_row: bool = False,
        **source: Any,
    ):
        self.device = RecordingDevice(seed)
        manifest = replace(toy_manifest(), token_dtype=dtype)
        kind = RowReadingEngine if by_row else CapturableEngine
        self.engine, self.source = kind(manifest), ToySource(**source)
        self.dtype, self.num_slots = dtype, num_slots
        self.pool = TokenPool(
            self.device,
            np.arange(known),
            capacity,
            shape=(NUM_TOKENS, HIDDEN),
            dtype=dtype,
            checks_finite=checks_finite,
        )
        self.pipeline = Pipeline(
            self.engine, self.source, self.device, num_slots=num_slots, pool=self.pool
        )
        self.made = self.device.usage()

    def check(self, request: Request) -> Any:
        result = self.pipeline.run(request)
        expected = self.expected(request)
        for place in result.damaged:
            expected[place] = np.nan
        np.testing.assert_array_equal(result.scores, expected)
        return result

    def outcome(self, request: Request) -> EdjeError | None:
        """Return the error that the request ends with; None after right scores."""
        try:
            self.check(request)
        except EdjeError as error:
            return error
        return None

    def expected(self, request: Request) -> np.ndarray:
        text, rows = request.queries.text_ids.sum(1) / 1024, request.rows
        values = rows if self.dtype == "float16" else rows % 100 * (rows // 100 + 1)
        return (values + text[request.query_of_pair]).astype(np.float32)

    def rows_read(self) -> list[int]:
        """Return the rows that were read from the store since the last call, in this order."""
        read = [row for kind, rows in self.source.calls if kind == "read" for row in rows]
        self.source.calls.clear()
        return read

    def finish(self) -> None:
        assert self.device.races == []
        assert replace(self.device.usage(), num_graphs=0) == self.made, (
            "something was made while requests ran"
        )
        assert self.pipeline.usage() == (self.num_slots, self.num_slots, 0)
        used = self.pool.map.usage()
        assert used.num_held + used.num_empty == self.pool.map.capacity
        assert used.num_tickets == 0
        self.pipeline.close()
        self.device.close()


def ask(rows: Any, lengths: Any = (5,), query_of_pair: Any = None) -> Request:
    return toy_request(
        lengths, np.zeros(len(rows)) if query_of_pair is None else query_of_pair, rows
    )


@st.composite
def requests(draw: Any) -> Request:
    """Up to 40 pairs of up to three queries, rows repeated."""
    lengths = draw(st.lists(st.integers(3, 63), min_size=1, max_size=3))
    rows = draw(st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=40))
    return ask(rows, lengths, np.arange(len(rows)) % len(lengths))


many = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
some = settings(many, max_examples=100)


@many
@given(
    SEEDS,
    CAPACITIES,
    DTYPES,
    st.lists(requests(), min_size=1, max_size=5),
    st.integers(1, 4),
    st.booleans(),
)
def test_mixed_batches_score_as_if_all_was_uploaded(
    seed, capacity, dtype, asked, num_slots, by_row
):
    rig = Rig(seed, capacity, dtype, num_slots=num_slots, by_row=by_row)
    assert [rig.outcome(request) for request in asked] == [None] * len(asked)
    rig.finish()


def test_an_engine_that_reads_by_row_has_nothing_gathered():
    rig = Rig(1, 30, by_row=True)
    rig.pipeline.load(np.arange(20))
    loaded = len(rig.device.launches)
    rig.check(ask(np.arange(20)))
    assert rig.device.launches[loaded:] == []
    rig.check(ask(np.arange(10, 30)))  # what came in with the batch is kept, by one launch each
    kernels = {launch.symbol for launch in rig.device.launches[loaded:]}
    assert kernels == {"scatter_tokens"}
    assert len(rig.pool.map) == 30
    gathering = Rig(1, 30)
    assert rig.made.device_bytes < gathering.made.device_bytes
    rig.finish()


@some
@given(SEEDS, CAPACITIES, DTYPES, st.lists(requests(), min_size=2, max_size=5), st.booleans())
def test_threads_share_a_pool(seed, capacity, dtype, asked, by_row):
    rig = Rig(seed, capacity, dtype, by_row=by_row)
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(rig.outcome, asked)) == [None] * len(asked)
    rig.finish()


BREAKS = ("upload", "uploading", "launch", "download", "downloading", "compute", "gather")


@some
@given(SEEDS, CAPACITIES, requests(), st.sampled_from(BREAKS), st.integers(1, 12), st.booleans())
def test_what_failed_on_its_way_is_never_found_in_the_pool(
    seed, capacity, request_, what, at, by_row
):
    rig = Rig(seed, capacity, by_row=by_row)
    broken = int(request_.rows[at % len(request_.rows)])

    def fail_on_broken(batch: Any) -> None:
        if (batch.visual_tokens[:, 0, 0] == broken).any():
            raise RuntimeError("kernel broke")

    if what == "compute":
        rig.engine.before = fail_on_broken
    elif what == "gather":
        rig.source.fail = {broken: EngineError("disk gone")}
    else:
        rig.device.failures[what] = at
    error = rig.outcome(request_)
    assert error is None or error.stage is not None
    rig.engine.before, rig.source.fail = None, {}
    rig.device.failures.clear()
    rig.check(ask(np.arange(NUM_ROWS)))
    rig.check(request_)
    rig.finish()


def test_what_is_held_is_not_read_again():
    rig = Rig(1, NUM_ROWS)
    request = ask(np.arange(40))
    rig.check(request)
    assert sorted(rig.rows_read()) == list(range(40))
    rig.check(request)
    assert rig.rows_read() == []
    rig.check(ask(np.arange(30, 50)))
    assert sorted(rig.rows_read()) == list(range(40, 50))
    assert len(rig.pool.map) == 50
    rig.finish()


def test_an_image_that_several_queries_ask_for_is_read_once():
    rig = Rig(1, NUM_ROWS)
    rig.check(ask([7, 9, 7, 9, 7, 9], [5, 6, 7], [0, 0, 1, 1, 2, 2]))
    assert sorted(rig.rows_read()) == [7, 9]
    rig.finish()


def test_loaded_ahead_all_is_held_and_nothing_else_taken_in():
    rig = Rig(3, 30)
    rig.pipeline.load(np.arange(30))
    rig.pool.map.freeze()
    assert sorted(rig.rows_read()) == list(range(30))
    rig.check(ask(np.arange(NUM_ROWS)))
    assert sorted(rig.rows_read()) == list(range(30, NUM_ROWS))
    rig.check(ask(np.arange(NUM_ROWS)))
    assert sorted(rig.rows_read()) == list(range(30, NUM_ROWS))
    assert len(rig.pool.map) == 30
    rig.finish()


@pytest.mark.parametrize("by_row", [False, True])
def test_damaged_records_are_named_for_every_pair_and_never_held(by_row):
    rig = Rig(5, NUM_ROWS, by_row=by_row, bad=[3, 17])
    rig.pipeline.load(np.arange(0, 10))
    assert len(rig.pool.map) == 9
    for _ in range(2):
        result = rig.check(ask([3, 4, 17, 3, 5], [5, 6], [0, 0, 0, 1, 1]))
        assert result.damaged == {0: "flipped", 2: "flipped", 3: "flipped"}
    assert set(rig.rows_read()) >= {3, 17}
    assert (rig.pool.map.missing(np.arange(20)) == [3, *range(10, 20)]).all()
    rig.finish()


@pytest.mark.parametrize("by_row", [False, True])
def test_tokens_that_are_not_finite_have_no_score_and_are_not_held_where_that_would_hide_them(
    by_row,
):
    rig = Rig(5, NUM_ROWS, "int8", by_row=by_row, broken=[3, 17])
    for _ in range(2):
        scores = rig.pipeline.run(ask([3, 4, 17, 3, 5])).scores
        assert np.isnan(scores).tolist() == [True, False, True, True, False]
    assert rig.pool.map.missing(np.array([3, 4, 5, 17])).tolist() == [3, 17]
    rig.finish()


def test_a_device_without_memory_of_its_own_has_no_pool():
    with pytest.raises(EngineError, match=r"no memory of its own(?s:.*)the residency `host`"):
        TokenPool(HostDevice(), np.arange(3), 3, shape=(4, 8), dtype="float16", checks_finite=False)


@pytest.mark.parametrize("careless", [False, True])
def test_a_batch_that_waits_for_its_turn_keeps_its_places(careless, monkeypatch):
    """The second case is the control: without the ticket the record is driven out."""
    rig = Rig(2, 1)
    rig.pipeline.load(np.array([5]))
    if careless:
        look_up = ResidentMap.look_up

        def careless_look_up(self: Any, rows: Any) -> Any:
            held = look_up(self, rows)
            self.release(held.ticket)
            return held

        monkeypatch.setattr(ResidentMap, "look_up", careless_look_up)
    with rig.device.current():
        waiting, quick = (rig.pool.tokens_of_slot(8) for _ in range(2))
        stream, event = rig.device.stream(), rig.device.event()

    def send(tokens: Any) -> np.ndarray:
        with rig.device.current():
            tokens.upload(stream)
            tokens.assemble(stream)
            stream.record(event)
            event.synchronize()
        return tokens.in_batch(1)[0][0, 0, 0]

    waiting.read(rig.source, np.array([5]), check_finite=False)
    quick.read(rig.source, np.array([6]), check_finite=False)
    assert send(quick) == 6
    assert send(waiting) == (6 if careless else 5)


@pytest.mark.parametrize("careless", [False, True])
def test_a_record_whose_upload_failed_is_read_again(careless, monkeypatch):
    """The second case is the control: published before it arrived, it would be found."""
    if careless:
        take = ResidentMap.take

        def publishing_take(self: Any, rows: Any) -> Any:
            places = take(self, rows)
            self.publish(rows, places)
            return np.full_like(places, NOWHERE)

        monkeypatch.setattr(ResidentMap, "take", publishing_take)
    for seed in range(10):
        rig, request = Rig(seed, NUM_ROWS), ask(np.arange(8))
        rig.device.failures["uploading"] = 1
        assert isinstance(rig.outcome(request), EngineError)
        rig.device.failures.clear()
        if careless:
            with pytest.raises(AssertionError, match="Arrays are not equal"):
                rig.check(request)
        else:
            rig.check(request)
            rig.finish()


def test_a_gather_that_does_not_wait_for_its_upload_is_found(monkeypatch):
    """The control of the recording device: it sees what the kernels touch."""
    for seed in range(10):
        rig = Rig(seed, 12)
        monkeypatch.setattr(RecordingStream, "wait", lambda stream, event: None)
        rig.pipeline.run(ask(np.arange(8)))
        assert any("gather_tokens reads" in race for race in rig.device.races)
