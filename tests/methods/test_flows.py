"""The methods of the family of flows: losses, scores and heat maps against numpy and scipy."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from scipy.special import expit

from jaxad.backbones import backbone
from jaxad.base import Batch
from jaxad.data import Preprocess, open_data
from jaxad.driver.execution import Checkpoint, Execution
from jaxad.driver.fit import fit
from jaxad.driver.record import NonFiniteLoss
from jaxad.methods.cflow import CflowState, cflow, position_encoding, warm_up_cosine
from jaxad.methods.csflow import csflow, features_of_scales
from jaxad.methods.differnet import differnet, rotate
from jaxad.methods.fastflow import fastflow

KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def spec_of(x: Any, n: int = 8) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), x)


def batch_of(x: Any, n: int, progress: float = 0.5) -> Batch:
    zeros = jnp.zeros(n, jnp.int32)
    return Batch(x, jnp.ones(n, bool), zeros, None, jnp.arange(n, dtype=jnp.int32), jnp.float32(progress))


def begin(method: Any, x: Any) -> Any:
    """The training state before the first step."""
    return jax.jit(lambda key: method.stages[0].init(key, None, None, spec_of(x)))(KEY)


def without_networks(training: Any) -> Any:
    """The training state with networks whose output is zero."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "subnet" in jax.tree_util.keystr(path) else leaf, training.model.params
    )
    return training._replace(model=training.model._replace(params=params))


def train(method: Any, x: Any, n: int, steps: int) -> tuple[Any, list[float]]:
    """The model after some steps, and their losses."""
    state = begin(method, x)
    update, losses = jax.jit(method.stages[0].update), []
    for step in range(steps):
        state, metrics = update(jax.random.fold_in(KEY, step), state, None, batch_of(x, n, step / steps))
        losses.append(float(metrics["loss"]))
    return state.model, losses


def test_fastflow_before_training():
    """A flow near the identity: the loss and the likelihoods are those of the normalized features."""
    method = fastflow(backbone="pdn_small", layers=("layer1",), image_size=(8, 8), flow_steps=2, epochs=1)
    x = {"layer1": 3 * normal(0, 4, 4, 4, 6) + 1}
    state = without_networks(begin(method, x))
    features = np.asarray(x["layer1"], np.float64)
    mean, std = (f(features, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.std))
    features = (features - mean) / np.sqrt(std**2 + 1e-5)
    _, metrics = jax.jit(method.stages[0].update)(KEY, state, None, batch_of(x, 4))
    np.testing.assert_allclose(metrics["loss"], 0.5 * (features**2).sum((1, 2, 3)).mean(), rtol=1e-4)
    scores = jax.jit(method.score)(state.model, None, x)
    likelihood = np.exp(-0.5 * (features**2).mean(-1))
    corner = scores.pixel[:, 0, 0]  # bilinear upsampling repeats the border
    np.testing.assert_allclose(corner, 1 - likelihood[:, 0, 0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(scores.image, scores.pixel.max((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "x"),
    [
        (
            fastflow(
                backbone="pdn_small", layers=("layer1",), image_size=(8, 8), flow_steps=2, epochs=1, learning_rate=1e-2
            ),
            {"layer1": 3 * normal(1, 4, 4, 4, 6)},
        ),
        (
            cflow(
                backbone="pdn_small",
                layers=("layer1",),
                image_size=(8, 8),
                coupling_blocks=2,
                condition_size=8,
                fiber_batch_size=16,
                learning_rate=1e-2,
            ),
            {"layer1": 3 * normal(1, 4, 4, 4, 6)},
        ),
        (
            csflow(backbone="pdn_small", image_size=(8, 8), coupling_blocks=2, hidden=8, learning_rate=1e-2),
            tuple(3 * normal(i, 4, 8 // 2**i, 8 // 2**i, 6) for i in range(3)),
        ),
    ],
)
def test_training_raises_the_likelihood(method, x):
    _, losses = train(method, x, 4, 12)
    assert losses[-1] < losses[0] - 0.01 * abs(losses[0])


def test_position_encoding_is_that_of_the_paper():
    h, w, size = 3, 5, 8
    encoding = np.asarray(jax.jit(position_encoding, static_argnums=(0, 1, 2))(h, w, size))
    for y in range(h):
        for x in range(w):
            for i in range(size // 4):
                rate = 10_000 ** (-2 * i / (size // 2))
                column, row = ([np.sin(n * rate), np.cos(n * rate)] for n in (x, y))
                np.testing.assert_allclose(encoding[y, x, 2 * i : 2 * i + 2], column, atol=1e-5)
                np.testing.assert_allclose(encoding[y, x, size // 2 + 2 * i : size // 2 + 2 * i + 2], row, atol=1e-5)


def test_the_learning_rate_warms_up_and_falls():
    rates = np.asarray(jax.jit(jax.vmap(warm_up_cosine))(jnp.linspace(0, 1, 101)))
    assert rates[0] == pytest.approx(0.1) and rates.argmax() in (8, 9) and rates[-1] == pytest.approx(1e-3, rel=1e-3)
    assert (np.diff(rates[9:]) < 0).all() and (np.diff(rates[:8]) > 0).all()


def test_cflow_calibrates_on_the_training_images():
    """No training position has a likelihood above 1, and one at each level has exactly 1."""
    method = cflow(
        backbone="pdn_small", layers=("layer1",), image_size=(4, 4), coupling_blocks=2, condition_size=8, epochs=1
    )
    x = {"layer1": normal(2, 6, 4, 4, 6)}
    stage = method.stages[1]
    state = jax.jit(lambda flow: stage.init(KEY, flow, None, spec_of(x)))(begin(method, x).model)
    assert isinstance(state, CflowState) and state.largest["layer1"] == -jnp.inf
    for rows in (slice(3), slice(3, 6)):
        batch = batch_of(jax.tree.map(lambda leaf, rows=rows: leaf[rows], x), 3)
        state, _ = jax.jit(stage.update)(KEY, state, None, batch)
    outlier = batch_of({"layer1": jnp.full((3, 4, 4, 6), jnp.nan)}, 3)._replace(valid=jnp.zeros(3, bool))
    state, _ = jax.jit(stage.update)(KEY, state, None, outlier)
    scores = jax.jit(method.score)(state, None, x)
    np.testing.assert_allclose(scores.pixel.min(), 0, atol=1e-5)
    far = jax.jit(method.score)(state, None, jax.tree.map(lambda leaf: leaf + 30, x))
    np.testing.assert_allclose(far.image, 1, atol=1e-3)


def test_cflow_loss_is_the_log_sigmoid_of_the_likelihood():
    """With networks whose output is zero the flow is a rotation."""
    method = cflow(
        backbone="pdn_small", layers=("layer1",), image_size=(4, 4), coupling_blocks=1, condition_size=8, epochs=1
    )
    x = {"layer1": normal(3, 2, 4, 4, 6)}
    _, metrics = jax.jit(method.stages[0].update)(KEY, without_networks(begin(method, x)), None, batch_of(x, 2))
    log_p = -0.5 * (np.asarray(x["layer1"]) ** 2).mean(-1) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(metrics["loss"], -np.log(expit(log_p)).mean(), rtol=1e-4)


def test_cflow_steps_once_per_batch_of_fibers():
    """Every level has its own Adam; an incomplete last batch of fibers is dropped."""
    method = cflow(
        backbone="pdn_small",
        layers=("layer1", "layer2"),
        image_size=(8, 8),
        coupling_blocks=1,
        condition_size=4,
        fiber_batch_size=10,
    )
    x = {"layer1": normal(4, 2, 4, 4, 4), "layer2": normal(5, 2, 2, 2, 6)}
    state, metrics = jax.jit(method.stages[0].update)(KEY, begin(method, x), None, batch_of(x, 2))
    counts = [[int(leaf) for leaf in jax.tree.leaves(adam) if leaf.ndim == 0] for adam in state.optimizer]
    assert counts == [[3], [1]]  # of 32 and 8 positions
    np.testing.assert_allclose(metrics["loss"], (metrics["layer1_loss"] + metrics["layer2_loss"]) / 2, rtol=1e-6)


def test_csflow_needs_scales_that_halve():
    method = csflow(backbone="pdn_small", image_size=(20, 20))
    maps = tuple(jax.ShapeDtypeStruct((4, n, n, 6), jnp.float32) for n in (5, 3, 2))
    with pytest.raises(ValueError, match="multiple of four times the stride of layer3"):
        method.stages[0].init(KEY, None, None, maps)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0, 217.0])
def test_rotation_is_that_of_scipy(degrees):
    image = np.random.default_rng(0).random((1, 12, 12, 3)).astype(np.float32)
    expected = scipy.ndimage.rotate(image[0], degrees, reshape=False, order=1, mode="constant")
    inside = scipy.ndimage.rotate(np.ones((12, 12)), degrees, reshape=False, order=1, mode="constant") > 0.999
    rotated = np.asarray(jax.jit(rotate)(jnp.asarray(image), jnp.float32(degrees)))[0]
    np.testing.assert_allclose(rotated[inside], expected[inside], atol=1e-3)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_last_coupling_of_csflow_has_larger_kernels(blocks):
    method = csflow(backbone="pdn_small", layer="layer1", image_size=(64, 64), coupling_blocks=blocks, hidden=2)
    maps = tuple(jax.ShapeDtypeStruct((2, n, n, 4), jnp.float32) for n in (8, 4, 2))
    params = jax.eval_shape(lambda key: method.stages[0].init(key, None, None, maps), KEY).model.params
    kernels = [{leaf.shape[0] for leaf in jax.tree.leaves(block) if leaf.ndim == 4} for block in params]
    assert kernels == [{3}] * (blocks - 1) + [{5}]


def test_csflow_takes_the_layer_of_the_paper():
    """Block 35 of EfficientNet-B5, the last of its sixth group."""
    method = inspect.unwrap(csflow)(backbone="tf_efficientnet_b5")
    assert method.embed is features_of_scales(backbone("tf_efficientnet_b5"), "blocks.5")


@pytest.mark.parametrize(
    ("factory", "hyperparameter", "message"),
    [
        (fastflow, {"flow_steps": 3}, "flow_steps must be even, or conv3x3_only be set, got 3"),
        (fastflow, {"clamp": 0.0}, "clamp must be above 0, got 0"),
        (cflow, {"condition_size": 6}, "condition_size must be a multiple of 4, got 6"),
        (cflow, {"fiber_batch_size": 0}, "fiber_batch_size must be 1 or more, got 0"),
        (csflow, {"hidden": 0}, "hidden must be 1 or more, got 0"),
        (differnet, {"train_rotations": 65}, "train_rotations must be within 1..64"),
        (differnet, {"epochs": 0}, "epochs must be 1 or more, got 0"),
        (differnet, {"sigma": -1.0}, "sigma must be 0 or more, got -1"),
        (csflow, {"weight_decay": -1e-5}, "weight_decay must be 0 or more, got -1e-05"),
    ],
)
def test_bad_hyperparameters(factory, hyperparameter, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(factory)(**{"backbone": "pdn_small"} | hyperparameter)


@pytest.mark.slow
def test_fastflow_learns_no_norm_for_a_transformer():
    """Its features have passed the network's own: before training the loss is that of the features themselves."""
    name, layer = "deit_tiny_distilled_patch16_224", "blocks.0"
    method = fastflow(backbone=name, layers=(layer,), image_size=(32, 32), flow_steps=2, hidden_ratio=0.16)
    image = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    frozen = jax.tree.map(lambda leaf: normal(1, *leaf.shape), jax.eval_shape(backbone(name).init, KEY))
    x = jax.jit(method.embed)(frozen, image)
    state = without_networks(begin(method, x))
    assert set(state.model.params[layer]) == {"blocks"}
    _, metrics = jax.jit(method.stages[0].update)(KEY, state, None, batch_of(x, 4))
    features = np.asarray(x[layer], np.float64)
    np.testing.assert_allclose(metrics["loss"], 0.5 * (features**2).sum((1, 2, 3)).mean(), rtol=1e-4)

    flows, losses = train(method, x, 4, 8)
    assert losses[-1] < losses[0]
    scores = jax.jit(method.score)(flows, None, x)
    assert scores.pixel.shape == (4, 32, 32)
    assert jnp.isfinite(scores.image).all() and jnp.isfinite(scores.pixel).all()


@pytest.mark.slow
def test_a_diverging_flow_reports_its_step_and_keeps_the_checkpoint_before_it(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    data, frozen = open_data(images, preprocess=Preprocess(None))["arrays"].train, backbone("pdn_small").init(KEY)
    size: Any = dict(layers=("layer2",), image_size=(64, 64), conv3x3_only=True, epochs=4, train_batch_size=4)
    diverges = pytest.raises(NonFiniteLoss, match=r"got (inf|nan) in stage train, epoch \d+, step \d+: lower")
    with diverges:
        fit(fastflow(backbone="pdn_small", learning_rate=100 * 1e-3, **size), frozen, data, KEY)

    def interrupt_at(step: int, steps: list[int]) -> Callable:
        def progress(part: str, done: int, total: int) -> None:
            steps.append(done // 4)
            if done // 4 >= step:
                raise KeyboardInterrupt

        return progress

    def flow(learning_rate: float) -> Any:
        return fastflow(backbone="pdn_small", flow_steps=2, learning_rate=learning_rate, **size)

    execution = Execution(checkpoint=Checkpoint(tmp_path, seconds=0))
    with pytest.raises(KeyboardInterrupt):
        fit(flow(1e-3), frozen, data, KEY, execution._replace(progress=interrupt_at(3, [])))
    with diverges as error:
        fit(flow(1e6), frozen, data, KEY, execution)
    last = int(re.search(r"step (\d+)", str(error.value))[1]) - 2  # the last step with a finite loss after it
    assert last >= 2 and max(int(path.name) for path in (tmp_path / "classes_0").iterdir()) == last
    resumed: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fit(flow(1e-3), frozen, data, KEY, execution._replace(progress=interrupt_at(last + 1, resumed)))
    assert resumed == [last, last + 1]  # with a lower learning rate it continues
