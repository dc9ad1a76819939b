"""Structural similarity, the focal loss, SSPCAB and feature ascent against plain computations."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from jaxad.nn.sspcab import Sspcab
from jaxad.ops.cosine import unit
from jaxad.ops.losses import focal_loss
from jaxad.ops.ssim import ssim
from jaxad.synthesis.ascent import ascend, project_to_shell

RNG = np.random.default_rng(0)


def test_ssim_has_gaussian_windows_and_pads_with_zeros():
    a, b = RNG.random((2, 2, 20, 17, 3))
    b = 0.7 * a + 0.3 * b

    def smooth(x):
        return ndimage.gaussian_filter(x, 1.5, radius=5, mode="constant", axes=(1, 2))

    ma, mb = smooth(a), smooth(b)
    va, vb, vab = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
    expected = (2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    similarity = ssim(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(similarity, expected.mean((1, 2, 3)), atol=1e-3)
    np.testing.assert_allclose(ssim(jnp.asarray(a, jnp.float32), jnp.asarray(a, jnp.float32)), 1, atol=1e-5)


def test_focal_loss_weights_predicted_labels_less():
    probability, label = RNG.random(200), RNG.integers(0, 2, 200)
    label_probability = np.where(label == 1, probability, 1 - probability)
    loss = focal_loss(jnp.asarray(probability, jnp.float32), jnp.asarray(label == 1))
    expected = -((1 - label_probability) ** 2) * np.log(label_probability)
    np.testing.assert_allclose(loss, expected, rtol=1e-2, atol=1e-4)


def test_features_move_into_the_shell_along_the_line_to_their_centers():
    center = RNG.normal(size=(4, 5))
    x = center + RNG.normal(size=(60, 4, 5)) * RNG.uniform(0.1, 3, (60, 1, 1))
    moved = np.asarray(
        project_to_shell(jnp.asarray(x, jnp.float32), jnp.asarray(center, jnp.float32), jnp.float32(1.5))
    )
    old_distance, new_distance = (np.linalg.norm(y - center, axis=-1) for y in (x, moved))
    np.testing.assert_allclose(new_distance, np.clip(old_distance, 1.5, 3), rtol=1e-4)
    cosine = ((x - center) * (moved - center)).sum(-1) / old_distance / new_distance
    np.testing.assert_allclose(cosine, 1, rtol=1e-4)


def test_ascent_takes_steps_of_equal_length():
    goal = jnp.asarray(RNG.normal(size=(1, 1, 2, 3)), jnp.float32)
    loss = lambda x: -jnp.sum((x - goal) ** 2)  # noqa: E731
    start = jnp.asarray(RNG.normal(size=(1, 1, 2, 3)) + 5, jnp.float32)
    moved = ascend(loss, start, 4, 0.1, 10, lambda x: x)
    np.testing.assert_allclose(np.linalg.norm(moved - start, axis=-1), 0.4, rtol=1e-3)
    assert loss(moved) > loss(start)
    projected = ascend(loss, start, 4, 0.1, 2, lambda x: x * 0)
    np.testing.assert_array_equal(projected, jnp.zeros_like(start))


def test_sspcab_sees_only_the_corners_around_a_position():
    block, x = Sspcab(), jnp.asarray(RNG.normal(size=(1, 9, 9, 16)), jnp.float32)
    variables = block.init(jax.random.key(0), x)
    assert block.apply(variables, x).shape == x.shape

    def center_output(x):  # its attention averages over all positions, and so has small gradients
        corners = [variables["params"][f"corner{i}"] for i in range(4)]
        return sum(p["kernel"][0, 0].sum() for p in corners) + block.apply(variables, x)[0, 4, 4].sum()

    slope = np.abs(np.asarray(jax.grad(center_output)(x))[0]).sum(-1)
    corners = {(2, 2), (2, 6), (6, 2), (6, 6)}
    largest = {tuple(map(int, np.unravel_index(i, slope.shape))) for i in np.argsort(slope.ravel())[-4:]}
    assert largest <= corners and slope[4, 4] < 0.2 * slope.max()


def test_sspcab_in_numpy():
    block, x = Sspcab(), jnp.asarray(RNG.normal(size=(2, 5, 6, 16)), jnp.float32)
    variables = block.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    padded, output = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))), 0
    for i, (down, right) in enumerate(((0, 0), (4, 0), (0, 4), (4, 4))):
        corner = padded[:, down : down + 5, right : right + 6]
        output = output + corner @ params[f"corner{i}"]["kernel"][0, 0] + params[f"corner{i}"]["bias"]
    output = np.maximum(output, 0)
    hidden = np.maximum(output.mean((1, 2)) @ params["squeeze"]["kernel"] + params["squeeze"]["bias"], 0)
    weight = 1 / (1 + np.exp(-(hidden @ params["excite"]["kernel"] + params["excite"]["bias"])))
    np.testing.assert_allclose(block.apply(variables, x), output * weight[:, None, None], rtol=1e-4, atol=1e-5)


def test_unit_vectors_and_the_gradient_of_zeros():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit(x).sum())(x)).all()
