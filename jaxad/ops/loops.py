"""Loops whose order or form matters on a CPU.

Gradients of convolutions are far slower inside loops on a CPU, hence `unroll` and `map_rows`. LAPACK calls on several
matrices must not run at the same time there, hence `map_in_order`.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

from jaxad.base import PyTree
from jaxad.ops.lapack import wait_for

T = TypeVar("T")


def unroll(n: int) -> int:
    """The `unroll` of a `jax.lax.scan` of n steps: all of them on a CPU."""
    return 2 * n if jax.default_backend() == "cpu" else 1  # n of n would still be a loop, of one step


def map_rows(f: Callable[[PyTree], PyTree], xs: PyTree) -> PyTree:
    """`f` of every row, one at a time to save memory; all at once on a CPU."""
    return jax.vmap(f)(xs) if jax.default_backend() == "cpu" else jax.lax.map(f, xs)


def map_in_order(f: Callable[..., T], arrays: Sequence[jax.Array], *others: Sequence[PyTree]) -> list[T]:
    """`[f(array, *other), ...]`, where every call waits for the last array that the call before it returns.

    Args:
        f: Contains LAPACK calls.
        arrays: First arguments, of any shapes; NaN once a call has returned NaN as its first value.
        others: Further arguments of every call.
    """
    results: list[T] = []
    for array, *other in zip(arrays, *others, strict=True):
        results.append(f(wait_for(array, jax.tree.leaves(results[-1])[-1]) if results else array, *other))
    return results
