"""Seamless cloning: a piece of an image whose gradients go on where its border has the colors of another.

Source: Perez, Gangnet and Blake, Poisson image editing, SIGGRAPH 2003 (Eq. 7 and 11 to 13).
"""

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Bool, Float

TOLERANCE = 1e-4
"""Of the residual, as a share of the right side."""


def neighbors(x: Float[Array, "h w c"]) -> Float[Array, "4 h w c"]:
    """The pixels above, below, left and right; at the border of the image a pixel itself."""
    padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)), "edge")
    return jnp.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])


def sines(n: int, first: Float[Array, ""], length: Float[Array, ""]) -> tuple[Float[Array, "n n"], Float[Array, "n"]]:
    """The discrete sine transform (type I, orthonormal) of `length` of n numbers, and the eigenvalues of -1 2 -1.

    Rows and columns beyond are zeros, and their eigenvalues 1.
    """
    number = jnp.arange(n, dtype=jnp.float32)
    row, column = (number - first)[:, None], number[None, :]
    turns = (row + 1) * (column + 1) % (2 * (length + 1)) / (length + 1)  # whole numbers, before they are rounded
    wave = jnp.sin(jnp.pi * turns) * jnp.sqrt(2 / (length + 1))
    inside = (row >= 0) & (row < length) & (column < length)
    values = 2 - 2 * jnp.cos(jnp.pi * (number + 1) / (length + 1))
    return jnp.where(inside, wave, 0), jnp.where(number < length, values, 1)


def extent(along: Bool[Array, "n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The first of what is marked, and how many lie from it to the last."""
    first, last = jnp.argmax(along), along.shape[0] - jnp.argmax(along[::-1])
    return first.astype(jnp.float32), jnp.maximum(last - first, 1).astype(jnp.float32)


def solve_poisson(right: Float[Array, "h w c"], mask: Bool[Array, "h w"]) -> Float[Array, "h w c"]:
    """The field within the mask whose four differences to its neighbors add up to `right`, zero beyond it.

    Conjugate gradients, of which the first step solves the equation in the mask's bounding box by sine transforms: a
    rectangle needs no second one.

    Args:
        right: Of every channel; what it is beyond the mask does not matter.
        mask: Any set of pixels of which none is on the border of the image.
    """
    inside = mask[..., None]
    (down, low), (across, high) = (sines(len(along), *extent(along)) for along in (mask.any(1), mask.any(0)))
    scale = low[:, None] + high[None, :]

    def laplace(u: Array) -> Array:
        u = jnp.where(inside, u, 0)
        return jnp.where(inside, 4 * u - neighbors(u).sum(0), 0)

    def in_the_box(b: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            spectrum = jnp.einsum("ik,ijc,jl->klc", down, b, across) / scale[..., None]
            return jnp.where(inside, jnp.einsum("ik,klc,jl->ijc", down, spectrum, across), 0)

    right = jnp.where(inside, right, 0)
    return cg(laplace, right, in_the_box(right), tol=TOLERANCE, atol=1e-6, maxiter=200, M=in_the_box)[0]


def seamless_clone(
    target: Float[Array, "h w c"], source: Float[Array, "h w c"], mask: Bool[Array, "h w"], mixed: bool | Array = False
) -> Float[Array, "h w c"]:
    """The target with the source's gradients within the mask.

    Args:
        target: In [0, 1]; its pixels beyond the mask stay.
        source: In [0, 1], in place.
        mask: Pixels to clone; those on the border of the image are left out.
        mixed: Whether a gradient of the target prevails where it is the larger one (mixed cloning), so that textures
            show through.
    """
    inner = jnp.zeros_like(mask).at[1:-1, 1:-1].set(mask[1:-1, 1:-1])
    own, other = source - neighbors(source), target - neighbors(target)
    wanted = jnp.where(jnp.asarray(mixed) & (jnp.abs(other) > jnp.abs(own)), other, own)
    change = solve_poisson((wanted - other).sum(0), inner)
    return jnp.where(inner[..., None], jnp.clip(target + change, 0, 1), target)
