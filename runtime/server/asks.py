"""A request's body, in any dialect -> what it asks for. All that is wrong is told at once.

`documents` are ids of the store in every form that clients send; null stands for a field that is
not there; fields that are not known are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .refusals import Fault, Refusal

MAX_FAULTS = 100  # that are noted: millions of them would take gigabytes
SCHEME = "edje://"  # how an id is written where a client wants a URL

_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Ask:
    """What a body asks for.

    Attributes:
        query: text.
        ids: candidates, in the order given.
        top_n: None: all.
        raw: logits are wanted, not their sigmoid.
        echo: documents are wanted back.
        model: as the client names it; the answer says the same.
    """

    query: str = ""
    ids: Sequence[str] = ()
    top_n: int | None = None
    raw: bool = False
    echo: bool = False
    model: str | None = None
    faults: list[Fault] = field(default_factory=list)

    def check(self) -> None:
        """Raise a Refusal that names everything that is wrong."""
        if self.faults:
            message = "; ".join(
                f"{'.'.join(map(str, fault.where))}: {fault.message}" for fault in self.faults[:3]
            )
            if len(self.faults) > 3:
                message += f"; and {len(self.faults) - 3} more"
            raise Refusal(422, message, self.faults)


def read_body(raw: bytes) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        Refusal: 400 for what is empty or no JSON, 422 for JSON of another kind.
    """
    if not raw.strip():
        raise Refusal(400, "the body is empty, expected a JSON object", reason="malformed")
    try:
        body = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", reason="malformed") from None
    if not isinstance(body, dict):
        kind = _kind(body)
        raise Refusal(422, f"the body is {kind}, expected a JSON object", reason="malformed")
    return body


class Fields:
    """The fields of a body, read into an `Ask`; faults are noted there."""

    def __init__(self, body: dict[str, Any], pattern: re.Pattern[str] | None = None):
        """`pattern`: finds the id in a document's text; its first group, or all of it."""
        self._body = body
        self._pattern = pattern
        self.ask = Ask()

    def query(self, value: Any, *where: str | int) -> str:
        """Read a query: text, `{"text": ...}`, or a list of one."""
        if isinstance(value, dict):
            value, where = value.get("text"), (*where, "text")
        if isinstance(value, str) and value.strip():
            self.ask.query = value
            return value
        self._refuse(where, value, "some text")
        return ""

    def documents(self, value: Any, name: str) -> list[str]:
        """Read candidates: ids in any form, one or a list."""
        if isinstance(value, str | dict):
            value = [value]
        if not isinstance(value, list):
            self._refuse((name,), value, "a list of ids")
            return []
        if not value:
            self.ask.faults.append(Fault((name,), "is empty, expected one id or more"))
            return []
        if self._pattern is None and set(map(type, value)) == {str}:
            self.ask.ids = ids = value
            if SCHEME in "".join(value):  # a fifth of the time of asking each
                self.ask.ids = ids = [one.removeprefix(SCHEME) for one in value]
        else:
            self.ask.ids = ids = []
            for at, one in enumerate(value):
                ids.append(self._id(one, name, at))
                if len(self.ask.faults) >= MAX_FAULTS:
                    break
        return ids

    def count(self, *names: str) -> int | None:
        """Read how many are wanted: the first of some names; null and 0 are all."""
        for name in names:
            value = self._body.get(name)
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # JSON has one kind of number, and some clients write 3.0
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                self._refuse((name,), value, "a whole number, or null for all")
                return None
            self.ask.top_n = value or None
            return self.ask.top_n
        return None

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Read true or false; older RAGFlow sends them as text."""
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if not isinstance(value, bool):
            self._refuse((name,), value, "true or false")
            return default
        return value

    def text(self, name: str) -> str | None:
        """Read a string."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, str):
            self._refuse((name,), value, "a string")
            return None
        return value

    def _id(self, value: Any, name: str, at: int) -> str:
        """Return the id in a document."""
        text = _text_of(value)
        if text is None:
            shape = 'an id, {"id"}, {"text"}, {"image": "edje://ID"} or content parts'
            self._refuse((name, at), value, shape)
            return ""
        if text.startswith(SCHEME):
            return text.removeprefix(SCHEME)
        found = None if self._pattern is None else self._pattern.search(text)
        if found is None:
            return text
        return str(found[1] if found.re.groups else found[0])

    def _refuse(self, where: tuple[str | int, ...], value: Any, expected: str) -> None:
        got = "is missing" if value is None else f"is {_kind(value)}"
        self.ask.faults.append(Fault(where, f"{got}, expected {expected}"))


def _text_of(value: Any) -> str | None:
    """Return what a document says, wherever clients put it."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return None
    for name in ("id", "image", "url", "text"):
        found = value.get(name)
        if isinstance(found, str):
            return found
    for name in ("image_url", "document", "content", "multi_modal"):
        found = value.get(name)
        for part in found if isinstance(found, list) else [found]:
            text = _text_of(part)
            if text is not None:
                return text
    return None


def _kind(value: Any) -> str:
    """Name a JSON value, short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
