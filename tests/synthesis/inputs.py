"""Small images for the tests of generators."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

SIZE = (48, 64)
SEEDS = st.integers(0, 2**31 - 1)


def noise(seed: int) -> jax.Array:
    """An image of uniform noise, in [0, 1]."""
    return jnp.asarray(np.random.default_rng(seed).random((*SIZE, 3), np.float32))


SOURCE = noise(9)
