"""Seamless cloning: inserts the gradients of one image into another, without a visible border.

Source: Perez, Gangnet and Blake, Poisson image editing, SIGGRAPH 2003 (Eq. 7 and 11 to 13).
"""

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Bool, Float

TOLERANCE = 1e-4
"""Norm of the residual at which conjugate gradients stop, relative to that of the right-hand side."""


def neighbors(x: Float[Array, "h w c"]) -> Float[Array, "4 h w c"]:
    """The pixels above, below, left and right of each pixel; the edge pixels repeat outside the image."""
    padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)), "edge")
    return jnp.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])


def gradient(x: Float[Array, "h w c"]) -> Float[Array, "2 h w c"]:
    """The differences to the pixels below and on the right; 0 on the border of the image."""
    return jnp.stack([jnp.diff(x, axis=0, append=x[-1:]), jnp.diff(x, axis=1, append=x[:, -1:])])


def divergence(field: Float[Array, "2 h w c"]) -> Float[Array, "h w c"]:
    """That of a field on the edges between pixels: the laplacian, if it is a gradient."""
    down, right = field
    return jnp.diff(down, axis=0, prepend=jnp.zeros_like(down[:1])) + jnp.diff(
        right, axis=1, prepend=jnp.zeros_like(right[:, :1])
    )


def sine_transform(
    n: int, start: Float[Array, ""], length: Float[Array, ""]
) -> tuple[Float[Array, "n n"], Float[Array, "n"]]:
    """The orthonormal discrete sine transform (type I) of an interval of n numbers.

    Its columns are the eigenvectors of the second difference (-1, 2, -1) on the interval.

    Args:
        n: Numbers in all.
        start: Index where the interval starts.
        length: Length of the interval.

    Returns:
        The matrix, zero outside the interval and beyond `length` columns; the eigenvalues, 1 beyond `length`.
    """
    index = jnp.arange(n, dtype=jnp.float32)
    row, column = (index - start)[:, None], index[None, :]
    turns = (row + 1) * (column + 1) % (2 * (length + 1)) / (length + 1)  # exact integers up to the division
    wave = jnp.sin(jnp.pi * turns) * jnp.sqrt(2 / (length + 1))
    inside = (row >= 0) & (row < length) & (column < length)
    eigenvalues = 2 - 2 * jnp.cos(jnp.pi * (index + 1) / (length + 1))
    return jnp.where(inside, wave, 0), jnp.where(index < length, eigenvalues, 1)


def bounds(mask: Bool[Array, "n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The start and length of the shortest interval that holds all True entries; the length is at least 1."""
    start, stop = jnp.argmax(mask), mask.shape[0] - jnp.argmax(mask[::-1])
    return start.astype(jnp.float32), jnp.maximum(stop - start, 1).astype(jnp.float32)


def solve_poisson(right: Float[Array, "h w c"], mask: Bool[Array, "h w"]) -> Float[Array, "h w c"]:
    """Solves the discrete Poisson equation, -laplacian(u) = right, inside a mask, with u = 0 outside.

    Conjugate gradients, preconditioned by the exact solution in the bounding box of the mask, which two sine transforms
    give. A rectangular mask needs one iteration.

    Args:
        right: The right-hand side of every channel; its values outside the mask are ignored.
        mask: Any set of pixels off the border of the image.
    """
    inside = mask[..., None]
    (rows, row_values), (columns, column_values) = (
        sine_transform(len(profile), *bounds(profile)) for profile in (mask.any(1), mask.any(0))
    )
    eigenvalues = row_values[:, None] + column_values[None, :]

    def laplacian(u: Array) -> Array:
        u = jnp.where(inside, u, 0)
        return jnp.where(inside, 4 * u - neighbors(u).sum(0), 0)

    def solve_in_box(b: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            spectrum = jnp.einsum("ik,ijc,jl->klc", rows, b, columns) / eigenvalues[..., None]
            return jnp.where(inside, jnp.einsum("ik,klc,jl->ijc", rows, spectrum, columns), 0)

    right = jnp.where(inside, right, 0)
    return cg(laplacian, right, solve_in_box(right), tol=TOLERANCE, atol=1e-6, maxiter=200, M=solve_in_box)[0]


def seamless_clone(
    target: Float[Array, "h w c"],
    source: Float[Array, "h w c"],
    mask: Bool[Array, "h w"],
    mixed: bool | Array = False,
    guided: Bool[Array, "h w"] | None = None,
) -> Float[Array, "h w c"]:
    """The target with the source's gradients inside the mask.

    Args:
        target: In [0, 1]; its pixels outside the mask stay as they are.
        source: In [0, 1], aligned with the target.
        mask: Pixels to replace; those on the border of the image are left out.
        mixed: Whether to use the larger of both gradients (mixed seamless cloning), so that textures show through. As
            in OpenCV, a gradient is as large as its two components differ.
        guided: Pixels whose gradients come from the source; those of others stay as they are. All by default.
    """
    inner = jnp.zeros_like(mask).at[1:-1, 1:-1].set(mask[1:-1, 1:-1])
    source_gradient, target_gradient = gradient(source), gradient(target)
    size, target_size = (jnp.abs(x[0] - x[1]) for x in (source_gradient, target_gradient))
    use_source = ~jnp.asarray(mixed) | (size > target_size)
    if guided is not None:
        use_source &= guided[..., None]
    guidance = jnp.where(use_source, source_gradient - target_gradient, 0)
    change = solve_poisson(-divergence(guidance), inner)
    return jnp.where(inner[..., None], jnp.clip(target + change, 0, 1), target)
