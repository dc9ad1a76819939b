"""GLASS against glass.py of cqylunlun/GLASS, with given maps in place of its backbone.

Commit f788d56. Called are `GLASS._train_discriminator`, three times for a batch with a given mask of the texture, and
`_predict`; `torch.normal` gives the same noise as `jax.random.normal` here. The center is computed before every step.
Both stages have as many channels, so that the reference's pooling to that number is the mean of a neighborhood. The
biases in front of the batch norm stay zero, and its running variance is the biased one of the batches, as jaxad's.
"""

import importlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.golden import Golden, normal, synthetic
from tests.parity.steps import KEY, batch_of, follow, from_torch, gradient, shapes_of, to_torch, under
from tests.tiny import TINY_RESNET

module = importlib.import_module("jaxad.methods.glass")
IMAGES, CHANNELS, SIZE = 3, 6, (32, 32)
LAYERS = {"layer1": 8, "layer2": 4}
NAMES = {
    "adaptor": "layers.0fc.weight",
    "discriminator/hidden/kernel": "body.block1.0.weight",
    "discriminator/norm/scale": "body.block1.1.weight",
    "discriminator/norm/bias": "body.block1.1.bias",
    "discriminator/head/kernel": "tail.0.weight",
    "norm/mean": "body.block1.1.running_mean",
    "norm/var": "body.block1.1.running_var",
}
"""Of the tensors of the reference's projection and discriminator."""


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """That of `synthetic`, but for the last weights, which are of both signs."""
    return normal("tail", *shape) / 2 if name.startswith("tail") else synthetic(name, shape)


def maps(name: str) -> dict[str, np.ndarray]:
    """The stages of an image, by layer."""
    return {
        layer: np.moveaxis(normal(f"{name} {i + 1}", IMAGES, CHANNELS, side, side), 1, -1)
        for i, (layer, side) in enumerate(LAYERS.items())
    }


def run(hypothesis: str) -> dict[str, Any]:
    """All quantities under one hypothesis."""
    network = TINY_RESNET._replace(apply=lambda frozen, image, layers: {layer: frozen[layer] for layer in layers})
    options = dict(layers=tuple(LAYERS), image_size=SIZE, hidden=8, learning_rate=1e-2)
    method = module.glass(backbone=network, hypothesis=hypothesis, **options)
    measure, train = method.stages
    x, frozen = maps("normal") | {"image": np.zeros((IMAGES, *SIZE, 3), np.uint8)}, maps("anomalous")
    total, _ = jax.jit(measure.update)(KEY, shapes_of(measure, x), frozen, batch_of(x))
    mean = measure.finalize(KEY, total, frozen)
    start = shapes_of(train, x, mean)
    params, stats = (from_torch(tree, NAMES.__getitem__, tensor) for tree in start.model[:2])
    start = start._replace(model=module.GlassTraining(params, stats, mean))
    states, losses = follow(train, start, [batch_of(x)] * 3, frozen)
    scores = jax.jit(method.score)(train.finalize(KEY, states[-1], frozen), frozen, maps("test"))
    gradients = [to_torch(part, NAMES.__getitem__) for part in gradient(states[0])]
    last = states[-1].model
    return {
        f"loss/{hypothesis}": np.asarray(losses),
        **under(f"gradient/{hypothesis}", gradients[0] | gradients[1]),
        **under(f"parameters after 3 steps/{hypothesis}", to_torch(last.params, NAMES.__getitem__)),
        **under(f"statistics after 3 steps/{hypothesis}", to_torch(last.stats, NAMES.__getitem__)),
        f"score/{hypothesis}": scores.image,
        f"heat map/{hypothesis}": scores.pixel,
    }


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    mask, noise = np.zeros(SIZE, bool), normal("noise", IMAGES * 64, 2 * CHANNELS).reshape(IMAGES, 8, 8, -1)
    mask[4:14, 6:22] = True
    draws = {
        "random_shape": lambda key, allowed: jnp.asarray(mask),
        "source": lambda key, size, *_: jnp.zeros((*size, 3)),
    }
    with (
        mock.patch.multiple(module, **draws),
        mock.patch.object(jax.random, "normal", lambda key, shape=(): jnp.asarray(noise) if shape else jnp.zeros(())),
    ):
        return run("manifold") | run("hypersphere")
