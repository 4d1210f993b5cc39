"""Progress bars for long work: on a terminal or in a notebook, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar(Protocol):
    """What long work reports to: steps done, and a few words on how it goes."""

    def __call__(self, done: int, status: str = "") -> None:
        """Show that `done` steps are done."""
        ...


@contextmanager
def progress_bar(total: int, label: str, show: bool | None) -> Iterator[Bar]:
    """Show a bar that fills over a block.

    Arguments:
        total: Steps in all.
        label: What is being done.
        show: Whether to show it; None shows it where somebody is looking.
    """
    if show is None:
        show = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not show:
        yield lambda done, status="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=5) as progress:
        task = progress.add_task(label, total=total, status="")
        shown = time.monotonic()

        def bar(done: int, status: str = "") -> None:
            nonlocal shown
            now = time.monotonic()
            if done >= total or now - shown > 0.1:
                shown = now
                progress.update(task, completed=done, status=status)

        yield bar
