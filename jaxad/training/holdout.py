"""Normal images that a method holds out of training to calibrate its scores, whatever groups they belong to."""

import numpy as np
from jaxtyping import Int

HOLDOUT_STEP = 10
"""Every tenth image is held out, from the first one on: the i-th of them is the image i * HOLDOUT_STEP."""


def holdout_rows(n: int) -> Int[np.ndarray, "k"]:
    """The held-out ones of n images: the `rows` of a stage that calibrates."""
    return np.arange(0, n, HOLDOUT_STEP)


def training_rows(n: int) -> Int[np.ndarray, "k"]:
    """The others: the `rows` of a stage that trains. A single image serves for both."""
    rest = np.flatnonzero(np.arange(n) % HOLDOUT_STEP)
    return rest if len(rest) else np.arange(n)
