"""Several processes: joining them by `jax.distributed`, and ending with one line when another one is lost."""

import ctypes
import os
import signal
import socket
import sys
from typing import NoReturn

LOST = 3
"""Exit code of a process that has lost another."""
HEARTBEAT_SECONDS = 30

_state = {"joined": False, "text": "", "stderr": 2}
_handlers: list[object] = []


def joined() -> bool:
    """Whether this process is one of several."""
    return bool(_state["joined"])


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several; before JAX is used for anything else.

    What is not given is taken from the environment: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, or what a TPU pod, SLURM, Open MPI or Kubernetes tells JAX.

    Args:
        coordinator: HOST:PORT of the process with number 0.
        num_processes: How many there are.
        process_id: The number of this one.

    Raises:
        ValueError: The arguments do not fit together, or the environment says nothing.
        OSError: The coordinator's port is in use.
    """
    import jax

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, number = (
        int(os.environ[name]) if given is None and name in os.environ else given
        for given, name in ((num_processes, "JAX_NUM_PROCESSES"), (process_id, "JAX_PROCESS_ID"))
    )
    told = [value is not None for value in (coordinator, count, number)]
    if any(told[1:]) and not all(told):
        raise ValueError(
            f"--coordinator, --num-processes and --process-id belong together, got {coordinator}, {count} and {number}"
        )
    if coordinator is not None and all(told):
        if ":" not in coordinator or count is None or number is None or not 0 <= number < count:
            raise ValueError(
                f"the coordinator must be HOST:PORT, the process one of 0..N-1, got {coordinator}, {number} of {count}"
            )
        if number == 0:
            try:
                socket.create_server(("", int(coordinator.rsplit(":", 1)[1]))).close()  # jaxlib would crash
            except OSError as error:
                raise OSError(f"the port of the coordinator {coordinator} must be free: {error.strerror}") from None
    _guard()
    _state["text"] = "no contact with the other processes: are all of them started, and is the coordinator reachable?"
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.distributed.initialize(
        coordinator,
        count,
        number,
        cluster_detection_method="deactivate" if all(told) else None,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    _state["text"] = (
        "lost contact with another process: start the same command again on every host; "
        "it resumes from the last checkpoint"
    )
    _state["joined"] = True


def lose() -> NoReturn:
    """Ends this process at once, with the line that says why; at exit JAX would wait for the dead."""
    end(LOST, f"error: {_state['text']}")


def end(code: int, line: str = "") -> NoReturn:
    """Ends this process without waiting for the others."""
    if line:
        os.write(int(_state["stderr"]), f"jaxad: {line}\n".encode())
    sys.stdout.flush()
    os._exit(code)


def _guard() -> None:
    """Makes the abort by which jaxlib answers a lost process one clear line, and keeps stdout and stderr for ours.

    The abort comes in a thread of jaxlib, where Python can catch nothing.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    _state["stderr"] = os.dup(2)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, os.fdopen(os.dup(number), "w", buffering=1))
    if not os.environ.get("JAXAD_DEBUG"):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: lose())
    _handlers.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, handler)
