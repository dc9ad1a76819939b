"""The entry point: `jaxad fit | score | evaluate | benchmark | estimate | report | list | weights`.

Tables go to stdout, everything else to stderr. A user's mistake is one line and exit code 2 (`JAXAD_DEBUG=1` shows the
traceback), an interruption one line and exit code 130. Only commands that need JAX import it.
"""

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

import jaxad
from jaxad.driver import distributed
from jaxad.progress import interrupt, say, uninterrupted

COMMANDS = {
    "fit": "Learn from normal images.",
    "score": "Score images with a fitted run; heat maps on request.",
    "evaluate": "Score the test images of fitted runs, print the metrics and keep them for the report.",
    "benchmark": "Fit and evaluate several methods on every category, side by side.",
    "estimate": "Print how much memory a fit needs, without fitting.",
    "report": "Write one HTML page about fitted and evaluated runs.",
    "list": "List the methods and backbones.",
    "weights": "Manage pretrained weights: list, fetch NAME, import FILE.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is for tests."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # XLA calls it from all of its own threads at once
    if argv is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        signal.signal(signal.SIGINT, interrupt)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _dispatch(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except MemoryError as error:
        return refuse(_too_large(error))
    except RuntimeError as error:
        if distributed.joined() and type(error).__name__ == "JaxRuntimeError":  # a collective operation broke off
            distributed.exit_after_lost_process()
        if any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "bad_alloc", "Out of memory")):
            return refuse(_too_large(error))
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        return refuse(error)


def refuse(error: ValueError | OSError) -> int:
    """Prints in one line what is wrong with the input, and returns the exit code; with JAXAD_DEBUG raises the error."""
    if os.environ.get("JAXAD_DEBUG"):
        raise error
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return _fail(f"error: {' '.join(message.split())}", 2)


def _too_large(error: MemoryError | RuntimeError) -> ValueError:
    reason = str(error).partition("\n")[0] or "out of memory"
    line = f"not enough memory ({reason}): set a smaller --batch-size or --image-size, or use fewer images at once"
    return ValueError(line).with_traceback(error.__traceback__)


def _dispatch(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:<10} {summary}" for command, summary in COMMANDS.items()]
        print("usage: jaxad COMMAND [OPTIONS]\n", jaxad.__doc__, "", *lines, sep="\n")
        print("\n`jaxad COMMAND --help` shows the options of a command. Try: jaxad benchmark demo --methods patchcore")
    elif name == "--version":
        print(f"jaxad {jaxad.__version__}")
    elif name == "list":
        from jaxad.cli.listing import list_methods

        list_methods(rest)
    elif name in COMMANDS:
        with uninterrupted():
            commands = importlib.import_module("jaxad.cli.commands")
        return commands.run(name, rest)
    else:
        return _fail(f"error: no command {name!r}: choose one of {', '.join(COMMANDS)}", 2)
    return 0


def _show_warning(message: Warning | str, *_: object) -> None:
    say(f"jaxad: warning: {message}")


def _fail(message: str, code: int) -> int:
    print(f"jaxad: {message}", file=sys.stderr, flush=True)
    if distributed.joined():
        distributed.end(code)  # at exit JAX would wait for the other processes
    return code


if __name__ == "__main__":
    sys.exit(main())
