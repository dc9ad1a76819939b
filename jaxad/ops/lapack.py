"""Order among LAPACK calls.

jaxlib 0.10 shares a call on several matrices out among the threads of a CPU and waits for them in one of these: as many
such calls at once as there are threads hang.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxad.base import Key


def after(x: Array, before: Float[Array, "*s"]) -> Array:
    """`x`, but not until the result of an earlier call is there; NaN where that is."""
    return jnp.where(jnp.isnan(before.ravel()[0]), jnp.nan, x)


def key_after(key: Key, before: Float[Array, "*s"]) -> Key:
    """A key from `key`, but not until the result of an earlier call is there."""
    return jax.random.fold_in(key, jnp.isnan(before.ravel()[0]).astype(jnp.uint32))
