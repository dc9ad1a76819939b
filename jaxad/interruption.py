"""Ctrl-C and SIGTERM on the command line: one line and an exit code, whatever runs; nothing unfinished stays behind.

A handler that raises is no help: callbacks of compiled code swallow its exception, XLA lets none through while it
compiles, and its threads crash the shutdown. Here a thread waits for the signal and ends the process. Work
that has something to undo first gets `GRACE_SECONDS` to notice by itself (`check`).
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

GRACE_SECONDS = 3.0
STDERR = 2
"""Not `sys.stderr`, which may be a buffer while options are parsed."""
LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

_received: list[int] = []
_to_undo: list[Callable[[], object]] = []
_whole = threading.RLock()


def watch() -> None:
    """Begins to wait for the signals; called by the main thread, as early as possible."""
    if signal.getsignal(signal.SIGINT) is _nothing:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(reader,), daemon=True).start()
    for number in LINES:
        signal.signal(number, _nothing)


def ignore() -> None:
    """Ends the wait: the work is done, and signals change its exit code no more."""
    for number in LINES:
        signal.signal(number, signal.SIG_IGN)


def check() -> None:
    """Raises KeyboardInterrupt if a signal has come."""
    if _received:
        raise KeyboardInterrupt


def end_if_received() -> None:
    """Ends the process if a signal has come."""
    if _received:
        _end(_received[0])


@contextlib.contextmanager
def undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Calls `undo` if the block fails, or if the process ends within it."""
    _to_undo.append(undo)
    try:
        yield
    except BaseException:
        undo()
        raise
    finally:
        _to_undo.remove(undo)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """A block within which the process does not end."""
    with _whole:
        yield


def _nothing(*_: object) -> None:
    """Without a handler in Python, no number is written."""


def _wait(reader: int) -> None:
    while (number := os.read(reader, 1)[0]) not in LINES:
        pass
    _received.append(number)
    deadline = time.monotonic() + GRACE_SECONDS
    while _to_undo and time.monotonic() < deadline:
        time.sleep(0.02)
    _end(number)


def _end(number: int) -> NoReturn:
    with _whole:
        for undo in reversed(_to_undo):
            with contextlib.suppress(Exception):
                undo()
        with contextlib.suppress(Exception):
            cursor = "\x1b[?25h\n" if os.isatty(STDERR) else ""
            os.write(STDERR, f"{cursor}jaxad: {LINES[signal.Signals(number)]}\n".encode())
        os._exit(128 + number)
