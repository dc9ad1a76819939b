"""Linear bijectors on the channels of an event: fixed permutations, 1x1 convolutions, ActNorm."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxad.base import Key, PyTree
from jaxad.ops.lapack import key_after


class Permutation(distrax.Bijector):
    """y[..., i] = x[..., index[i]]; an event that is a tuple of images has one index per image."""

    def __init__(self, index: PyTree, event_ndims: int) -> None:
        super().__init__(event_ndims_in=event_ndims, is_constant_jacobian=True)
        self._index = index

    def forward_and_log_det(self, x: PyTree) -> tuple[PyTree, Array]:
        """Permutes the channels; the log-determinant is 0."""
        return self._take(x, self._index)

    def inverse_and_log_det(self, y: PyTree) -> tuple[PyTree, Array]:
        """The inverse of `forward_and_log_det`."""
        return self._take(y, jax.tree.map(jnp.argsort, self._index))

    def _take(self, x: PyTree, index: PyTree) -> tuple[PyTree, Array]:
        first = jax.tree.leaves(x)[0]
        return jax.tree.map(lambda a, i: a[..., i], x, index), jnp.zeros(
            first.shape[: first.ndim - self.event_ndims_in]
        )


def random_orthogonal(key: Key, channels: int) -> Float[Array, "c c"]:
    """A uniformly random rotation (an element of the special orthogonal group)."""
    matrix = jax.random.orthogonal(key, channels)
    return matrix.at[0].multiply(jnp.sign(jnp.linalg.det(matrix)))


def init_in_order(
    init_level: Callable[[Key, int], tuple[PyTree, Float[Array, "k c c"]]], key: Key, channels: Sequence[int]
) -> list[tuple[PyTree, Float[Array, "k c c"]]]:
    """Initializes several levels with random rotations, each after the one before, as LAPACK needs it on a CPU.

    Args:
        init_level: (key, channels) -> the parameters of a level, and its `random_orthogonal` matrices.
        key: Random key.
        channels: Of every level.
    """
    levels = []
    for level_key, c in zip(jax.random.split(key, len(channels)), channels, strict=True):
        levels.append(init_level(key_after(level_key, levels[-1][1]) if levels else level_key, c))
    return levels


class LuFactors(NamedTuple):
    """The parameters of an invertible matrix in its LU decomposition, which gives the determinant for free."""

    triangles: Float[Array, "*n c c"]
    """The entries of the lower factor below the diagonal, and those of the upper factor above it."""
    log_diagonal: Float[Array, "*n c"]
    """Of the upper factor."""


def lu_identity(channels: int) -> LuFactors:
    """The factors of the identity."""
    return LuFactors(jnp.zeros((channels, channels)), jnp.zeros(channels))


def lu_matrix(factors: LuFactors, permutation: Int[Array, "c"]) -> tuple[Float[Array, "c c"], Float[Array, ""]]:
    """The matrix, with its rows permuted, and the logarithm of its absolute determinant.

    Source: Glow, arXiv:1807.03039, section 3.2, Eq. 10-11.
    """
    triangles, log_diagonal = factors
    lower = jnp.tril(triangles, -1) + jnp.eye(len(log_diagonal))
    upper = jnp.triu(triangles, 1) + jnp.diag(jnp.exp(log_diagonal))
    return jnp.matmul(lower, upper, precision=jax.lax.Precision.HIGHEST)[permutation], log_diagonal.sum()


class Invertible1x1(distrax.Bijector):
    """y = x @ matrix on the channels, at every position.

    Source: Glow, arXiv:1807.03039, section 3.2; with a fixed orthogonal matrix, FrEIA's soft permutation.

    Args:
        matrix: An invertible matrix.
        event_ndims: 1 for vectors, 3 for images (h w c).
        orthogonal: Whether the matrix is orthogonal; its determinant is then not computed.
        log_det: The logarithm of its absolute determinant; None to compute it.
    """

    def __init__(
        self,
        matrix: Float[Array, "c c"],
        event_ndims: int,
        *,
        orthogonal: bool = False,
        log_det: Float[Array, ""] | None = None,
    ) -> None:
        super().__init__(event_ndims_in=event_ndims, is_constant_jacobian=True)
        self._matrix, self._orthogonal = matrix, orthogonal
        self._matrix_log_det = jnp.zeros(()) if orthogonal else log_det

    def forward_and_log_det(self, x: Float[Array, "*s c"]) -> tuple[Float[Array, "*s c"], Array]:
        """Multiplies the channels at every position."""
        return jnp.matmul(x, self._matrix, precision=jax.lax.Precision.HIGHEST), self._log_det(x)

    def inverse_and_log_det(self, y: Float[Array, "*s c"]) -> tuple[Float[Array, "*s c"], Array]:
        """The inverse of `forward_and_log_det`."""
        if self._orthogonal:
            return jnp.matmul(y, self._matrix.T, precision=jax.lax.Precision.HIGHEST), -self._log_det(y)
        x = jnp.linalg.solve(self._matrix.T, y.reshape(-1, y.shape[-1]).T).T
        return x.reshape(y.shape), -self._log_det(y)

    def _log_det(self, x: Array) -> Array:
        log_det = jnp.linalg.slogdet(self._matrix)[1] if self._matrix_log_det is None else self._matrix_log_det
        batch = x.ndim - self.event_ndims_in
        return jnp.broadcast_to(log_det * math.prod(x.shape[batch:-1]), x.shape[:batch])


class ActNorm(distrax.Bijector):
    """y = x * exp(log_scale) + shift, per channel.

    Source: Glow, arXiv:1807.03039, section 3.1.
    """

    def __init__(self, log_scale: Float[Array, "c"], shift: Float[Array, "c"], event_ndims: int) -> None:
        super().__init__(event_ndims_in=event_ndims, is_constant_jacobian=True)
        self._log_scale, self._shift = log_scale, shift

    def forward_and_log_det(self, x: Float[Array, "*s c"]) -> tuple[Float[Array, "*s c"], Array]:
        """Scales and shifts the channels."""
        return x * jnp.exp(self._log_scale) + self._shift, self._log_det(x)

    def inverse_and_log_det(self, y: Float[Array, "*s c"]) -> tuple[Float[Array, "*s c"], Array]:
        """The inverse of `forward_and_log_det`."""
        return (y - self._shift) * jnp.exp(-self._log_scale), -self._log_det(y)

    def _log_det(self, x: Array) -> Array:
        batch = x.ndim - self.event_ndims_in
        return jnp.broadcast_to(self._log_scale.sum() * math.prod(x.shape[batch:-1]), x.shape[:batch])


def act_norm_init(
    x: Float[Array, "b *s c"], valid: Bool[Array, "b"] | None = None
) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
    """The log scale and shift of an `ActNorm` that gives the valid rows of a batch mean 0 and variance 1."""
    valid = jnp.ones(x.shape[0], bool) if valid is None else valid
    counts = jnp.broadcast_to(valid.reshape(-1, *(1,) * (x.ndim - 1)), x.shape)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes, where=counts)
    deviation = jnp.sqrt(jnp.mean((x - mean) ** 2, axes, where=counts))
    log_scale = -jnp.log(deviation + 1e-6)
    return log_scale, -mean * jnp.exp(log_scale)
