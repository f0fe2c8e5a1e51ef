"""What is being done now, on standard error; silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from fxcompress.errors import OptionError

__all__ = ["Progress"]


class Progress:
    """A progress bar of named steps.

    Args:
        wanted: ``"auto"`` shows a bar when standard error is a terminal, True always, False never; a function is
            called with ``(done, total, what)`` instead.
        total: number of steps.

    Raises:
        OptionError: ``wanted`` is none of those.
    """

    def __init__(self, wanted: Literal["auto"] | bool | Callable[[int, int, str], None], total: int) -> None:
        if wanted != "auto" and not isinstance(wanted, bool) and not callable(wanted):
            raise OptionError(f"progress={wanted!r}", remedy="use 'auto', True, False, or a function")
        self._call = wanted if callable(wanted) else None
        show = wanted is True or (wanted == "auto" and sys.stderr.isatty())
        self._total = total
        self._done = 0
        self._bar = None
        if show and self._call is None:
            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[told]}", style="dim"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, told="")
            self._part: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, what: str) -> None:
        """The next step begins."""
        if self._call is not None:
            self._call(self._done, self._total, what)
        if self._bar is not None:
            if self._part is not None:
                self._bar.remove_task(self._part)
                self._part = None
            self._bar.update(self._task, description=what, completed=self._done)
        self._done += 1

    def part(self, done: int, total: int, what: str) -> None:
        """How far a long step is, on a line of its own: ``what`` is what it has to tell, a loss for instance."""
        if self._bar is None:
            return
        if self._part is None:
            self._part = self._bar.add_task("", total=total or None, told="")
        self._bar.update(self._part, completed=done, total=total or None, told=what)

    def detail(self, what: str) -> None:
        """What the present step is doing."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)
