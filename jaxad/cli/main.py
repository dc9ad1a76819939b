"""The entry point: `jaxad fit | score | evaluate | benchmark | estimate | threshold | report | list | weights`.

Tables go to stdout, everything else to stderr. A user's mistake is one line and exit code 2 (`JAXAD_DEBUG=1` shows the
traceback), an interruption one line and exit code 130. Only commands that need JAX import it.
"""

import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

import jaxad
from jaxad import interruption, streams
from jaxad.driver import distributed
from jaxad.progress import say, write_line

COMMANDS = {
    "fit": "Learn from normal images.",
    "score": "Score images with a fitted run; heat maps on request.",
    "evaluate": "Score the test images of fitted runs, print the metrics and keep them for the report.",
    "benchmark": "Fit and evaluate several methods on every category, side by side.",
    "estimate": "Print how much memory a fit needs, without fitting.",
    "threshold": "Set the thresholds of a fitted run by hand.",
    "report": "Write one HTML page about fitted and evaluated runs.",
    "list": "List the methods and backbones.",
    "weights": "Manage pretrained weights: list, fetch NAME, import FILE.",
}

LONGEST_LINE = 5000
"""Characters of an error; of a longer one, which quotes damage, the beginning and the end are shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is for tests."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # XLA calls it from all of its own threads at once
    if argv is None:
        interruption.watch()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return _dispatch(arguments)
            finally:
                sys.stdout.flush()
    except KeyboardInterrupt:
        interruption.end_if_received()
        return _fail("interrupted", 128 + signal.SIGINT)
    except MemoryError as error:
        return refuse(_too_large(error))
    except (RuntimeError, AssertionError) as error:
        if distributed.joined() and type(error).__name__ == "JaxRuntimeError":  # a collective operation broke off
            distributed.exit_after_lost_process()
        if any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "bad_alloc", "Out of memory")):
            return refuse(_too_large(error))
        if missing := _missing_device():
            return refuse(ValueError(missing))
        raise
    except BrokenPipeError:
        streams.discard(sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename == "stdout":
            streams.discard(sys.stdout.fileno())
        return refuse(error)
    finally:
        interruption.end_if_received()


def refuse(error: ValueError | OSError) -> int:
    """Prints in one line what is wrong with the input, and returns the exit code; with JAXAD_DEBUG raises the error."""
    if os.environ.get("JAXAD_DEBUG"):
        raise error
    return _fail(f"error: {one_line(error)}", 2)


def one_line(error: Exception) -> str:
    """What is wrong, in one line."""
    message = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    line = " ".join(message.split())
    return line if len(line) < LONGEST_LINE else f"{line[:200]} ... {line[-200:]}"


def _too_large(error: Exception) -> ValueError:
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
        from jaxad.cli.options import arguments

        function, parsed = arguments(name, rest)
        commands = importlib.import_module("jaxad.cli.commands")
        from jaxad.backbones.store import programs_dir
        from jaxad.driver.program import keep_compiled

        keep_compiled(programs_dir())
        if not os.environ.get("JAXAD_DEBUG"):
            for library in ("absl", "matplotlib"):
                logging.getLogger(library).setLevel(logging.CRITICAL)  # they raise what concerns users
        return commands.run(function, rest, parsed)
    else:
        return _fail(f"error: no command {name!r}: choose one of {', '.join(COMMANDS)}", 2)
    return 0


def _missing_device() -> str | None:
    """What is wrong with JAX_PLATFORMS, if that is why JAX does not start."""
    jax = sys.modules.get("jax")
    if jax is None or not (platforms := jax.config.jax_platforms):
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(" (set JAX_PLATFORMS")[0]
        words = f"JAX_PLATFORMS is {platforms}, but JAX finds no such device on this machine"
        return f"{words}{reason and f' ({reason})'}: unset it, or install JAX for it"
    return None


def _show_warning(message: Warning | str, *_: object) -> None:
    say(f"jaxad: warning: {message}")


def _fail(message: str, code: int) -> int:
    write_line(f"jaxad: {message}")
    if distributed.joined():
        distributed.end(code)  # at exit JAX would wait for the other processes
    return code


if __name__ == "__main__":
    sys.exit(main())
