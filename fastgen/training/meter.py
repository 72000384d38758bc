"""Where a run stands, on stderr: a progress bar on a terminal, lines elsewhere, nothing from processes that follow."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Meter(Protocol):
    """Shows where a run stands, and passes on lines about it."""

    def update(self, step: int, figures: str) -> None:
        """Show that `step` steps are done."""

    def note(self, text: str) -> None:
        """Show a line that stays."""


@contextmanager
def shown_meter(steps: int, *, leads: bool) -> Iterator[Meter]:
    """Yield the meter of a run of `steps` steps, for the process that `leads` or one that does not."""
    if not leads:
        yield _Silent()
    elif not sys.stderr.isatty():
        yield _Lines(steps)
    else:
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn(),
                   TextColumn("{task.description}"))  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _Bar(bar, bar.add_task("", total=steps))


class _Silent:
    """The meter of a process that does not lead."""

    def update(self, step: int, figures: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Lines(_Silent):
    """Plain lines, at most one in some seconds."""

    SECONDS = 5.0

    def __init__(self, steps: int) -> None:
        self._steps, self._shown = steps, time.perf_counter()

    def update(self, step: int, figures: str) -> None:
        if time.perf_counter() - self._shown > self.SECONDS or step == self._steps:
            self._shown = time.perf_counter()
            self.note(f"step {step}/{self._steps}  {figures}")

    def note(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class _Bar(_Silent):
    """A progress bar of rich, with lines above it."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def update(self, step: int, figures: str) -> None:
        self._bar.update(self._task, completed=step, description=figures)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)
