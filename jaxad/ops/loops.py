"""Loops whose steps hold convolutions."""

import jax


def unroll(n: int) -> int:
    """The `unroll` of a `jax.lax.scan` of n steps: all of them on a CPU, whose convolutions are far slower in loops."""
    return 2 * n if jax.default_backend() == "cpu" else 1  # n of n would still be a loop, of one step
