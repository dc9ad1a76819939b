"""What the command line tells while it works, on stderr."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

LINE_SECONDS = 5.0
"""Between two lines of progress where stderr is no terminal."""


_silent: list[bool] = []


def be_silent() -> None:
    """From now on nothing is told: one of several processes speaks for all."""
    _silent.append(True)


def say(line: str) -> None:
    """Prints a line at once."""
    if not _silent:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C off until the block ends: extension modules that are being imported would garble or swallow it."""
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


_interruptions: list[int] = []


def interrupt(number: int, frame: object) -> None:
    """Handles Ctrl-C: raises KeyboardInterrupt, which `Bars` raises again where a callback of C code swallowed it."""
    del frame
    _interruptions.append(number)
    raise KeyboardInterrupt


class Bars:
    """Progress on stderr: a bar a stage with rate and time left; plain lines now and then where it is no terminal."""

    def __init__(self, title: str, unit: str = "images", scale: float = 1) -> None:
        self._title, self._unit, self._scale = title, unit, scale
        self._what, self._started, self._told = "", 0.0, time.monotonic()
        columns = (
            SpinnerColumn(),
            TextColumn(title),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        told = sys.stderr.isatty() and not _silent
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True) if told else None

    def __enter__(self) -> "Bars":
        if self._bars is not None:
            self._bars.start()
            self._task = self._bars.add_task("prepare", total=None, pace="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` (0: unknown) of that stage."""
        if _interruptions:
            raise KeyboardInterrupt
        now = time.monotonic()
        if what != self._what:
            self._what, self._started = what, now
            if self._bars is not None:
                self._bars.remove_task(self._task)
                self._task = self._bars.add_task(what, total=total or None, pace="")
        pace = f"{done / self._scale:.0f}/{total / self._scale:.0f} {self._unit}" if total else ""
        if done and now > self._started:
            rate = done / (now - self._started)
            pace += f", {rate / self._scale:.1f} {self._unit}/s, {_duration((total - done) / rate)} left"
        if self._bars is not None:
            self._bars.update(self._task, completed=done, pace=pace)
        elif now - self._told >= LINE_SECONDS:
            self._told = now
            say(f"{self._title} {what}: {pace or '...'}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
