"""What decoders of images say besides their result: libtiff's errors by thread, and no warnings of Pillow.

Neither names the file. libtiff writes to stderr itself, also about damage behind which Pillow reads on.
"""

import contextlib
import ctypes
import threading
import warnings
from collections.abc import Iterator

import PIL._imaging

warnings.filterwarnings("ignore", module=r"PIL\.")

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
_local = threading.local()


@contextlib.contextmanager
def libtiff_errors() -> Iterator[list[str]]:
    """Collects what libtiff finds wrong with the files that this thread decodes in the block; blocks may be nested."""
    outer = getattr(_local, "messages", None)
    _local.messages = messages = []
    try:
        yield messages
    finally:
        _local.messages = outer


@_Handler
def _collect(module: bytes | None, pattern: bytes, arguments: int) -> None:
    messages = getattr(_local, "messages", None)
    if messages is not None:
        text = ctypes.create_string_buffer(200)
        ctypes.pythonapi.PyOS_vsnprintf(text, len(text), pattern, ctypes.c_void_p(arguments))
        name = f"{module.decode(errors='replace')}: " if module else ""
        messages.append(name + text.value.decode(errors="replace").strip())


with contextlib.suppress(AttributeError, OSError):  # where Pillow hides its libtiff or has none
    _libtiff = ctypes.CDLL(PIL._imaging.__file__)
    _libtiff.TIFFSetErrorHandler(_collect)
    _libtiff.TIFFSetWarningHandler(None)
