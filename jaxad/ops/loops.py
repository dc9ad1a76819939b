"""Loops whose steps hold gradients of convolutions, which are far slower in loops on a CPU."""

from collections.abc import Callable

import jax

from jaxad.base import PyTree


def unroll(n: int) -> int:
    """The `unroll` of a `jax.lax.scan` of n steps: all of them on a CPU."""
    return 2 * n if jax.default_backend() == "cpu" else 1  # n of n would still be a loop, of one step


def each(f: Callable[[PyTree], PyTree], xs: PyTree) -> PyTree:
    """`f` of every row, one after the other to spare memory; all at once on a CPU."""
    return jax.vmap(f)(xs) if jax.default_backend() == "cpu" else jax.lax.map(f, xs)
