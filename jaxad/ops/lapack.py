"""Order among LAPACK calls.

jaxlib 0.10 distributes a call on several matrices over the threads of a CPU and waits for them in one of these threads.
As many such calls at the same time as there are threads deadlock.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.base import Key


def wait_for(x: Array, result: Float[Array, "*s"]) -> Array:
    """`x`, once the result of an earlier call exists; NaN where the first value of the result is NaN."""
    return jnp.where(jnp.isnan(result.ravel()[0]), jnp.nan, x)


def key_after(key: Key, result: Float[Array, "*s"]) -> Key:
    """A key derived from `key`, once the result of an earlier call exists."""
    return jax.random.fold_in(key, jnp.isnan(result.ravel()[0]).astype(jnp.uint32))
