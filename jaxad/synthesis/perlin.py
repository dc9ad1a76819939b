"""Perlin noise of any size, and random masks from it."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxad.base import Key
from jaxad.synthesis.warp import rotate


def perlin_noise(
    key: Key, size: tuple[int, int], cells: tuple[int, int] | Int[Array, "2"], max_cells: int | None = None
) -> Float[Array, "h w"]:
    """Perlin's gradient noise, in [-1, 1].

    Every pixel interpolates the random gradients of a lattice. The weights are separable into rows and columns, so the
    image is a sum of two matrix products, without a loop or a gather.

    Args:
        key: Draws the gradients.
        size: Height and width in pixels; they need not be multiples of `cells`.
        cells: Lattice cells along the height and along the width.
        max_cells: An upper bound of both, required if `cells` is traced.

    Source: Perlin, Improving noise, SIGGRAPH 2002 (fifth-degree weights), scaled by sqrt(2) as in DRAEM's code.
    """
    max_cells = max(map(int, cells)) if max_cells is None else max_cells
    angle = jax.random.uniform(key, (max_cells + 1, max_cells + 1), maxval=2 * jnp.pi)

    def lattice(n: int, cells: Array) -> tuple[Array, Array]:
        """Offsets of n pixels from every lattice line, in cells, and the weights of the lines."""
        lines = jnp.arange(max_cells + 1, dtype=jnp.float32)
        offset = jnp.arange(n, dtype=jnp.float32)[:, None] * (cells / n) - lines
        near = jnp.clip(1 - jnp.abs(offset), 0, 1)
        return offset, near**3 * (near * (6 * near - 15) + 10)

    (dy, rows), (dx, columns) = (
        lattice(n, jnp.asarray(c, jnp.float32)) for n, c in zip(size, (cells[0], cells[1]), strict=True)
    )
    with jax.default_matmul_precision("highest"):
        noise = (rows * dy) @ jnp.sin(angle) @ columns.T + rows @ jnp.cos(angle) @ (columns * dx).T
    return jnp.sqrt(2.0) * noise


def fractal_noise(
    key: Key,
    size: tuple[int, int],
    cells: tuple[int, int] | Int[Array, "2"],
    octaves: int,
    persistence: float = 0.5,
    max_cells: int | None = None,
) -> Float[Array, "h w"]:
    """A sum of octaves of Perlin noise with the variance of one octave; few values lie outside [-1, 1].

    Every octave doubles the cells and scales the amplitude by `persistence`. `size`, `cells` and `max_cells` (of the
    first octave) are those of `perlin_noise`.
    """
    max_cells = max(map(int, cells)) if max_cells is None else max_cells
    amplitudes = [persistence**i for i in range(octaves)]
    layers = [
        amplitude * perlin_noise(jax.random.fold_in(key, i), size, jnp.asarray(cells) << i, max_cells << i)
        for i, amplitude in enumerate(amplitudes)
    ]
    return jnp.stack(layers).sum(0) / math.hypot(*amplitudes)


def perlin_mask(
    key: Key,
    size: tuple[int, int],
    exponents: tuple[int, int] | None = None,
    threshold: float = 0.5,
    degrees: float = 90.0,
    octaves: int = 1,
) -> Bool[Array, "h w"]:
    """The pixels where rotated Perlin noise exceeds a threshold; some masks are empty.

    Args:
        key: Draws the noise, its cells and the rotation.
        size: Height and width in pixels.
        exponents: (low, high): the cells along each axis are 2**k with k uniform in [low, high). By default, low
            is 0 and the smallest cells of the last octave have about 8 pixels, as (0, 6) at DRAEM's 256 pixels.
        threshold: Of the noise.
        degrees: Largest rotation, in both directions; the corners that it uncovers are not in the mask.
        octaves: Octaves of the noise; more make rougher borders.

    Source: DRAEM, ICCV 2021, arXiv:2108.07610, section 3.3.
    """
    cells_key, noise_key, angle_key = jax.random.split(key, 3)
    exponents = (0, max(1, round(math.log2(min(size) / 4)) + 1 - octaves)) if exponents is None else exponents
    cells = 2 ** jax.random.randint(cells_key, (2,), *exponents)
    noise = fractal_noise(noise_key, size, cells, octaves, max_cells=2 ** (exponents[1] - 1))
    if degrees:
        noise = rotate(noise, jax.random.uniform(angle_key, minval=-degrees, maxval=degrees))
    return noise > threshold
