"""What a killed fit goes on from: its newest state, kept by orbax; and the one before it, should a loss diverge."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from jaxad.base import State
from jaxad.driver.mesh import agreed


class Saver:
    """Keeps the newest checkpoints of a fit in a directory; does nothing without one.

    Args:
        directory: Of this fit alone; None for no checkpoints.
        seconds: Least time between two checkpoints.
        identity: What tells this fit from others, as JSON values.
        keep: How many checkpoints.
    """

    STRIDE = 1 << 26
    """Orbax numbers checkpoints by one integer of 31 bits: stage * STRIDE + step."""

    def __init__(
        self, directory: str | Path | None, seconds: float, identity: dict[str, Any], *, keep: int = 1
    ) -> None:
        self._directory, self._keep = None if directory is None else Path(directory).absolute(), keep
        self._seconds, self._identity, self._saved = seconds, identity, time.monotonic()

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
            self._checkpoints.close()

    def restore(self, target: Callable[[int], State]) -> tuple[int, int, State] | None:
        """The stage, step and state to go on from, if any.

        Args:
            target: Gives shapes, types and shardings of the state of a stage.

        Raises:
            ValueError: The checkpoint is damaged or of another fit.
        """
        latest = None if self._directory is None else self._checkpoints.latest
        if latest is None:
            return None
        stage, step = divmod(latest.step, self.STRIDE)
        again = f"delete {self._directory} to start afresh"
        try:
            identity = self._checkpoints.metadata(latest.step).custom_metadata
        except (LookupError, OSError, ValueError) as error:
            raise ValueError(f"the checkpoint {latest.path} is damaged: {again}") from error
        if identity != self._identity:
            raise ValueError(f"a checkpoint must be of the same fit {self._identity}, got one of {identity}: {again}")
        try:
            return stage, step, self._checkpoints.load(latest.step, target(stage))
        except (LookupError, OSError, ValueError) as error:
            raise ValueError(f"the checkpoint {latest.path} is damaged or of another method: {again}") from error

    def due(self, now: bool = False) -> bool:
        """Whether to save: there is a directory, and the last save was not a moment ago, or it must be `now`."""
        return self._directory is not None and (now or agreed(time.monotonic() - self._saved >= self._seconds))

    def save(self, stage: int, step: int, state: State) -> None:
        """Saves."""
        self._checkpoints.save(stage * self.STRIDE + step, state, custom_metadata=self._identity)
        self._saved = time.monotonic()

    def forget(self, stage: int, step: int) -> None:
        """Deletes the checkpoint of a step, if there is one: its state is broken."""
        number = stage * self.STRIDE + step
        if self._directory is not None and any(saved.step == number for saved in self._checkpoints.checkpoints):
            self._checkpoints.delete(number)
