"""Who may ask, and how much at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from hashlib import sha256
from hmac import compare_digest

from .refusals import Refusal

_BEARER = b"bearer "


class Keys:
    """Bearer keys and what each has in flight. Safe from any thread."""

    def __init__(self, keys: Sequence[str], max_pairs: int | None):
        """`max_pairs`: of one key in flight; None: no limit."""
        self._keys = [key.encode() for key in keys]
        self._max_pairs = max_pairs
        self._in_flight: dict[str, int] = {}
        self._counting = threading.Lock()

    def check(self, header: bytes | None) -> str | None:
        """Return a name for the key in an `Authorization` header; None where none is needed.

        It counts with and without `Bearer ` before it, as some clients send it bare. Every key is
        compared in full, so that the time tells nothing.

        Raises:
            Refusal: 401.
        """
        if not self._keys:
            return None
        given = (header or b"").strip()
        if given[: len(_BEARER)].lower() == _BEARER:
            given = given[len(_BEARER) :].strip()
        matches = [compare_digest(given, key) for key in self._keys]
        if not any(matches):
            wrong = "the API key is not known" if given else "an API key is needed"
            headers = {"www-authenticate": "Bearer"}
            raise Refusal(401, wrong, reason="unauthorized", headers=headers)
        return sha256(self._keys[matches.index(True)]).hexdigest()[:8]

    def take(self, name: str | None, num_pairs: int) -> None:
        """Count pairs as in flight.

        Raises:
            Refusal: 429, with them the key would have too many.
        """
        if name is None or self._max_pairs is None:
            return
        with self._counting:
            now = self._in_flight.get(name, 0)
            if now and now + num_pairs > self._max_pairs:
                message = f"this key has {now:,} pairs in flight, {self._max_pairs:,} may be"
                raise Refusal(429, message, reason="key_limit", headers={"retry-after": "1"})
            self._in_flight[name] = now + num_pairs

    def give_back(self, name: str | None, num_pairs: int) -> None:
        """Count pairs as done."""
        if name is None or self._max_pairs is None:
            return
        with self._counting:
            left = self._in_flight.pop(name) - num_pairs
            if left:
                self._in_flight[name] = left
