"""What a router sends to a shard, and what comes back: KServe's binary inference."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from ....arrays import Float32
from ..kserve import HEADER_LENGTH
from ..refusals import Refusal
from .connections import Reply

_encode, _decode = msgspec.json.Encoder().encode, msgspec.json.Decoder().decode
_LENGTH = struct.Struct("<I").pack
_LENGTHS = [_LENGTH(length) for length in range(512)]
_OUTPUT = {"name": "SCORES", "parameters": {"binary_data": True}}
# Ids that the shard lacks are the router's to judge: it knows the rule, and the other shards.
_PARAMETERS = {"unknown_ids": "skip", "details": True}


@dataclass(frozen=True, slots=True)
class Message:
    """One inference request: `body` begins with `head_length` bytes of JSON."""

    body: bytes
    head_length: int


@dataclass(frozen=True, slots=True)
class Scores:
    """What one shard scored.

    Attributes:
        logits: float32 [N], in the order sent; NaN where there is none.
        missing, damaged: positions without a score, and why.
        num_wordpieces, truncated: of the query, as the shard's tokenizer reads it.
    """

    logits: Float32
    missing: Sequence[int]
    damaged: Sequence[int]
    num_wordpieces: int
    truncated: bool


def message_of(query: bytes, ids: Sequence[bytes]) -> Message:
    """Return the request to score `ids` for `query`, both as UTF-8."""
    packed = _packed(ids)
    head = _encode(
        {
            "inputs": [
                _tensor("QUERY", 1, len(query) + 4),
                _tensor("IDS", len(ids), len(packed)),
            ],
            "outputs": [_OUTPUT],
            "parameters": _PARAMETERS,
        }
    )
    return Message(b"".join((head, _LENGTH(len(query)), query, packed)), len(head))


def scores_of(reply: Reply, number: int) -> Scores:
    """Read the scores of `number` ids out of an answer with status 200.

    Raises:
        Refusal: 502, it is no such answer.
    """
    try:
        length = int(reply.headers[HEADER_LENGTH.encode()])
        body = _decode(reply.body[:length])
        details: dict[str, Any] = body["parameters"]
        logits = np.frombuffer(reply.body, "<f4", offset=length)
        if len(logits) != number:
            raise ValueError(f"{len(logits)} scores for {number} ids")
        return Scores(
            logits.astype(np.float32),
            _positions(details["missing"]),
            _positions(details["damaged"]),
            int(details["num_wordpieces"]),
            bool(details["truncated"]),
        )
    except (KeyError, TypeError, ValueError, msgspec.DecodeError) as error:
        raise Refusal(502, "a shard gave no readable answer", reason="shard", cause=error) from None


def _tensor(name: str, number: int, num_bytes: int) -> dict[str, Any]:
    parameters = {"binary_data_size": num_bytes}
    return {"name": name, "datatype": "BYTES", "shape": [number], "parameters": parameters}


def _packed(texts: Sequence[bytes]) -> bytes:
    """Return BYTES elements: each has its length before it, as 4 bytes."""
    parts: list[bytes] = []
    for text in texts:
        length = len(text)
        parts.append(_LENGTHS[length] if length < len(_LENGTHS) else _LENGTH(length))
        parts.append(text)
    return b"".join(parts)


def _positions(text: str) -> list[int]:
    return [int(one) for one in text.split(",")] if text else []
