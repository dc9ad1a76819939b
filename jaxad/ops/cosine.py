"""Angles between vectors."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def unit(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Vectors scaled to unit length. Zeros stay zeros, and have a finite gradient."""
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-16))


def cosine_distance(a: Float[Array, "*b c"], b: Float[Array, "*b c"]) -> Float[Array, "*b"]:
    """1 minus the cosine of the angle between vectors; 1 where one of them is zero."""
    norms = jnp.sqrt(jnp.maximum(jnp.sum(a * a, -1), 1e-16)) * jnp.sqrt(jnp.maximum(jnp.sum(b * b, -1), 1e-16))
    return 1 - jnp.sum(a * b, -1) / norms
