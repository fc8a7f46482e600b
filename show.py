"""How the package shows things: progress and notes on stderr, tables and JSON on stdout.

`--quiet` leaves progress and notes out. rich is imported when something is drawn with it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .arguments import Progress

if TYPE_CHECKING:
    from rich.console import Console

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
FILE_WIDTH = 160  # columns of a table that goes to a file or a pipe

_quiet = False


def speak() -> None:
    """Begin a run that tells everything."""
    global _quiet
    _quiet = False


def be_quiet(wanted: bool) -> None:
    """Turn progress and notes off for the rest of this run."""
    global _quiet
    _quiet = _quiet or wanted


def note(message: str, say: Callable[[str], None] | None = None) -> None:
    """Tell the user something beside the result, unless `--quiet` was given.

    Args:
        say: writes it; None: `warn`, which waits for whoever reads stderr.
    """
    if not _quiet:
        (say or warn)(message)


def warn(message: str) -> None:
    """Tell the user what is wrong with the result."""
    print(f"edje: {message}", file=sys.stderr)


def print_json(values: Any) -> None:
    """Write one JSON document to stdout; in ASCII where stdout cannot encode what it holds."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(values, indent=2)
    print(text)


def make_screen(*, stderr: bool = False) -> Console:
    """Return a console that leaves a reader's departure to the caller: rich ends the process."""
    from rich.console import Console

    class Screen(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Screen(stderr=stderr)


@contextmanager
def progress_bar(
    description: str, *, text: Callable[[float], str] | None = None
) -> Iterator[Progress]:
    """Yield `update(done, total)`, shown as a bar on stderr.

    `text` gives what stands beside the counts, from the speed a second.
    """
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        *([rich.TextColumn("{task.fields[text]}")] if text else []),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=make_screen(stderr=True), disable=_quiet) as bar:
        task = bar.add_task(description, total=None, text="")

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if text:
                bar.update(task, text=text(bar.tasks[0].speed or 0.0))

        yield update


@contextmanager
def progress_steps(description: str) -> Iterator[Callable[[str], None]]:
    """Yield `show(step)`: names the step at work, with a clock, on a terminal's stderr."""
    from rich import progress as rich

    screen = make_screen(stderr=True)
    spinner = rich.SpinnerColumn("line" if screen.options.ascii_only else "dots")
    columns = (spinner, rich.TextColumn("{task.description}"), rich.TimeElapsedColumn())
    disable = _quiet or not screen.is_terminal
    with rich.Progress(*columns, console=screen, transient=True, disable=disable) as steps:
        task = steps.add_task(description, total=None)
        yield lambda step: steps.update(task, description=f"{description}: {step}")


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Write name/value lines to stdout under a title."""
    print_table(title, ("", ""), [(name, _shown(value)) for name, value in facts.items()])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "; ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def escaped(text: str) -> str:
    """Return `text` on one line and without commands to a terminal: `\\n`, `\\x1b`."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout; the last column folds, the others never."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(header), box=None)
    for name in header[:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(header[-1], overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: ids may hold rich's markup
    screen = make_screen()
    if not screen.is_terminal:
        screen.width = FILE_WIDTH
    screen.print(Text(title, style="bold"))
    screen.print(table)
    screen.print()
