"""STFPM: the folding of batch norms in bottlenecks, and which backbones it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import ResidualBlocks, resnet, student
from jaxad.methods.stfpm import stfpm

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def batch_statistics(before, after):
    """The mean and variance of one batch, from running statistics before and after it."""
    return jax.tree.map(lambda old, new: (new - 0.9 * old) / 0.1, before, after)


def train_maps(learner, params, stats, frozen, images):
    return jax.jit(learner.apply, static_argnames="train")(params, stats, frozen, images, train=True)


def test_batch_norm_of_the_original_resnet_is_folded_too():
    """Bottlenecks as in Caffe, where the stride of a block is in its first convolution."""
    network = resnet.make("caffe", ResidualBlocks((1, 2, 1, 1), 0.5, 16), stride_in_1x1=True)
    layers, images = ("layer2",), jnp.asarray(IMAGES)
    learner = student(network, layers)
    frozen = network.init(KEY)
    params, before = jax.jit(learner.init)(KEY)
    maps, after = train_maps(learner, params, before, frozen, images)
    folded_params = learner.freeze(params, batch_statistics(before, after))
    folded = jax.jit(network.apply, static_argnums=2)(frozen | {"params": folded_params}, images, layers)
    np.testing.assert_allclose(folded["layer2"], maps["layer2"], atol=2e-3 * float(maps["layer2"].max()))


def test_a_student_must_be_a_resnet():
    with pytest.raises(ValueError, match="the backbone must be a ResNet, got pdn_small"):
        stfpm(backbone="pdn_small")
