"""SimpleNet against simplenet.py of DonaldRR/SimpleNet, with given maps in place of its backbone.

Commit 351a2b8. Called are `SimpleNet._train_discriminator`, three times for a batch, and `_predict`; `torch.normal`
gives the same noise as `jax.random.normal` here. Both stages have as many channels, so that the reference's pooling to
that number is the mean of a neighborhood. The biases in front of the batch norm stay zero. jaxad's variances of batches
are biased: they are corrected before images are scored.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.methods.simplenet import SimplenetNetworks, simplenet
from tests.parity.glass import CHANNELS, IMAGES, LAYERS, NAMES, SIZE, maps, tensor
from tests.parity.golden import Golden, normal
from tests.parity.steps import batch_of, follow, from_torch, gradient, shapes_of, to_torch, unbiased, under

POSITIONS = 64
TENSORS = NAMES | {"discriminator/head/kernel": "tail.weight"}


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    method = simplenet(
        backbone="resnet18",
        layers=tuple(LAYERS),
        image_size=SIZE,
        hidden=8,
        noise=0.5,
        learning_rate=1e-2,
        adaptor_learning_rate=1e-2,
    )
    x, noise = maps("normal"), normal("noise", IMAGES * POSITIONS, 2 * CHANNELS)
    start = shapes_of(method.stages[0], x)
    params, stats = (from_torch(tree, TENSORS.__getitem__, tensor) for tree in start.model)
    start = start._replace(model=SimplenetNetworks(params, stats))
    with mock.patch.object(jax.random, "normal", lambda key, shape: jnp.asarray(noise.reshape(shape))):
        states, losses = follow(method.stages[0], start, [batch_of(x)] * 3)
    last = states[-1].model
    last = last._replace(stats=unbiased(last.stats, stats, lambda _: 2 * IMAGES * POSITIONS))
    scores = jax.jit(method.score)(last, None, maps("test"))
    adaptor, discriminator = (to_torch(part, TENSORS.__getitem__) for part in gradient(states[0]))
    return {
        "loss": np.asarray(losses),
        **under("gradient", adaptor | discriminator),
        **under("parameters after 3 steps", to_torch(last.params, TENSORS.__getitem__)),
        **under("statistics after 3 steps", to_torch(last.stats, TENSORS.__getitem__)),
        "score": scores.image,
        "heat map": scores.pixel,
    }
