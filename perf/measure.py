"""Stages and roof in turns in one process: one setting, or a sweep over several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

from ..engines.manifest import EngineManifest
from ..errors import EdjeError
from ..runtime.text import QueryTokenizer
from ..show import note, print_table, progress_bar, progress_steps
from .free_engine import FREE
from .harness import ROOT
from .report import Measured, benchmark_json, summary
from .roof import Roof, measure_gpu_roof, open_roof
from .stage import Stage
from .stages import open_stages
from .subjects import engine_folder

LEAST_ROUNDS, MOST_ROUNDS = 5, 2000
SHORT_S = 0.05
DEFAULT_WORDPIECES = 13
ROOF_S = 1.0  # of each of its products
SWEPT = ("candidates", "images", "batch", "wordpieces", "threads")


def measure_stages(
    stages: Mapping[str, Stage],
    *,
    seconds: float,
    least_rounds: int = LEAST_ROUNDS,
    params: Callable[[str], Mapping[str, Any]] = lambda key: {},
) -> list[Measured]:
    """Run the stages in turns, each for about `seconds`; check what they give before and after.

    A stage that takes longer gets fewer turns, spread evenly over the same time.

    Args:
        stages: by a key of the caller's.
        least_rounds: that a stage gets, however long it takes.
        params: of an entry, by the key.

    Raises:
        EdjeError: a result is wrong; nothing is reported then.
    """
    runs = {key: _Runs(stage) for key, stage in stages.items()}
    with progress_bar("measuring") as update:
        for at, one in enumerate(runs.values()):
            one.try_out()
            update(at + 1, len(runs))
        for key, one in runs.items():
            budget = min(seconds, ROOF_S) if stages[key].group == "roof" else seconds
            one.plan(budget, least_rounds)
        total = max([1, *(one.left for one in runs.values())])
        for turn in range(total):
            for one in runs.values():
                if (turn + 1) * one.left // total > turn * one.left // total:
                    one.turn()
            update(turn + 1, total)
    for stage in stages.values():
        stage.check()
    return [one.measured(params(key)) for key, one in runs.items()]


def rounds_of(stage: Stage, seconds: float, *, most: int = MOST_ROUNDS) -> int:
    """Return how many runs fit into so many seconds, by what one takes now."""
    began = perf_counter()
    stage.run()
    return max(LEAST_ROUNDS, min(most, round(seconds / (perf_counter() - began))))


class _Runs:
    """The runs of one stage."""

    def __init__(self, stage: Stage):
        self._stage, self.left = stage, 0
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def turn(self) -> None:
        """Run once."""
        cpu, began = process_time(), perf_counter()
        self._stage.run()
        self._wall.append(perf_counter() - began)
        self._cpu.append(process_time() - cpu)

    def try_out(self) -> None:
        """See how long a run takes: short ones are tried a few times, for one may be disturbed."""
        self.turn()
        while min(self._wall) < SHORT_S and len(self._wall) < LEAST_ROUNDS:
            self.turn()

    def plan(self, seconds: float, least: int) -> None:
        """Decide how many more runs there will be."""
        wanted = min(MOST_ROUNDS, round(seconds / max(min(self._wall), 1e-9)))
        self.left = max(0, max(least, wanted) - len(self._wall))

    def measured(self, params: Mapping[str, Any]) -> Measured:
        """Return what all runs took."""
        stage, least = self._stage, min(self._wall)
        return Measured(
            stage.name,
            stage.group,
            self._wall,
            pairs=stage.pairs,
            params=params,
            cpu_seconds=self._cpu,
            rates={unit: amount / least for unit, amount in stage.work.items()},
        )


def run_stages(
    engine: Path | None,
    *,
    seconds: float,
    roof: bool | Roof = True,
    made: Mapping[str, Any] | None = None,
    **setting: Any,
) -> dict[str, Any]:
    """Open the stages and the roof, measure them in turns; return the result.

    Args:
        roof: measure it, too; or one that this machine has shown, for the shares.
        made: where no engine is named: `free`, `backend`, `precision` of `engine_folder`.
        setting: as `open_stages` takes it.
    """
    with scratch_folder() as scratch, ExitStack() as stack:
        with progress_steps("bench") as progress:
            folder = engine or engine_folder(scratch, progress, **(made or {}))
            opened = open_stages(folder, scratch=scratch, progress=progress, **setting)
            stages = dict(stack.enter_context(opened))
            stages |= _roof_stages(stack, setting) if roof is True else {}
        measured = measure_stages(stages, seconds=seconds)
        return _result(folder, measured, setting, roof)


def run_sweep(
    engine: Path | None,
    over: str,
    values: Sequence[int],
    *,
    seconds: float,
    roof: bool | Roof = True,
    least_rounds: int = LEAST_ROUNDS,
    made: Mapping[str, Any] | None = None,
    **setting: Any,
) -> dict[str, Any]:
    """Measure the stages under each of the values, all in turns; return the result.

    Args:
        over: one of `SWEPT`.
        roof, made, setting: as `run_stages`; the settings stay the same.

    Raises:
        EdjeError: nothing of that name can be swept.
    """
    if over not in SWEPT:
        raise EdjeError(f"cannot sweep over {over!r}, expected one of {', '.join(SWEPT)}")
    with scratch_folder() as scratch, ExitStack() as stack:
        with progress_steps("bench") as progress:
            engine = engine or engine_folder(scratch, progress, **(made or {}))
            stages: dict[str, Stage] = {}
            for value in values:
                progress(f"opening at {over} {value:,}")
                folder = scratch / f"at-{value}"
                folder.mkdir()
                given = {**setting, over: value}
                opened = open_stages(engine, scratch=folder, warm=least_rounds > 1, **given)
                for name, stage in stack.enter_context(opened).items():
                    stages[f"{name} {value}"] = stage
            stages |= _roof_stages(stack, setting) if roof is True else {}
        measured = measure_stages(
            stages, seconds=seconds, least_rounds=least_rounds, params=_params_of(over)
        )
        return _result(engine, measured, setting, roof, swept=over)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder on the checkout's disk, which the system's temporary one need not be."""
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=cache) as scratch:
        yield Path(scratch)


def print_result(result: Mapping[str, Any]) -> None:
    """Write a table of all entries but the roof's, the roof, and the conditions."""
    entries = [one for one in result["benchmarks"] if one["group"] != "roof"]
    header = ("", "pairs", "pairs/s", "us a pair", "of roof", "min ms", "p50", "p90", "p99", "runs")
    print_table("in turns; speed from the least time", header, [_row(one) for one in entries])
    rates = [f"{name} {rate / 1e9:,.1f} G/s" for name, rate in result.get("roof", {}).items()]
    if rates:
        print(f"roof: {', '.join(rates)}")
    print(summary(result))


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    extra, found = entry["extra_info"], entry["stats"]
    share = extra["share_of_roof"]
    return (
        entry["fullname"].partition("::")[2],
        f"{extra['pairs']:,}" if extra["pairs"] else "",
        "" if extra["pairs_per_s"] is None else f"{extra['pairs_per_s']:,.0f}",
        "" if extra["pairs_per_s"] is None else f"{extra['us_per_pair']:,.3f}",
        "" if share is None else f"{share:.1%}",
        f"{found['min'] * 1e3:,.3f}",
        *(f"{extra[f'p{q}_ms']:,.3f}" for q in (50, 90, 99)),
        f"{found['rounds']:,}",
    )


def _params_of(over: str) -> Callable[[str], Mapping[str, Any]]:
    def params(key: str) -> Mapping[str, Any]:
        value = key.rpartition(" ")[2]
        return {over: int(value)} if value.isdigit() else {}

    return params


def _roof_stages(stack: ExitStack, setting: Mapping[str, Any]) -> dict[str, Stage]:
    found = stack.enter_context(open_roof(setting.get("threads")))
    return {f"roof {name}": one for name, one in found.items()}


def _result(
    folder: Path,
    measured: Sequence[Measured],
    setting: Mapping[str, Any],
    known: bool | Roof,
    **more: Any,
) -> dict[str, Any]:
    """Give every stage its share of the roof, and everything its conditions."""
    manifest = EngineManifest.read(folder)
    if manifest.device.get("kind") == "cuda":
        if find_spec("torch") is None:
            note("no roof of the GPU: PyTorch measures it, which is not installed")
        else:
            measured = [*measured, *measure_gpu_roof()]
    roof = known if isinstance(known, Roof) else Roof.of(measured)
    lengths = _wordpieces_of(folder, manifest, setting)
    precision = "" if manifest.backend == FREE else manifest.precision
    measured = [
        roof.with_share(one, precision, one.params.get("wordpieces", lengths), manifest)
        for one in measured
    ]
    sizes = manifest.bundle.sizes
    conditions = {
        "engine": "takes no time" if manifest.backend == FREE else manifest.words,
        "backend_version": manifest.backend_version,
        "layers": manifest.layers,
        "hidden": sizes.hidden,
        "wordpieces": lengths,
        "threads": setting.get("threads") or "all",
        **{k: v for k, v in setting.items() if k in SWEPT or k == "residency"},
    }
    return benchmark_json(measured, conditions=conditions, roof=dict(roof.rates), **more)


def _wordpieces_of(folder: Path, manifest: EngineManifest, setting: Mapping[str, Any]) -> int:
    query = setting.get("query")
    if query is None:
        return int(setting.get("wordpieces", DEFAULT_WORDPIECES))
    tokenizer = QueryTokenizer.open(folder, manifest.bundle.text)
    return int(tokenizer([query]).text_length[0]) - 2
