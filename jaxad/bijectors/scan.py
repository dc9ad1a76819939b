"""A chain of blocks of the same kind, compiled once."""

from collections.abc import Callable
from typing import Any

import distrax
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxad.base import Key, PyTree
from jaxad.ops.loops import unroll


class Scan(distrax.Bijector):
    """The chain of `block(params[0])`, `block(params[1])`, ..., applied in this order.

    One block is compiled, whatever their number; unrolled, all are.

    Args:
        block: Parameters -> a bijector that keeps the shape of its event.
        params: Parameters of all blocks, stacked on a leading axis.
        event_ndims: Of the block.
        remat: Store only the input of each block, and recompute the rest for the gradient.
        unrolled: Whether to unroll; None for images on a CPU only (see `jaxad.ops.loops`).
    """

    def __init__(
        self,
        block: Callable[[PyTree], distrax.Bijector],
        params: PyTree,
        event_ndims: int,
        *,
        remat: bool = False,
        unrolled: bool | None = None,
    ) -> None:
        super().__init__(event_ndims_in=event_ndims)
        self._block, self._params, self._remat = block, params, remat
        n = jax.tree.leaves(params)[0].shape[0]
        self._unroll = 2 * n if unrolled else unroll(n) if unrolled is None and event_ndims > 1 else 1

    def forward_and_log_det(self, x: PyTree) -> tuple[PyTree, Array]:
        """Applies all blocks."""
        return self._run(x, lambda params, x: self._block(params).forward_and_log_det(x), False)

    def inverse_and_log_det(self, y: PyTree) -> tuple[PyTree, Array]:
        """The inverse of `forward_and_log_det`."""
        return self._run(y, lambda params, y: self._block(params).inverse_and_log_det(y), True)

    def _run(self, x: PyTree, apply: Callable[[PyTree, PyTree], Any], reverse: bool) -> tuple:
        apply = jax.checkpoint(apply) if self._remat else apply

        def body(carry: tuple[PyTree, Array], params: PyTree) -> tuple[tuple[PyTree, Array], None]:
            x, total = carry
            x, log_det = apply(params, x)
            return (x, total + log_det), None

        first = jax.tree.leaves(x)[0]
        start = x, jnp.zeros(first.shape[: first.ndim - self.event_ndims_in], first.dtype)
        return jax.lax.scan(body, start, self._params, reverse=reverse, unroll=self._unroll)[0]


def scan_init(
    init: Callable[[Key, PyTree], PyTree], block: Callable[[PyTree], distrax.Bijector], key: Key, n: int, x: PyTree
) -> tuple[PyTree, PyTree]:
    """Parameters of n blocks, each initialized from the data that reach it, as those of `ActNorm` are.

    Args:
        init: (key, input of the block) -> its parameters.
        block: As in `Scan`.
        key: Random key.
        n: Number of blocks.
        x: Input of the first block.

    Returns:
        The stacked parameters, and the output of the last block.
    """

    def body(x: PyTree, key: Key) -> tuple[PyTree, PyTree]:
        params = init(key, x)
        return block(params).forward(x), params

    output, params = jax.lax.scan(body, x, jax.random.split(key, n))
    return params, output
