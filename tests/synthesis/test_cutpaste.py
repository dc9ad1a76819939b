"""CutPaste: the pasted pixels are a rectangle of the image, of the published size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from jaxad.synthesis import cutpaste
from tests.synthesis.inputs import SEEDS, noise

STRAIGHT, ROTATED = (jax.jit(functools.partial(cutpaste.cutpaste, degrees=d, jitter=0.0)) for d in (0.0, 45.0))
SCAR = jax.jit(cutpaste.scar)


def touches_border(mask: np.ndarray) -> bool:
    return mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_cutpaste_pastes_a_rectangle_of_the_image(seed):
    image = noise(seed)
    output, mask = (np.asarray(x) for x in STRAIGHT(jax.random.key(seed), image))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    h, w = len(rows), len(columns)
    assert mask.sum() == h * w and 0.3 * 0.8 < h / w < 1 / (0.3 * 0.8)
    assert 0.02 * 0.8 < mask.mean() < 0.15 * 1.2
    patch = output[rows[0] : rows[0] + h, columns[0] : columns[0] + w]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), (h, w, 3))[:, :, 0]
    assert (windows == patch).all((2, 3, 4)).any()


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_a_scar_has_the_published_size(seed):
    mask = np.asarray(SCAR(jax.random.key(seed), jnp.full((256, 256, 3), 0.5))[1])
    assert mask.sum() <= 17 * 26 and (touches_border(mask) or mask.sum() >= 2 * 10 * 0.7)
    assert np.ptp(np.flatnonzero(mask.any(1))) <= 32 and np.ptp(np.flatnonzero(mask.any(0))) <= 32


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_a_rotated_rectangle_is_complete_and_shows_the_image(seed):
    """The computed window cuts nothing off, and the patch is the one that is pasted without a rotation."""
    image = jnp.asarray(np.random.default_rng(seed).permutation(96 * 96).reshape(96, 96, 1) * np.ones(3), jnp.float32)
    (straight, straight_mask), (rotated, mask) = (
        [np.asarray(x) for x in paste(jax.random.key(seed), image)] for paste in (STRAIGHT, ROTATED)
    )
    if not touches_border(mask):
        np.testing.assert_allclose(mask.sum(), straight_mask.sum(), rtol=0.1, atol=8)
    assert np.isin(rotated[mask][:, 0], straight[straight_mask][:, 0]).mean() > 0.99


def test_three_way():
    images, masks = jax.jit(cutpaste.three_way)(jax.random.key(0), noise(0))
    np.testing.assert_array_equal(images[0], noise(0))
    assert not masks[0].any() and masks[1].sum() > masks[2].sum() > 0
