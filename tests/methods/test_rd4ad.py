"""RD4AD: its loss and heat map against numpy on given features, and the parameters of the official networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Batch
from jaxad.methods.rd4ad import LAYERS, Reverse, rd4ad
from jaxad.ops.heatmap import upsample_blur
from tests.tiny import TINY_RESNET

KEY = jax.random.key(0)
SHAPES = {"layer1": (8, 8, 4), "layer2": (4, 4, 6), "layer3": (2, 2, 8)}
X = {
    layer: jnp.abs(jnp.asarray(np.random.default_rng(i).normal(size=(3, *shape)), jnp.float32))
    for i, (layer, shape) in enumerate(SHAPES.items())
}
"""Maps of images of 32 px, with few channels."""
MODULE = Reverse((4, 6, 8), (1, 1, 1, 1), 1.0)


def cosine_distance(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.maximum(np.linalg.norm(a, axis=-1), 1e-8) * np.maximum(np.linalg.norm(b, axis=-1), 1e-8)
    return 1 - (a * b).sum(-1) / norms


@pytest.fixture(scope="module")
def method():
    return rd4ad(backbone=TINY_RESNET, image_size=(32, 32), sigma=1.0, learning_rate=1e-3)


@pytest.fixture(scope="module")
def state(method):
    spec = {layer: jax.ShapeDtypeStruct((3, *shape), jnp.float32) for layer, shape in SHAPES.items()}
    return jax.jit(lambda key: method.stages[0].init(key, None, None, spec))(KEY)


def test_loss_is_the_cosine_distance_of_whole_maps(method, state):
    variables = {"params": state.model.params, "batch_stats": state.model.stats}
    maps, changes = jax.jit(functools.partial(MODULE.apply, train=True, mutable=["batch_stats"]))(variables, X)
    assert {layer: m.shape[1:] for layer, m in maps.items()} == SHAPES
    expected = sum(cosine_distance(X[layer].reshape(3, -1), maps[layer].reshape(3, -1)).mean() for layer in LAYERS)
    index = jnp.arange(3, dtype=jnp.int32)
    batch = Batch(X, jnp.ones(3, bool), jnp.zeros(3, jnp.int32), None, index, jnp.float32(0))
    update = jax.jit(method.stages[0].update)
    state, metrics = update(KEY, state, None, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(check, state.model.stats, changes["batch_stats"])
    for _ in range(5):
        state, metrics = update(KEY, state, None, batch)
    assert metrics["loss"] < 0.9 * expected


def test_heat_map_is_the_sum_of_smoothed_cosine_distances(method, state):
    fitted = method.stages[0].finalize(KEY, state, None)
    variables = {"params": fitted.params, "batch_stats": fitted.stats}
    maps = jax.jit(functools.partial(MODULE.apply, train=False))(variables, X)
    scores = jax.jit(method.score)(fitted, None, X)
    distances = (jnp.asarray(cosine_distance(X[layer], maps[layer]), jnp.float32) for layer in LAYERS)
    expected = sum(np.asarray(upsample_blur(d, (32, 32), 1.0)) for d in distances)
    np.testing.assert_allclose(scores.pixel, expected, atol=1e-4)
    np.testing.assert_allclose(scores.image, np.asarray(scores.pixel).max((1, 2)))


def test_image_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 32, got \(60, 64\)"):
        rd4ad(backbone="resnet18", image_size=(60, 64))


@pytest.mark.parametrize(("blocks", "width"), [((2, 2, 2, 2), 1.0), ((3, 3, 4, 6), 0.5)])
def test_networks_have_the_official_parameters(blocks, width):
    """Kernels (size, input and output channels) of the bottleneck and decoder as in resnet.py and de_resnet.py."""
    c1, c2, c3 = 8, 16, 32
    module = Reverse((c1, c2, c3), blocks, width)
    shapes = {"layer1": (8, 16, c1), "layer2": (4, 8, c2), "layer3": (2, 4, c3)}
    x = {layer: jnp.zeros((1, *shape)) for layer, shape in shapes.items()}
    maps, variables = jax.eval_shape(lambda: module.init_with_output(KEY, x, train=True))
    assert {layer: leaf.shape[1:] for layer, leaf in maps.items()} == shapes

    def block(inputs: int, outputs: int, scale: str) -> list[tuple[int, ...]]:
        inner = int(outputs * width)
        resize = 2 if scale == "up" else None
        if width == 1:
            kernels = [(resize or 3, inputs, outputs), (3, outputs, outputs)]
        else:
            kernels = [(1, inputs, inner), (resize or 3, inner, inner), (1, inner, outputs)]
        return kernels if scale == "same" else [*kernels, (resize or 1, inputs, outputs)]

    expected = [(3, c1, c2), (3, c2, c3), (3, c2, c3)]
    inputs = 3 * c3
    for n, outputs, scale in zip(blocks, (2 * c3, c3, c2, c1), ("down", "up", "up", "up"), strict=True):
        for i in range(n):
            expected += block(inputs, outputs, "same" if i else scale)
            inputs = outputs
    kernels = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if len(leaf.shape) == 4]
    assert sorted((k[0], k[2], k[3]) for k in kernels) == sorted(expected)
