"""DRAEM: it learns, and which image sizes it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.draem import draem
from tests.methods import plain

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
SMALL = dict(image_size=(32, 32), reconstructive_width=2, discriminative_width=2, learning_rate=1e-3)


def batch_of(images, progress=0.0, auxiliary=None):
    n = len(images)
    index = jnp.arange(n, dtype=jnp.int32)
    progress = jnp.float32(progress)
    return Batch(jnp.asarray(images), jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, index, progress, auxiliary)


def initial(method):
    return plain.fresh(jax.eval_shape(lambda: method.stages[0].init(KEY, None, None, None)))


@pytest.mark.slow
@pytest.mark.parametrize("sspcab", [False, True])
def test_it_learns_with_and_without_textures(sspcab):
    method = draem(**SMALL | dict(learning_rate=1e-2), sspcab=sspcab)
    textures = jnp.asarray(np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8))
    batch = batch_of(IMAGES // 8 + 100, auxiliary=textures if sspcab else None)
    state, update = initial(method), jax.jit(method.stages[0].update)
    losses = []
    for i in range(30):
        state, metrics = update(jax.random.key(i), state, None, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_image_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 32, got \(60, 64\)"):
        draem(image_size=(60, 64))
