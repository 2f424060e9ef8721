"""What the user sees of long work: a live line on a terminal, plain lines elsewhere, nothing beside JSON.

Results go to stdout, progress and errors to stderr. rich is imported only where it draws something: `ingot run` is
started often and must start fast.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """How a build tells where it is."""

    def stage(self, name: str, total: int | None = None) -> contextlib.AbstractContextManager[None]:
        """A stage of the work, in order; `total` is its number of steps if known. Stages do not nest."""
        ...

    def update(self, item: str, advance: int = 0) -> None:
        """Say what is at hand inside the stage (an engine, a shard), and that `advance` more steps are done."""
        ...

    def log(self, text: str) -> None:
        """A line worth keeping."""
        ...


class SilentProgress:
    """Says nothing: for `--json` and for builds from Python."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """See `Progress`."""
        yield

    def update(self, item: str, advance: int = 0) -> None:
        """See `Progress`."""

    def log(self, text: str) -> None:
        """See `Progress`."""


class PlainProgress:
    """One line when a stage starts, one per item, one with the time at its end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._begin = time.monotonic()
        self._stage, self._item, self._done = "", "", 0
        self._total: int | None = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """See `Progress`."""
        begin = time.monotonic()
        self._stage, self._total, self._done, self._item = name, total, 0, ""
        self._line(f"{name} …")
        yield
        self._line(f"{name} done in {time.monotonic() - begin:.1f} s")
        self._stage = ""

    def update(self, item: str, advance: int = 0) -> None:
        """See `Progress`."""
        self._done += advance
        if item and item != self._item:
            self._item = item
            count = f" ({self._done}/{self._total})" if self._total else ""
            self._line(f"{self._stage}: {item}{count}" if self._stage else item)

    def log(self, text: str) -> None:
        """See `Progress`."""
        self._line(text)

    def _line(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:6.1f} s] {printable(text)}", file=self._stream, flush=True)


class LiveProgress:
    """One live line with spinner, stage, item, count and elapsed time; finished stages scroll up."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Display

        self._console = Console(stderr=True, highlight=False)
        self._display = Display(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[item]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> LiveProgress:
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """See `Progress`."""
        begin = time.monotonic()
        self._task = self._display.add_task(printable(name), total=total, item="")
        try:
            yield
            self.log(f"✓ {name} {time.monotonic() - begin:.1f} s")
        finally:
            self._display.remove_task(self._task)
            self._task = None

    def update(self, item: str, advance: int = 0) -> None:
        """See `Progress`."""
        if self._task is not None:
            self._display.update(self._task, advance=advance, item=printable(item))

    def log(self, text: str) -> None:
        """See `Progress`."""
        self._display.console.print(printable(text), markup=False)


@contextlib.contextmanager
def open_progress(silent: bool = False) -> Iterator[Progress]:
    """The progress that fits stderr: live on a terminal, plain lines elsewhere, nothing if `silent`."""
    if silent:
        yield SilentProgress()
    elif sys.stderr.isatty():
        with LiveProgress() as live:
            yield live
    else:
        yield PlainProgress()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout: framed on a terminal, tab-free aligned text elsewhere. Numbers stand on the right."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(printable(title)), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for name, is_number in zip(columns, right):
            table.add_column(name, justify="right" if is_number else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    print(printable(title))
    for row in [list(columns), *cells]:
        parts = (text.rjust(w) if number else text.ljust(w) for text, w, number in zip(row, widths, right))
        print("  " + "  ".join(parts).rstrip())
    print()


def printable(text: str) -> str:
    """`text` with control characters escaped, so that a file's content cannot steer the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def size_text(size: float) -> str:
    """Bytes in words: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
