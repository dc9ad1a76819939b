"""Checkpoints of a fit, kept by orbax: the newest state, and the one before it in case a loss diverges."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from jaxad.base import State
from jaxad.driver.execution import Checkpoint
from jaxad.driver.mesh import broadcast


class Saver:
    """Keeps the newest checkpoints of a fit in a directory; without one it does nothing.

    Args:
        checkpoint: Where, and how often; None for no checkpoints.
        identity: What distinguishes this fit from others, as JSON values.
        keep: How many checkpoints.
    """

    STRIDE = 1 << 26
    """Orbax numbers checkpoints by one integer of 31 bits: stage * STRIDE + step."""

    def __init__(self, checkpoint: Checkpoint | None, identity: dict[str, Any], *, keep: int = 1) -> None:
        self._directory = None if checkpoint is None else Path(checkpoint.directory).absolute()
        self._seconds = 0.0 if checkpoint is None else checkpoint.seconds
        self._identity, self._keep, self._saved = identity, keep, time.monotonic()

    def __enter__(self) -> "Saver":
        if self._directory is not None:
            policy = ocp.training.preservation_policies.LatestN(self._keep)
            self._checkpoints = ocp.training.Checkpointer(
                str(self._directory),
                preservation_policy=policy,  # pyright: ignore[reportArgumentType] (orbax's own types disagree)
                cleanup_tmp_directories=True,
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._directory is not None:
            with contextlib.suppress(*(ValueError, OSError) if any(error) else ()):  # what `save` raised comes again
                self._checkpoints.close()

    def restore(self, target: Callable[[int], State]) -> tuple[int, int, State] | None:
        """The stage, step and state to resume from, if any.

        Args:
            target: Gives shapes, types and shardings of the state of a stage.

        Raises:
            ValueError: The checkpoint is damaged or of another fit.
        """
        latest = None if self._directory is None else self._checkpoints.latest
        if latest is None:
            return None
        stage, step = divmod(latest.step, self.STRIDE)
        restart = f"delete {self._directory} to start afresh"
        try:
            identity = self._checkpoints.metadata(latest.step).custom_metadata
        except (LookupError, OSError, ValueError) as error:
            raise ValueError(f"the checkpoint {latest.path} is damaged: {restart}") from error
        if identity != self._identity:
            raise ValueError(f"a checkpoint must be of the same fit {self._identity}, got one of {identity}: {restart}")
        try:
            return stage, step, self._checkpoints.load(latest.step, target(stage))
        except (LookupError, OSError, ValueError) as error:
            raise ValueError(f"the checkpoint {latest.path} is damaged or of another method: {restart}") from error

    def due(self, now: bool = False) -> bool:
        """Whether to save: there is a directory, and the interval has passed or it must be `now`."""
        return self._directory is not None and (now or broadcast(time.monotonic() - self._saved >= self._seconds))

    def save(self, stage: int, step: int, state: State) -> None:
        """Saves. Raises OSError if the disk is full or the directory cannot be written; the last checkpoint stays."""
        report, threading.excepthook = threading.excepthook, lambda failure: None  # orbax raises it here once more
        try:
            self._checkpoints.save(stage * self.STRIDE + step, state, custom_metadata=self._identity)
        except (ValueError, OSError) as error:
            raise OSError(f"cannot save a checkpoint in {self._directory} ({error}); the last one stays") from error
        finally:
            threading.excepthook = report
        self._saved = time.monotonic()

    def forget(self, stage: int, step: int) -> None:
        """Deletes the checkpoint of a step, if there is one: its state is broken."""
        number = stage * self.STRIDE + step
        if self._directory is not None and any(saved.step == number for saved in self._checkpoints.checkpoints):
            self._checkpoints.delete(number)
