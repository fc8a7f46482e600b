"""KServe's open inference protocol, version 2: JSON tensors, and the binary extension.

Inputs: `QUERY` BYTES [1], and `IDS` BYTES [N] or `ROWS` INT64 [N] (rows of the store). Outputs:
`SCORES` FP32 [N], raw logits in the order sent, NaN where there is none (JSON: null). With binary
inputs and outputs nothing of it is parsed number by number: the route for thousands of candidates.

Parameters of a request, all optional: `unknown_ids` (error, lowest, skip), `allow_partial`, and
`details`, which lets the answer's parameters tell why a score is NaN (`missing`, `damaged`:
positions with commas) and what became of the query (`num_wordpieces`, `truncated`).

Source: KServe "Open Inference Protocol", Triton's extension "Binary Tensor Data".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, get_args

import msgspec
import numpy as np

from ...arrays import Float32, Int64
from ..results import Fault as Missed
from .answers import Answer, Unknown
from .asks import read_body
from .refusals import Fault, Refusal

HEADER_LENGTH = "inference-header-content-length"
MAX_DIMENSIONS = 8  # a product of millions of numbers would take minutes
INPUTS: Sequence[Mapping[str, Any]] = (
    {"name": "QUERY", "datatype": "BYTES", "shape": [1]},
    {"name": "IDS", "datatype": "BYTES", "shape": [-1]},
    {"name": "ROWS", "datatype": "INT64", "shape": [-1]},
)
OUTPUTS: Sequence[Mapping[str, Any]] = ({"name": "SCORES", "datatype": "FP32", "shape": [-1]},)

_encode = msgspec.json.Encoder().encode
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class InferRequest:
    """What an inference request asks for.

    Attributes:
        id: of the request, told back.
        candidates: ids, or int64 [N] rows of the store.
        binary: the scores go out as bytes.
        unknown: what ids do that the store lacks; None: as the server does.
        partial: an answer without a shard that is down will do.
        details: the answer tells why scores are missing.
    """

    id: str
    query: str
    candidates: list[str] | Int64
    binary: bool
    unknown: Unknown | None = None
    partial: bool = False
    details: bool = False


def is_kserve(path: str) -> bool:
    """Whether a route is the protocol's: its clients read errors as a sentence."""
    return path == "/v2" or path.startswith(("/v2/models/", "/v2/health/"))


def read_infer(raw: bytes, header_length: str | None) -> InferRequest:
    """Read the body of an inference request.

    Args:
        header_length: of the header `Inference-Header-Content-Length`: where binary data begins.

    Raises:
        Refusal: it is not one; everything that is wrong is named.
    """
    data = b""
    if header_length is not None:
        digits = header_length.isascii() and header_length.isdigit() and len(header_length) < 20
        if not digits or int(header_length) > len(raw):
            raise Refusal(400, f"{HEADER_LENGTH} is {header_length[:40]!r}, expected a length")
        raw, data = raw[: int(header_length)], raw[int(header_length) :]
    body = read_body(raw)
    inputs = body.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(one, dict) for one in inputs):
        raise _refused([Fault(("inputs",), "is no list of tensors")])
    faults: list[Fault] = []
    tensors: dict[str, Any] = {}
    at = 0
    for number, one in enumerate(inputs):
        name = one.get("name")
        try:
            tensors[name], at = _values(one, data, at)
        except (ValueError, TypeError, OverflowError, struct.error, UnicodeDecodeError) as error:
            faults.append(Fault(("inputs", number), f"{name!r:.40}: {error}"))
    query, ids, rows = (tensors.get(name) for name in ("QUERY", "IDS", "ROWS"))
    if not faults:
        if not isinstance(query, list) or len(query) != 1:
            faults.append(Fault(("inputs", "QUERY"), "expected BYTES [1]"))
        if (ids is None) == (rows is None):
            faults.append(Fault(("inputs", "IDS"), "expected IDS BYTES [N] or ROWS INT64 [N]"))
        if ids is not None and not isinstance(ids, list):
            faults.append(Fault(("inputs", "IDS"), "expected BYTES [N]"))
        if rows is not None and not isinstance(rows, np.ndarray):
            faults.append(Fault(("inputs", "ROWS"), "expected INT64 [N]"))
    parameters = body.get("parameters")
    own: dict[str, Any] = parameters if isinstance(parameters, dict) else {}
    unknown = own.get("unknown_ids")
    if unknown is not None and unknown not in get_args(Unknown):
        expected = " or ".join(get_args(Unknown))
        faults.append(Fault(("parameters", "unknown_ids"), f"expected {expected}"))
    if faults:
        raise _refused(faults)
    assert isinstance(query, list)
    candidates: Any = rows if ids is None else ids
    identity = body.get("id")
    return InferRequest(
        identity if isinstance(identity, str) else "",
        query[0],
        candidates,
        _wants_binary(body),
        unknown,
        own.get("allow_partial") is True,
        own.get("details") is True,
    )


def write_infer(request: InferRequest, answer: Answer, model: str) -> tuple[bytes, dict[str, str]]:
    """Return the body of the answer, and the headers that it needs."""
    scores: Float32 = np.full(answer.num_asked, np.nan, np.float32)
    scores[answer.order] = answer.logits
    scores[~np.isfinite(scores)] = np.nan
    output: dict[str, Any] = {"name": "SCORES", "datatype": "FP32", "shape": [len(scores)]}
    body: dict[str, Any] = {"model_name": model, "model_version": "1", "outputs": [output]}
    if request.id:
        body["id"] = request.id
    if request.details:
        body["parameters"] = {
            "num_wordpieces": answer.num_wordpieces,
            "truncated": answer.truncated,
            "missing": _positions(answer.missing),
            "damaged": _positions(answer.errors),
        }
    if not request.binary:
        output["data"] = [None if value != value else value for value in scores.tolist()]
        return _encode(body), {}
    output["parameters"] = {"binary_data_size": scores.nbytes}
    head = _encode(body)
    return head + scores.astype("<f4").tobytes(), {
        HEADER_LENGTH: str(len(head)),
        "content-type": "application/octet-stream",
    }


def _values(tensor: dict[str, Any], data: bytes, at: int) -> tuple[list[str] | Int64, int]:
    """Return the values of a tensor, and where the next one's binary data begins."""
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"its shape is {shape!r:.40}, expected {MAX_DIMENSIONS} numbers at most")
    if not all(type(one) is int and 0 <= one < 1 << 63 for one in shape):
        raise ValueError(f"its shape is {shape!r:.40}, expected whole numbers")
    if datatype not in ("BYTES", "INT64"):
        raise ValueError(f"its datatype is {datatype!r:.40}, expected BYTES or INT64")
    number = prod(shape)
    parameters = tensor.get("parameters") or {}
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        values = tensor.get("data")
        if not isinstance(values, list) or len(values) != number:
            raise ValueError(f"its data is no list of {number} values")
        if datatype == "INT64":
            return _whole(values), at
        if not set(map(type, values)) <= {str}:
            raise ValueError("its data is no list of strings")
        return values, at
    if type(size) is not int or not 0 <= size <= len(data) - at:
        raise ValueError(f"binary_data_size is {size!r:.40}, {len(data) - at} bytes are left")
    part = data[at : at + size]
    if datatype == "INT64":
        if size != 8 * number:
            raise ValueError(f"binary_data_size is {size}, expected {8 * number}")
        return np.frombuffer(part, "<i8").astype(np.int64), at + size
    return _texts(part, number), at + size


def _whole(values: list[Any]) -> Int64:
    if not set(map(type, values)) <= {int}:
        raise ValueError("its data is no list of whole numbers")
    return np.array(values, np.int64)


def _texts(part: bytes, number: int) -> list[str]:
    """Read BYTES elements: each has its length before it, as 4 bytes."""
    texts, at = [], 0
    for _ in range(number):
        (length,) = _LENGTH.unpack_from(part, at)
        at += 4
        if at + length > len(part):
            raise ValueError("an element reaches beyond its tensor")
        texts.append(part[at : at + length].decode())
        at += length
    if at != len(part):
        raise ValueError(f"{len(part) - at} bytes are left behind its {number} elements")
    return texts


def _wants_binary(body: dict[str, Any]) -> bool:
    """Whether the output, or all outputs, shall be binary."""
    outputs, own = body.get("outputs"), body.get("parameters")
    if isinstance(outputs, list) and outputs and isinstance(outputs[0], dict):
        found = outputs[0].get("parameters")
        if isinstance(found, dict) and "binary_data" in found:
            return bool(found["binary_data"])
    return isinstance(own, dict) and bool(own.get("binary_data_output"))


def _positions(faults: Sequence[Missed]) -> str:
    return ",".join(str(fault.index) for fault in faults)


def _refused(faults: Sequence[Fault]) -> Refusal:
    message = "; ".join(f"{'.'.join(map(str, one.where))}: {one.message}" for one in faults[:3])
    return Refusal(422, message, faults)
