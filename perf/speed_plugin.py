"""The stages of a ranking as a pytest-benchmark suite, for whoever has pytest-benchmark in CI.

    pytest -p edje.perf.speed_plugin perf/test_speed.py --engine ENGINE --store STORE \\
        --benchmark-json now.json

Without `--engine` it measures the full-size random scorer, with `--free` an engine that takes no
time. The JSON has our machine in `machine_info` and, in `extra_info`, what `edje bench run` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..errors import EdjeError
from .measure import rounds_of, scratch_folder
from .report import Measured, machine_info
from .stage import Stage
from .stages import NAMES, open_stages

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

MOST_ROUNDS, SECONDS = 500, 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what is measured."""
    group = parser.getgroup("edje")
    group.addoption("--engine", type=Path, help="engine folder; default: the random scorer")
    group.addoption("--store", type=Path, help="token store of the engine; default: random")
    group.addoption("--candidates", type=int, default=256, help="images that the query ranks")
    group.addoption("--wordpieces", type=int, default=13, help="length of the query")
    group.addoption("--free", action="store_true", help="an engine that takes no time")


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Return our fingerprint: pytest-benchmark's own knows no GPU and no library."""
    return machine_info()


@pytest.fixture(scope="session")
def stages(request: pytest.FixtureRequest) -> Iterator[dict[str, Stage]]:
    """Open all stages, once."""
    given = request.config.getoption
    setting = {name: given(f"--{name}") for name in ("store", "candidates", "wordpieces", "free")}
    with scratch_folder() as scratch:
        try:
            with open_stages(given("--engine"), scratch=scratch, **setting) as opened:
                yield opened
        except EdjeError as error:
            pytest.fail(str(error), pytrace=False)


@pytest.fixture(params=NAMES)
def measured(request: pytest.FixtureRequest, stages: dict[str, Stage]) -> Callable[[], None]:
    """Return what measures one stage and checks what it gave."""
    if request.param not in stages:
        pytest.skip(f"{request.param}: the engine reads this machine's memory, nothing is copied")
    stage = stages[request.param]
    benchmark: BenchmarkFixture = request.getfixturevalue("benchmark")

    def run() -> None:
        benchmark.group = stage.group
        benchmark.pedantic(stage.run, rounds=rounds_of(stage, SECONDS, most=MOST_ROUNDS))
        stage.check()
        seconds = list(benchmark.stats.stats.data)
        entry = Measured(stage.name, stage.group, seconds, pairs=stage.pairs)
        benchmark.extra_info.update(entry.to_json()["extra_info"])

    return run
