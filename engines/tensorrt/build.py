"""Graph -> plan, by TensorRT and TensorRT-RTX alike: typed network, a profile a bucket, a plan.

Precision is the graph's alone: networks are strongly typed and no precision flag is ever set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import EngineError
from ..contract import OUTPUT, BuildJob, BuildOptions, Progress
from .library import TrtLibrary, one_line
from .report import REPORT, read_report

PLAN = "joint_encoder.plan"
MAX_FAULTS = 12
_FAULT_LENGTH = 300
_STEPS_SHOWN = 10  # of a phase: 900 layers would be 900 lines

Limits = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PlanTarget:
    """What the plan is built for, beyond the job's own options.

    Attributes:
        compute_capabilities: as `8.9`; TensorRT-RTX only, empty for TensorRT.
        timing_cache: file of kernel timings to read and renew; TensorRT only, None for none.
    """

    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None


def build_plan(library: TrtLibrary, job: BuildJob, target: PlanTarget) -> dict[str, Any]:
    """Write `joint_encoder.plan` (and `report.json` if asked for) into `job.out`.

    Blocks other builds with the same library: they share its log.

    Returns:
        The build flags worth recording.

    Raises:
        EngineError: the graph cannot be read (every parser error named), is not the joint
            encoder, or cannot be built (what the library logged as errors).
    """
    with library.building:
        library.log.clear()
        builder = library.module.Builder(library.logger)
        network, _parser = parsed_network(library, builder, job.graph)
        _check_graph(library, network, job)
        config = _config(library, builder, job, target)
        _add_profiles(builder, config, job)
        monitor = make_monitor(library.module, job.progress)
        config.progress_monitor = monitor
        cache = _attach_timing_cache(config, target.timing_cache)
        plan = builder.build_serialized_network(network, config)
        monitor.raise_what_stopped()
        if plan is None:
            raise EngineError(
                f"{library.title} {library.version} cannot build this graph in {job.precision}",
                faults=_shortened(library.log.errors()) or ["it logged no error"],
                hint="build another --precision",
            )
        (job.out / PLAN).write_bytes(plan)
        if cache is not None and target.timing_cache is not None:
            write_atomically(target.timing_cache, config.get_timing_cache().serialize())
        return {**_chosen(job.options), **_write_report(library, job)}


def parsed_network(library: TrtLibrary, builder: Any, graph: Path) -> tuple[Any, Any]:
    """Return a strongly typed network read from `graph`, and the parser that owns its weights.

    Raises:
        EngineError: with every error of the parser.
    """
    trt = library.module
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise EngineError(
            f"{library.title} {library.version} cannot read the graph",
            faults=[_parser_fault(error) for error in errors] or library.log.errors(),
        )
    return network, parser


def graph_tensors(job: BuildJob) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Return the type (TensorRT's name) and shape of every tensor that the graph must have."""
    sizes = job.bundle.sizes
    tokens = ("INT8" if job.token_dtype == "int8" else "HALF", (-1, sizes.num_tokens, sizes.hidden))
    tensors = {
        "text_ids": ("INT32", (-1, -1)),
        "text_length": ("INT32", (-1,)),
        "query_of_pair": ("INT32", (-1,)),
        "visual_tokens": tokens,
        OUTPUT: ("FLOAT", (-1,)),
    }
    scales = {"visual_scales": ("HALF", (-1, sizes.num_tokens))}
    return {**tensors, **scales} if job.token_dtype == "int8" else tensors


def profile_limits(job: BuildJob, bucket: int) -> Mapping[str, Limits]:
    """Return least, best and largest shape of every input for one text bucket.

    Kernels are chosen for one query with as many pairs as a batch takes: the common case.
    """
    sizes, most = job.bundle.sizes, job.profile.max_pairs
    queries, pairs = (1, 1, most), (1, most, most)
    limits = {
        "text_ids": _limits(queries, (bucket,)),
        "text_length": _limits(queries, ()),
        "query_of_pair": _limits(pairs, ()),
        "visual_tokens": _limits(pairs, (sizes.num_tokens, sizes.hidden)),
    }
    scales = {"visual_scales": _limits(pairs, (sizes.num_tokens,))}
    return {**limits, **scales} if job.token_dtype == "int8" else limits


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that other processes may be reading or writing: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def make_monitor(module: Any, progress: Progress) -> Any:
    """Return the library's progress monitor that calls `progress` with one line a step.

    What `progress` raises (Ctrl-C too) ends the build at the next step and is raised by
    `raise_what_stopped`: exceptions cannot pass through the library.
    """
    base: Any = module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 asks for exactly this call
            self._num_steps: dict[str, int] = {}
            self._stopped_by: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            self._num_steps[phase] = num_steps
            if parent is not None:
                self._tell(f"{parent}: {phase.lower()}")

        def step_complete(self, phase: str, step: int) -> bool:
            num_steps = self._num_steps.get(phase, 0)
            if num_steps > 1 and _is_shown(step, num_steps):
                self._tell(f"{phase}, {step + 1} of {num_steps}")
            return self._stopped_by is None

        def phase_finish(self, phase: str) -> None:
            self._num_steps.pop(phase, None)

        def _tell(self, line: str) -> None:
            try:
                progress(line)
            except BaseException as error:
                self._stopped_by = error

        def raise_what_stopped(self) -> None:
            if self._stopped_by is not None:
                raise self._stopped_by

    return Monitor()


def _is_shown(step: int, num_steps: int) -> bool:
    return (step + 1) * _STEPS_SHOWN // num_steps > step * _STEPS_SHOWN // num_steps


def _limits(counts: tuple[int, int, int], rest: tuple[int, ...]) -> Limits:
    least, best, most = ((count, *rest) for count in counts)
    return least, best, most


def _check_graph(library: TrtLibrary, network: Any, job: BuildJob) -> None:
    """Refuse a graph whose tensors are not the joint encoder's (all differences named)."""
    expected = dict(graph_tensors(job))
    found = {tensor.name: _described(tensor) for tensor in _tensors(network)}
    faults = [f"{name}: missing" for name in expected.keys() - found.keys()]
    faults += [f"{name}: not expected" for name in found.keys() - expected.keys()]
    faults += [
        f"{name}: got {_shown(found[name])}, expected {_shown(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if faults:
        raise EngineError(
            f"{library.title} reads a graph that is not a joint encoder", faults=sorted(faults)
        )


def _tensors(network: Any) -> Iterator[Any]:
    yield from (network.get_input(index) for index in range(network.num_inputs))
    yield from (network.get_output(index) for index in range(network.num_outputs))


def _described(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).rpartition(".")[2], tuple(tensor.shape)


def _shown(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]} {list(tensor[1])}"


def _config(library: TrtLibrary, builder: Any, job: BuildJob, target: PlanTarget) -> Any:
    trt, options = library.module, job.options
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: fp32 would round to 10 bits
    if options.report:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if target.compute_capabilities:
        config.num_compute_capabilities = len(target.compute_capabilities)
        for index, capability in enumerate(target.compute_capabilities):
            member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
            config.set_compute_capability(member, index)
    return config


def _add_profiles(builder: Any, config: Any, job: BuildJob) -> None:
    for bucket in job.profile.text_buckets:
        profile = builder.create_optimization_profile()
        for name, limits in profile_limits(job, bucket).items():
            profile.set_shape(name, *limits)
        config.add_optimization_profile(profile)


def _attach_timing_cache(config: Any, path: Path | None) -> Any:
    """Give the builder the timings of earlier builds; those it refuses are made anew."""
    if path is None:
        return None
    earlier = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
    if earlier is not None and config.set_timing_cache(earlier, ignore_mismatch=False):
        return earlier
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _write_report(library: TrtLibrary, job: BuildJob) -> dict[str, Any]:
    """Write what the builder said of the plan's layers; return what the manifest keeps of it."""
    if not job.options.report:
        return {}
    report = read_report(library.log.layer_report)
    header = {
        "library": f"{library.title} {library.version}",
        "precision": job.precision,
        "text_buckets": list(job.profile.text_buckets),
    }
    values = report.to_json(header)
    (job.out / REPORT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return {"report": REPORT, "attention": values["attention"]}


def _chosen(options: BuildOptions) -> dict[str, Any]:
    """Return the options that are not the defaults, as JSON values."""
    values = asdict(options)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != getattr(BuildOptions(), name) and name != "report"
    }


def _parser_fault(error: Any) -> str:
    node = f"{error.node_operator()} {error.node_name()}".strip()
    where = f"node {error.node()} ({node})" if node else f"node {error.node()}"
    return f"{where}: {one_line(error.desc())}"


def _shortened(lines: Sequence[str]) -> list[str]:
    shown = [f"{line[:_FAULT_LENGTH]}…" if len(line) > _FAULT_LENGTH else line for line in lines]
    rest = len(shown) - MAX_FAULTS
    return [*shown[:MAX_FAULTS], f"and {rest} more"] if rest > 0 else shown
