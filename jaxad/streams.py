"""Standard streams that cost no work: closed ones lead nowhere, and every console shows every character somehow."""

import codecs
import io
import os
import sys

PLAIN = str.maketrans({"–": "-", "—": "-", "±": "+/-", "×": "x", "…": "...", "†": "*", "→": "->", "≤": "<=", "≥": ">="})
"""What consoles show that do not have these characters."""


class _Output(io.FileIO):
    """A standard stream whose errors say which one it is."""

    def write(self, content) -> int:
        try:
            return super().write(content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "stdout" if self.fileno() == 1 else "stderr") from None


def prepare() -> None:
    """Opens what is closed, so that no other file gets its number, and lets stdout and stderr replace characters."""
    codecs.register_error("plain", _plain)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        encoding = "utf-8" if stream is None else stream.encoding
        raw = _Output(number, "w", closefd=False)
        buffering = raw.isatty() or number == 2
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, "plain", line_buffering=buffering))


def discard(number: int) -> None:
    """Leads a stream that fails nowhere, so that what is still in its buffer does no harm."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that an encoding lacks by similar ones, else by their numbers."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end
