"""What holds for every generator: the mask covers the change, and a key gives the same anomaly alone and in a vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import ndimage

from jaxad.synthesis import anomaly, cutpaste, nsa, perlin, texture
from tests.examples import slow_outside
from tests.synthesis.inputs import SEEDS, SIZE, SOURCE, noise


def inverted(image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The image, inverted inside the mask."""
    return jnp.where(mask[..., None], 1 - image, image), mask


def with_texture(key: jax.Array, image: jax.Array) -> anomaly.Anomalous:
    anomaly_key, texture_key = jax.random.split(key)
    return anomaly.add_texture(anomaly_key, image, texture.source(texture_key, SIZE, None, texture.BOLD_CHANGES))


def with_tiles(key: jax.Array, image: jax.Array) -> anomaly.Anomalous:
    anomaly_key, tiles_key = jax.random.split(key)
    foreground = anomaly.foreground(image)
    return anomaly.add_texture(anomaly_key, image, anomaly.shuffled_tiles(tiles_key, image), foreground=foreground)


GENERATORS = {
    "cutpaste": cutpaste.cutpaste,
    "cutpaste rotated": functools.partial(cutpaste.cutpaste, degrees=45.0),
    "scar": cutpaste.scar,
    "textured": lambda key, image: anomaly.add_texture(key, image, SOURCE),
    "procedural texture": with_texture,
    "shuffled": with_tiles,
    "mask": lambda key, image: inverted(image, perlin.perlin_mask(key, SIZE)),
    "fractal mask": lambda key, image: inverted(image, perlin.perlin_mask(key, SIZE, octaves=3)),
    "three-way": lambda key, image: jax.tree.map(lambda x: x[1], cutpaste.three_way(key, image)),
    "confetti": anomaly.confetti,
    "natural": lambda key, image: nsa.natural_anomaly(key, image, SOURCE, pieces=2),
    "natural mixed": lambda key, image: nsa.natural_anomaly(key, image, SOURCE, pieces=2, mixed=True, labels="binary"),
}


SLOW = ("procedural texture", "natural mixed", "fractal mask", "cutpaste rotated")
"""Those that compile long, and others take nearly the same path."""


@functools.cache
def one_by_one(name: str):
    return jax.jit(GENERATORS[name])


@functools.cache
def at_once(name: str):
    return jax.jit(jax.vmap(GENERATORS[name]))


every_generator = pytest.mark.parametrize("name", slow_outside({*GENERATORS} - {*SLOW}, GENERATORS))


@every_generator
@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_the_mask_covers_the_changed_pixels(name, seed):
    image = noise(seed)
    output, mask = one_by_one(name)(jax.random.key(seed), image)
    assert output.shape == image.shape and output.dtype == jnp.float32 and mask.shape == SIZE
    assert float(output.min()) >= 0 and float(output.max()) <= 1
    changed = np.asarray(jnp.abs(output - image).max(-1)) > 1e-6
    anomalous = np.asarray(mask) > 0
    if name.startswith("natural"):  # the label is smoothed, and leaves out changes of less than a level
        outside = ndimage.minimum_filter(~anomalous, 5)
        assert (np.abs(output - image).mean(-1)[outside] <= 2 / 255).mean() > 0.9
        assert not anomalous[~ndimage.maximum_filter(changed, 5)].any()
    else:
        assert not changed[~anomalous].any() and (~changed)[anomalous].sum() <= 0.02 * anomalous.sum()


@every_generator
def test_vmap_is_a_loop(name):
    one = one_by_one(name)
    keys, images = jax.random.split(jax.random.key(3), 4), jnp.stack([noise(i) for i in range(4)])
    outputs, masks = at_once(name)(keys, images)
    for i in range(4):
        output, mask = one(keys[i], images[i])
        np.testing.assert_allclose(outputs[i], output, atol=2e-3)
        assert (np.abs(np.asarray(masks[i], np.float32) - np.asarray(mask, np.float32)) < 1e-2).mean() > 0.99
    np.testing.assert_array_equal(one(keys[0], images[0])[0], one(keys[0], images[0])[0])
    assert len({np.asarray(one(key, images[0])[0]).tobytes() for key in keys}) > 1
