"""Masks, squeezing and the multi-scale architecture of flows on pixels."""

from collections.abc import Sequence
from typing import Any

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def checkerboard_mask(height: int, width: int, channels: int, odd: bool = False) -> Bool[np.ndarray, "h w c"]:
    """True where row + column is even (or odd). Source: RealNVP, arXiv:1605.08803, figure 3."""
    y, x = np.indices((height, width))
    return np.repeat(((y + x) % 2 == int(odd))[..., None], channels, -1)


def half_mask(height: int, width: int, channels: int, lower: bool = False) -> Bool[np.ndarray, "h w c"]:
    """True for the upper half of the rows (or the lower). Source: Kirichenko et al., arXiv:2006.08545, figure 5."""
    half = (np.arange(height) < height // 2) != lower
    return np.broadcast_to(half[:, None, None], (height, width, channels)).copy()


def quadrant_mask(height: int, width: int, channels: int, number: int) -> Bool[np.ndarray, "h w c"]:
    """True for a quarter of the image, counted clockwise from the upper left: one part of the cycle mask.

    Source: Kirichenko et al., arXiv:2006.08545, section 6.1 and figure 5.
    """
    lower, right = number % 4 in (2, 3), number % 4 in (1, 2)
    across = (np.arange(width) < width // 2) != right
    return half_mask(height, width, channels, lower) & across[None, :, None]


class Squeeze(distrax.Bijector):
    """Turns every 2 x 2 block of pixels into one pixel with four times the channels: the four of the first, and so on.

    Source: RealNVP, arXiv:1605.08803, section 3.6.
    """

    def __init__(self) -> None:
        super().__init__(event_ndims_in=3, is_constant_jacobian=True)

    def forward_and_log_det(self, x: Float[Array, "*b h w c"]) -> tuple[Array, Array]:
        """Images (... h w c) -> (... h/2 w/2 4c).

        Raises:
            ValueError: The height or the width is odd.
        """
        *batch, h, w, c = x.shape
        if h % 2 or w % 2:
            raise ValueError(f"squeezing needs an even height and width, got {h} x {w}")
        blocks = x.reshape(*batch, h // 2, 2, w // 2, 2, c)
        return jnp.moveaxis(blocks, (-4, -2), (-2, -1)).reshape(*batch, h // 2, w // 2, 4 * c), jnp.zeros(batch)

    def inverse_and_log_det(self, y: Float[Array, "*b h w c4"]) -> tuple[Array, Array]:
        """The inverse of `forward_and_log_det`."""
        *batch, h, w, c = y.shape
        blocks = jnp.moveaxis(y.reshape(*batch, h, w, c // 4, 2, 2), (-2, -1), (-4, -2))
        return blocks.reshape(*batch, 2 * h, 2 * w, c // 4), jnp.zeros(batch)


class MultiScale(distrax.Bijector):
    """After each level but the last, half of the channels leave the flow; the output is one vector of all of them.

    Source: RealNVP, arXiv:1605.08803, section 3.6, Eq. 14-16.

    Args:
        levels: Bijectors of images, the finest first; each may change the shape, as `Squeeze` does.
        shape: (h, w, c) of the input of the first.
    """

    def __init__(self, levels: Sequence[distrax.Bijector], shape: tuple[int, int, int]) -> None:
        super().__init__(event_ndims_in=3, event_ndims_out=1)
        self._levels, self._shapes = tuple(levels), []
        for number, level in enumerate(levels):
            h, w, c = jax.eval_shape(level.forward, jax.ShapeDtypeStruct((1, *shape), jnp.float32)).shape[1:]
            leaving = c if number == len(levels) - 1 else c // 2
            self._shapes.append((h, w, leaving))
            shape = (h, w, c - leaving)

    def forward_and_log_det(self, x: Float[Array, "*b h w c"]) -> tuple[Float[Array, "*b d"], Array]:
        """Images -> vectors."""
        batch, outputs, total = x.shape[:-3], [], jnp.zeros(x.shape[:-3])
        rest: Any = x
        for level, (_, _, leaving) in zip(self._levels, self._shapes, strict=True):
            rest, log_det = level.forward_and_log_det(rest)
            total = total + log_det
            outputs.append(rest[..., rest.shape[-1] - leaving :].reshape(*batch, -1))
            rest = rest[..., : rest.shape[-1] - leaving]
        return jnp.concatenate(outputs, -1), total

    def inverse_and_log_det(self, y: Float[Array, "*b d"]) -> tuple[Float[Array, "*b h w c"], Array]:
        """The inverse of `forward_and_log_det`."""
        batch, total = y.shape[:-1], jnp.zeros(y.shape[:-1])
        ends = np.cumsum([np.prod(shape) for shape in self._shapes])[:-1]
        parts = jnp.split(y, ends, -1)
        x: Any = None
        for level, shape, part in reversed(list(zip(self._levels, self._shapes, parts, strict=True))):
            part = part.reshape(*batch, *shape)
            x, log_det = level.inverse_and_log_det(part if x is None else jnp.concatenate([x, part], -1))
            total = total + log_det
        return x, total
