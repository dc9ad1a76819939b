"""The diagnostics of a stage, read from the device while it computes on."""

import collections
from collections.abc import Callable, Sequence

import numpy as np

from jaxad.base import Metrics, Stage
from jaxad.data import Dataset
from jaxad.driver.execution import Progress
from jaxad.driver.schedule import Schedule


class NonFiniteLoss(ValueError):
    """The loss became NaN or infinite."""


class Record:
    """The diagnostics of a stage: those that the device has yet to compute, and those that the host has read.

    Args:
        stage: Of the method.
        schedule: Of the stage.
        datasets: Of the classes.
        progress: As in `Execution`.
        forget: Called with a step whose state turns out to be broken.
    """

    def __init__(
        self,
        stage: Stage,
        schedule: Schedule,
        datasets: Sequence[Dataset],
        progress: Progress | None,
        forget: Callable[[int], None],
    ) -> None:
        self._stage, self._schedule, self._datasets = stage, schedule, datasets
        self._progress, self._forget = progress, forget
        self._pending: collections.deque[tuple[np.ndarray, np.ndarray, Metrics]] = collections.deque()
        self._chunks: list[dict[str, np.ndarray]] = []

    def begin(self, steps: int) -> None:
        """Reports the steps that are done already."""
        self._report(self._stage.name, steps)

    def end(self) -> None:
        """Reports that the stage is being finished."""
        if self._progress:
            self._progress(f"finish {self._stage.name}", 0, 0)

    def submit(self, steps: np.ndarray, active: np.ndarray, metrics: Metrics) -> None:
        """Takes what the device will have computed of a chunk: `active` tells which classes have which steps."""
        self._pending.append((steps, active, metrics))

    def collect(self, pending: int) -> None:
        """Waits until the device has no more chunks than that left, and checks the losses of the others."""
        while len(self._pending) > pending:
            steps, active, metrics = self._pending.popleft()
            values = {name: np.asarray(value) for name, value in metrics.items()}
            first, following = int(steps[0]), int(steps[-1]) + 1
            if "loss" in values and not np.isfinite(values["loss"][active[:, 0], 0]).all():
                self._forget(first)
            self._check_loss(values, active, first)
            self._chunks.append({k: v if active.all() else np.where(active, v, np.nan) for k, v in values.items()})
            self._report(self._stage.name, following)

    def metrics(self) -> dict[str, np.ndarray]:
        """All diagnostics, (class, step)."""
        first = self._chunks[0] if self._chunks else {}
        return {name: np.concatenate([chunk[name] for chunk in self._chunks], 1) for name in first}

    def _report(self, part: str, steps: int) -> None:
        if self._progress:
            self._progress(part, self._schedule.seen(steps), self._schedule.images)

    def _check_loss(self, metrics: dict[str, np.ndarray], active: np.ndarray, step: int) -> None:
        loss = metrics.get("loss")
        if loss is None:
            return
        broken = ~np.isfinite(loss) & active
        if not broken.any():
            return
        c, offset = (int(i) for i in np.unravel_index(np.argmax(broken), broken.shape))
        bad, per_epoch = step + offset, int(self._schedule.steps_per_epoch[c])
        category = f" of {self._datasets[c].category}" if len(self._datasets) > 1 else ""
        raise NonFiniteLoss(
            f"the loss must stay finite, got {loss[c, offset]} in stage {self._stage.name}{category}, epoch "
            f"{bad // per_epoch + 1}, step {bad + 1}: lower the learning rate or look for broken images"
        )
