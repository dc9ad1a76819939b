"""Progress and messages of the command line, on stderr."""

import os
import sys
import time

from jaxad.interruption import check
from jaxad.text import printable

LINE_SECONDS = 5.0
"""Seconds between two lines of progress if stderr is not a terminal."""

_silent: list[bool] = []


def be_silent() -> None:
    """Suppresses all messages and progress of this process; one of several processes reports for all."""
    _silent.append(True)


def say(line: str) -> None:
    """Prints a line and flushes it."""
    if not _silent:
        write_line(line)


def write_line(line: str) -> None:
    """Prints a line to stderr, control characters escaped. Where that fails, messages end, and the work goes on."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


class Bars:
    """Progress on stderr: a bar with rate and time left for each stage, or plain lines if stderr is not a terminal."""

    def __init__(self, title: str, unit: str = "images", scale: float = 1) -> None:
        self._title, self._unit, self._scale = title, unit, scale
        self._stage, self._stage_start, self._last_line = "", 0.0, time.monotonic()
        self._bars = None
        if sys.stderr.isatty() and not _silent:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            columns = (
                SpinnerColumn(),
                TextColumn(printable(title).replace("{", "{{").replace("}", "}}"), markup=False),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[pace]}"),
            )
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "Bars":
        if self._bars is not None:
            self._bars.start()
            self._task = self._bars.add_task("prepare", total=None, pace="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Reports that `done` of `total` items of a stage are finished; a total of 0 means unknown."""
        check()
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_start = stage, now
            if self._bars is not None:
                self._bars.remove_task(self._task)
                self._task = self._bars.add_task(stage, total=total or None, pace="")
        pace = f"{done / self._scale:.0f}/{total / self._scale:.0f} {self._unit}" if total else ""
        if done and now > self._stage_start:
            rate = done / (now - self._stage_start)
            pace += f", {rate / self._scale:.1f} {self._unit}/s, {_duration((total - done) / rate)} left"
        if self._bars is not None:
            self._bars.update(self._task, completed=done, pace=pace)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            say(f"{self._title} {stage}: {pace or '...'}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
