"""Runs on several processes: connects them with `jax.distributed`, and exits with one line if a process is lost."""

import ctypes
import os
import signal
import socket
import sys
from typing import NoReturn

LOST = 3
"""Exit code of a process that has lost contact with another one."""
HEARTBEAT_SECONDS = 30
"""Time without a sign of life after which a process counts as lost."""

_state = {"joined": False, "message": "", "stderr": 2}
_handlers: list[object] = []


def joined() -> bool:
    """Whether this process has joined others."""
    return bool(_state["joined"])


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process with the others. Must be called before any other use of JAX.

    Arguments that are None are read from `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. If these
    are not set either, JAX detects a TPU pod, SLURM, Open MPI or Kubernetes.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: Number of processes.
        process_id: Number of this process, from 0.

    Raises:
        ValueError: The arguments are incomplete or invalid, or JAX does not recognize the cluster.
        OSError: The port of the coordinator is in use.
    """
    import jax

    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, number = (
        int(os.environ[name]) if value is None and name in os.environ else value
        for value, name in ((num_processes, "JAX_NUM_PROCESSES"), (process_id, "JAX_PROCESS_ID"))
    )
    is_set = [value is not None for value in (coordinator, count, number)]
    if any(is_set[1:]) and not all(is_set):
        raise ValueError(
            f"--coordinator, --num-processes and --process-id belong together, got {coordinator}, {count} and {number}"
        )
    if coordinator is not None and all(is_set):
        if ":" not in coordinator or count is None or number is None or not 0 <= number < count:
            raise ValueError(
                f"the coordinator must be HOST:PORT, the process in 0..N-1, got {coordinator}, {number} of {count}"
            )
        if number == 0:
            try:  # jaxlib crashes if the port is in use
                socket.create_server(("", int(coordinator.rsplit(":", 1)[1]))).close()
            except OSError as error:
                raise OSError(f"the port of the coordinator {coordinator} must be free: {error.strerror}") from None
    _handle_abort()
    _state["message"] = (
        "cannot reach the other processes: check that all of them are running and that the coordinator is reachable"
    )
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.distributed.initialize(
        coordinator,
        count,
        number,
        cluster_detection_method="deactivate" if all(is_set) else None,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    _state["message"] = (
        "lost contact with another process: start the same command again on every host; "
        "it resumes from the last checkpoint"
    )
    _state["joined"] = True


def exit_after_lost_process() -> NoReturn:
    """Exits at once with a message; a normal exit would wait for the lost process."""
    end(LOST, f"error: {_state['message']}")


def end(code: int, line: str = "") -> NoReturn:
    """Exits without waiting for the other processes."""
    if line:
        os.write(int(_state["stderr"]), f"jaxad: {line}\n".encode())
    sys.stdout.flush()
    os._exit(code)


def _handle_abort() -> None:
    """Replaces the abort of jaxlib after a lost process by one clear message, and hides the output of libraries.

    jaxlib aborts in a thread of its own, where Python cannot catch an exception. Python's own stdout and stderr keep
    working.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    _state["stderr"] = os.dup(2)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        setattr(sys, name, os.fdopen(os.dup(number), "w", 1, stream.encoding, stream.errors))
    if not os.environ.get("JAXAD_DEBUG"):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: exit_after_lost_process())
    _handlers.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, handler)
