"""What the command line tells beside its results, on stderr; `--quiet` leaves the notes out."""

from __future__ import annotations

import sys

_quiet = False


def speak() -> None:
    """Begin a run that tells everything."""
    global _quiet
    _quiet = False


def be_quiet(wanted: bool) -> None:
    """Turn progress and notes off for the rest of this run."""
    global _quiet
    _quiet = _quiet or wanted


def is_quiet() -> bool:
    """Return whether `--quiet` was given."""
    return _quiet


def note(message: str) -> None:
    """Tell the user something beside the result; `--quiet` leaves it out."""
    if not _quiet:
        warn(message)


def warn(message: str) -> None:
    """Tell the user what is wrong with the result."""
    print(f"edje: {message}", file=sys.stderr)
