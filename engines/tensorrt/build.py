"""Graph -> plan, by TensorRT and TensorRT-RTX alike: typed network, a profile a bucket, a report.

Precision is the graph's alone: networks are strongly typed and no precision flag is ever set.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...bundle import ATTENTION, ATTENTION_SCORES, CONTEXT, OUTPUT, layer_of, layer_path, node_name
from ...errors import EngineError
from ...files import rewrite_file
from ..build_options import BuildOptions, given_options
from ..contract import BuildJob, Progress
from .library import TrtLibrary, one_line

PLAN, REPORT = "joint_encoder.plan", "report.json"
MAX_FAULTS = 12
_FAULT_LENGTH = 300
_STEPS_SHOWN = 10  # of a phase: 900 layers would be 900 lines


def build_plan(
    library: TrtLibrary, job: BuildJob, timing_cache: Path | None = None
) -> dict[str, Any]:
    """Write `joint_encoder.plan` (and `report.json` if asked for) into `job.out`.

    Blocks other builds with the same library: they share its log.

    Args:
        timing_cache: file of kernel timings to read and renew; None for none.

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
        config = _config(library, builder, job)
        _add_profiles(builder, config, job)
        monitor = make_monitor(library.module, job.progress)
        config.progress_monitor = monitor
        _attach_timing_cache(config, timing_cache)
        plan = builder.build_serialized_network(network, config)
        monitor.raise_what_stopped()
        if plan is None:
            raise EngineError(
                f"{library.title} {library.version} cannot build this graph in {job.precision}",
                faults=_shortened(library.log.errors()) or ["it logged no error"],
                hint="build another --precision",
            )
        (job.out / PLAN).write_bytes(plan)
        if timing_cache is not None:
            timing_cache.parent.mkdir(parents=True, exist_ok=True)
            with rewrite_file(timing_cache) as file:
                file.write(config.get_timing_cache().serialize())
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


def _inputs(job: BuildJob, slots: int) -> dict[str, tuple[str, bool, tuple[int, ...]]]:
    """Return each input's type (TensorRT's name), whether it has a row a pair, and a row's shape.

    The others have a row a query.
    """
    tokens = (job.bundle.sizes.num_tokens, job.bundle.sizes.hidden)
    is_int8 = job.token_dtype == "int8"
    scales = {"visual_scales": ("HALF", True, tokens[:1])}
    return {
        "text_ids": ("INT32", False, (slots,)),
        "text_length": ("INT32", False, ()),
        "query_of_pair": ("INT32", True, ()),
        "visual_tokens": ("INT8" if is_int8 else "HALF", True, tokens),
        **(scales if is_int8 else {}),
    }


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


def _check_graph(library: TrtLibrary, network: Any, job: BuildJob) -> None:
    """Refuse a graph whose tensors are not the joint encoder's (all differences named)."""
    expected = {name: (kind, (-1, *row)) for name, (kind, _, row) in _inputs(job, -1).items()}
    expected[OUTPUT] = ("FLOAT", (-1,))
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


def _config(library: TrtLibrary, builder: Any, job: BuildJob) -> Any:
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
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
            config.set_compute_capability(member, index)
    return config


def _add_profiles(builder: Any, config: Any, job: BuildJob) -> None:
    """Add the least, best and largest shapes of every text bucket.

    Kernels are chosen for one query with as many pairs as a batch takes: the common case.
    """
    most = job.profile.max_pairs
    for bucket in job.profile.text_buckets:
        profile = builder.create_optimization_profile()
        for name, (_, is_per_pair, row) in _inputs(job, bucket).items():
            best = most if is_per_pair else 1
            profile.set_shape(name, (1, *row), (best, *row), (most, *row))
        config.add_optimization_profile(profile)


def _attach_timing_cache(config: Any, path: Path | None) -> None:
    """Give the builder the timings of earlier builds; those it refuses are made anew."""
    if path is None:
        return
    earlier = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
    if earlier is None or not config.set_timing_cache(earlier, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _write_report(library: TrtLibrary, job: BuildJob) -> dict[str, Any]:
    """Write what the builder said of the plan's layers; return what the manifest keeps of it."""
    if not job.options.report:
        return {}
    values = {
        "library": f"{library.title} {library.version}",
        "precision": job.precision,
        "text_buckets": list(job.profile.text_buckets),
        **read_report(library.log.layer_report),
    }
    (job.out / REPORT).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return {"report": REPORT, "attention": values["attention"]}


def _chosen(options: BuildOptions) -> dict[str, Any]:
    """Return the options that are not the defaults, as JSON values."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given_options(options).items()
        if name != "report"
    }


def _parser_fault(error: Any) -> str:
    node = f"{error.node_operator()} {error.node_name()}".strip()
    where = f"node {error.node()} ({node})" if node else f"node {error.node()}"
    return f"{where}: {one_line(error.desc())}"


def _shortened(lines: Sequence[str]) -> list[str]:
    shown = [f"{line[:_FAULT_LENGTH]}…" if len(line) > _FAULT_LENGTH else line for line in lines]
    rest = len(shown) - MAX_FAULTS
    return [*shown[:MAX_FAULTS], f"and {rest} more"] if rest > 0 else shown


# The inspector's one-line format, which the builder logs: that needs no GPU, an inspector one.
_LAYER = re.compile(r"^Name: (.*?), LayerType: (\w*), (.*)$", re.MULTILINE)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_IO = re.compile(
    r"^ Name: (.*?), IOMode: (\w+), DataType: (\w+), Dimensions: \[([^\]]*)\].*?"
    r"ProfileInfo: \[(.*)\]$",
    re.MULTILINE,
)
_LIMITS = re.compile(r"MinShape: \[([^\]]*)\], OptShape: \[([^\]]*)\], MaxShape: \[([^\]]*)\]")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
# Path and kind of the nodes that one fused attention kernel computes.
FUSED = ((ATTENTION_SCORES, "MatMul"), (ATTENTION, "Softmax"), (CONTEXT, "MatMul"))


def read_report(text: str) -> dict[str, Any]:
    """Return the layers and tensors of a plan as JSON values; lines of another form are left out.

    A layer is one kernel, with the graph's nodes that it computes and the types it touches. A
    tensor's `limits` are least, best and largest shape for every profile; -1 is any size.
    """
    layers = [_layer(*found.groups()) for found in _LAYER.finditer(text)]
    fused = _fused_attention(layers)
    return {
        "attention": {"layers": len(fused), "fused": sum(fused.values())},
        "kernels": dict(Counter(layer["kind"] for layer in layers)),
        "types": dict(Counter("+".join(layer["types"]) for layer in layers if layer["types"])),
        "tensors": [_tensor(*found.groups()) for found in _IO.finditer(text)],
        "layers": layers,
    }


def _layer(name: str, kind: str, rest: str) -> dict[str, Any]:
    kernel = re.search(r"TacticName: ([^,]*)", rest)
    profile = _PROFILE.search(name)
    return {
        "name": name,
        "kind": kind,
        "kernel": kernel[1] if kernel else "",
        "profile": int(profile[1]) if profile else 0,
        "nodes": _ONNX_NODE.findall(rest),
        "types": sorted({dtype for _, _, dtype in _TENSOR.findall(rest)}),
    }


def _tensor(name: str, mode: str, dtype: str, shape: str, profiles: str) -> dict[str, Any]:
    limits = [[_shape(each) for each in found] for found in _LIMITS.findall(profiles)]
    return {"name": name, "mode": mode, "dtype": dtype, "shape": _shape(shape), "limits": limits}


def _shape(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size.strip()]


def _fused_attention(layers: Sequence[Mapping[str, Any]]) -> dict[int, bool]:
    """Return whether one kernel computes an encoder layer's attention, in every profile."""
    fused: dict[int, bool] = {}
    for nodes in (layer["nodes"] for layer in layers):
        for number in {n for name in nodes if (n := layer_of(name)) is not None}:
            parts = [node_name(layer_path(number, part), kind) for part, kind in FUSED]
            if parts[1] in nodes:  # the softmax tells which kernel it is
                fused[number] = fused.get(number, True) and set(parts) <= set(nodes)
    return fused
