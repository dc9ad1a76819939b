"""Perlin noise of any size, and masks of random shapes made of it."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxad.base import Key
from jaxad.synthesis.warp import rotate


def perlin_noise(
    key: Key, size: tuple[int, int], cells: tuple[int, int] | Int[Array, "2"], most: int | None = None
) -> Float[Array, "h w"]:
    """Perlin's gradient noise, in [-1, 1].

    A pixel is interpolated from the random gradients of a lattice. Its weights are products of one of its row and one
    of its column, so that the image is two products of matrices: no loop and no gather.

    Args:
        key: Draws the gradients.
        size: Height and width in pixels, multiples of `cells` or not.
        cells: Of the lattice, down and across.
        most: At least the larger of both, where `cells` is traced.

    Source: Perlin, Improving noise, SIGGRAPH 2002 (the fifth-degree weights), scaled by sqrt(2) as DRAEM does.
    """
    most = max(map(int, cells)) if most is None else most
    angle = jax.random.uniform(key, (most + 1, most + 1), maxval=2 * jnp.pi)

    def lattice(n: int, cells: Array) -> tuple[Array, Array]:
        """How far every pixel lies behind every line of the lattice, and its weight there."""
        behind = jnp.arange(n, dtype=jnp.float32)[:, None] * (cells / n) - jnp.arange(most + 1, dtype=jnp.float32)
        near = jnp.clip(1 - jnp.abs(behind), 0, 1)
        return behind, near**3 * (near * (6 * near - 15) + 10)

    (down, rows), (across, columns) = (
        lattice(n, jnp.asarray(c, jnp.float32)) for n, c in zip(size, (cells[0], cells[1]), strict=True)
    )
    with jax.default_matmul_precision("highest"):
        noise = (rows * down) @ jnp.sin(angle) @ columns.T + rows @ jnp.cos(angle) @ (columns * across).T
    return jnp.sqrt(2.0) * noise


def fractal_noise(
    key: Key,
    size: tuple[int, int],
    cells: tuple[int, int] | Int[Array, "2"],
    octaves: int,
    persistence: float = 0.5,
    most: int | None = None,
) -> Float[Array, "h w"]:
    """Perlin noise of several scales, with the variance of one alone; few values lie outside [-1, 1].

    Each has twice the cells of the one before and is `persistence` times as strong; the rest is as in `perlin_noise`.
    """
    most = max(map(int, cells)) if most is None else most
    strength = [persistence**i for i in range(octaves)]
    layers = [
        s * perlin_noise(jax.random.fold_in(key, i), size, jnp.asarray(cells) << i, most << i)
        for i, s in enumerate(strength)
    ]
    return jnp.stack(layers).sum(0) / math.hypot(*strength)


def perlin_mask(
    key: Key,
    size: tuple[int, int],
    exponents: tuple[int, int] | None = None,
    threshold: float = 0.5,
    degrees: float = 90.0,
    octaves: int = 1,
) -> Bool[Array, "h w"]:
    """Where rotated Perlin noise exceeds a threshold; in some draws nowhere.

    Args:
        key: Draws the noise, its cells and the rotation.
        size: Height and width in pixels.
        exponents: The cells down and across are powers of two, from 2 to the first of these to below that to the last;
            None: from one cell to cells of about 8 pixels in the last octave (DRAEM's 0 and 6 of 256 px).
        threshold: Of the noise.
        degrees: It is rotated by so much at most, either way; nothing exceeds the threshold beyond its corners.
        octaves: Scales of the noise; several make fractal shapes, whose borders are rough.

    Source: DRAEM, ICCV 2021, arXiv:2108.07610, section 3.3.
    """
    which, draw, turn = jax.random.split(key, 3)
    exponents = (0, max(1, round(math.log2(min(size) / 4)) + 1 - octaves)) if exponents is None else exponents
    cells = 2 ** jax.random.randint(which, (2,), *exponents)
    noise = fractal_noise(draw, size, cells, octaves, most=2 ** (exponents[1] - 1))
    if degrees:
        noise = rotate(noise, jax.random.uniform(turn, minval=-degrees, maxval=degrees))
    return noise > threshold
