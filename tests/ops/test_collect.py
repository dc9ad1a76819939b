"""Collecting rows of images against plain indexing in numpy; on meshes see test_sharding.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.ops.collect import all_patches, collect, collect_positions, image_first, valid_first

IMAGES = np.random.default_rng(0).normal(size=(7, 4, 3)).astype(np.float32)
ORDER = np.array([5, 0, 6, 2, 3, 1])
"""Image 4 is never seen."""


def batches(images, size):
    """Batches in the order above, the last of which ends with NaN as padding."""
    for start in range(0, len(ORDER), size):
        index = ORDER[start : start + size]
        padding = size - len(index)
        values = np.concatenate([images[index], np.full((padding, *images.shape[1:]), np.nan, np.float32)])
        valid, index = np.arange(size) < len(index), np.pad(index, (0, padding)).astype(np.int32)
        yield values, Batch(None, jnp.asarray(valid), jnp.zeros(size, jnp.int32), None, jnp.asarray(index))


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_images_first(size):
    buffer, seen = jnp.zeros(IMAGES.shape), jnp.zeros(7, bool)
    for values, batch in batches(IMAGES, size):
        buffer, seen = (jax.jit(collect)(old, new, batch) for old, new in ((buffer, values), (seen, batch.valid)))
    np.testing.assert_array_equal(seen, np.arange(7) != 4)
    np.testing.assert_array_equal(buffer, np.where(np.arange(7)[:, None, None] != 4, IMAGES, 0))


@pytest.mark.parametrize("size", [1, 4])
def test_positions_first(size):
    buffer = jnp.zeros((4, 7, 3), jnp.float16)
    for values, batch in batches(IMAGES, size):
        buffer = jax.jit(collect_positions)(buffer, values, batch)
    expected = np.where(np.arange(7)[:, None, None] != 4, IMAGES, 0).astype(np.float16)
    np.testing.assert_array_equal(image_first(buffer), expected)
    np.testing.assert_array_equal(buffer, expected.swapaxes(0, 1))


def test_all_patches_are_ordered_by_position():
    seen = np.arange(7) != 4
    patches, valid = all_patches(jnp.asarray(IMAGES.swapaxes(0, 1)), jnp.asarray(seen))
    np.testing.assert_array_equal(patches, IMAGES.swapaxes(0, 1).reshape(28, 3))
    np.testing.assert_array_equal(valid, np.tile(seen, 4))


def test_valid_rows_move_to_the_front():
    rows, valid = IMAGES[:, 0], np.array([0, 1, 0, 1, 1, 0, 0], bool)
    first = jax.jit(valid_first, static_argnums=2)(jnp.asarray(rows), jnp.asarray(valid), 5)
    np.testing.assert_array_equal(first, rows[[1, 3, 4, 0, 2]])
