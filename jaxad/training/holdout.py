"""Normal images that a method keeps from learning, to set its scales by."""

import numpy as np
from jaxtyping import Int

ONE_OF = 10
"""One image of so many is held out: the i-th of them is the image i * ONE_OF."""


def held_out(n: int) -> Int[np.ndarray, "k"]:
    """Those of n images, the `rows` of a stage that sets scales."""
    return np.arange(0, n, ONE_OF)


def learned_from(n: int) -> Int[np.ndarray, "k"]:
    """The others, the `rows` of a stage that learns; a single image is both."""
    rest = np.flatnonzero(np.arange(n) % ONE_OF)
    return rest if len(rest) else np.arange(n)
