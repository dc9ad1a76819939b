"""NF: its likelihoods against closed forms, and against the bound that no density beats."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxad.base import Batch
from jaxad.methods.nf import ResNet, nf, spatial_masks

KEY = jax.random.key(0)
TINY: dict[str, Any] = dict(on="pixels", hidden=4, blocks=1, learning_rate=3e-3)
KINDS = {
    "realnvp": dict(scales=2, couplings=2),
    "glow": dict(flow="glow", scales=2, couplings=2),
    "cycle": dict(mask="cycle", scales=1, couplings=4, blocks=2),
}


def noise_images(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8)


def batch_of(x: Any, n: int) -> Batch:
    return Batch(x, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, jnp.arange(n, dtype=jnp.int32), jnp.float32(0))


def train(method: Any, x: Any, n: int, steps: int) -> tuple[Any, list[float]]:
    """The flow after some steps, and their losses."""
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    measure, stage = method.stages

    @jax.jit
    def begin(batch: Batch) -> Any:
        moments, _ = measure.update(KEY, measure.init(KEY, None, None, spec), None, batch)
        return stage.init(KEY, measure.finalize(KEY, moments, None), None, spec)

    state = begin(batch_of(x, n))
    update, losses = jax.jit(stage.update), []
    for key in jax.random.split(KEY, steps):
        state, metrics = update(key, state, None, batch_of(x, n))
        losses.append(float(metrics["loss"]))
    return stage.finalize(KEY, state, None), losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_flow_compresses_noise(kind):
    """Uniform noise of 256 levels has 8 bits per pixel; a wrong log-determinant would give fewer."""
    method = nf(**TINY | KINDS[kind])
    flow, losses = train(method, jnp.asarray(noise_images(0, 64)), 64, 20)
    scores = jax.jit(method.score)(flow, None, jnp.asarray(noise_images(1, 256))).image
    assert losses[-1] < losses[0] < 8.1
    assert 7.99 < scores.mean() < 8.5


def test_before_training_pixels_are_independent_gaussians():
    method, images = nf(**TINY, scales=1), jnp.asarray(noise_images(2, 16) // 2)
    flow, _ = train(method, images, 16, 0)
    noise = np.asarray(jax.random.uniform(KEY, (8, 8, 3)), np.float64)
    u = 0.05 + 0.9 * (np.asarray(images, np.float64) + noise) / 256
    middle = 0.05 + 0.9 * (np.asarray(images, np.float64) + 0.5) / 256
    logit, reference = np.log(u / (1 - u)), np.log(middle / (1 - middle))
    log_p = stats.norm.logpdf(logit, reference.mean((0, 1, 2)), reference.std((0, 1, 2)))
    log_p = log_p + np.log(0.9 / 256 / (u * (1 - u)))
    expected = -log_p.sum((1, 2, 3)) / (8 * 8 * 3 * np.log(2))
    np.testing.assert_allclose(jax.jit(method.score)(flow, None, images).image, expected, rtol=1e-4)


def test_before_training_an_embedding_has_independent_gaussian_channels():
    method = nf(backbone="pdn_small", layers=("layer1", "layer2"), couplings=2, hidden=4)
    x = {f"layer{i}": 3 * jax.random.normal(jax.random.key(i), (12, 4 + i)) + i for i in (1, 2)}
    flow, _ = train(method, x, 12, 0)
    embedding = np.concatenate([x["layer1"], x["layer2"]], -1).astype(np.float64)
    expected = -stats.norm.logpdf(embedding, embedding.mean(0), embedding.std(0)).mean(-1) / np.log(2)
    np.testing.assert_allclose(jax.jit(method.score)(flow, None, x).image, expected, rtol=1e-4)


@pytest.mark.slow
def test_training_learns_the_correlation_of_channels():
    method = nf(backbone="pdn_small", layers=("layer1",), couplings=4, hidden=16, learning_rate=1e-2)
    common = jax.random.normal(jax.random.key(1), (64, 1))
    x = {"layer1": common * jnp.array([1.0, -2.0, 0.5, 1.0]) + 0.1 * jax.random.normal(KEY, (64, 4))}
    flow, losses = train(method, x, 64, 200)
    assert losses[-1] < losses[0] - 1
    flipped = {"layer1": x["layer1"] * jnp.array([1.0, 1.0, -1.0, 1.0])}
    assert np.median(method.score(flow, None, flipped).image) > method.score(flow, None, x).image.max()


def test_networks_never_see_what_is_transformed():
    for kind in ("checkerboard", "horizontal", "cycle"):
        unchanged, inputs = spatial_masks(kind, 4, (4, 6, 2))
        assert unchanged.shape == inputs.shape == (4, 4, 6, 2)
        assert not (inputs & ~unchanged).any() and (~unchanged).any(0).all()
        neighbors = inputs[:, :, :-1] & ~unchanged[:, :, 1:]  # inputs beside a transformed entry
        assert neighbors.mean() > 0.4 if kind == "checkerboard" else neighbors.mean() < 0.2
    unchanged, inputs = spatial_masks("cycle", 4, (4, 6, 2))
    np.testing.assert_array_equal(~unchanged[:-1], inputs[1:])
    assert (~unchanged).sum((1, 2, 3)).tolist() == [12] * 4


@pytest.mark.parametrize("kind", ["horizontal", "cycle"])
def test_dilated_networks_have_inputs_for_every_pixel(kind):
    """A receptive field of 7 pixels in each direction reaches across half an image of 14; one of 3 does not."""
    x, random = jax.random.normal(KEY, (32, 14, 14, 1)), np.random.default_rng(0)
    for unchanged, inputs in zip(*spatial_masks(kind, 4, (14, 14, 1)), strict=True):
        for blocks, blind in ((2, False), (1, True)):
            network = ResNet(8, blocks, True)
            shapes = jax.eval_shape(network.init, KEY, x)
            params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
            apply = jax.jit(lambda x, f=network.apply, p=params, inputs=inputs: f(p, jnp.where(inputs, x, 0)))
            equal = np.asarray(apply(x) == apply(2 * x))[..., :1].all(0)
            assert equal[~unchanged].any() == blind


@pytest.mark.parametrize(
    ("hyperparameter", "message"),
    [
        ({"flow": "glow"}, "a flow on embeddings must be a realnvp, got glow"),
        ({"mask": "stripes"}, "mask must be one of checkerboard, horizontal, cycle, got stripes"),
        (
            {"mask": "cycle"},
            "the mask cycle needs a realnvp on pixels with scales of 1, got realnvp on embedding with scales of 3",
        ),
        ({"hidden": 0}, "hidden must be 1 or more, got 0"),
    ],
)
def test_bad_hyperparameters(hyperparameter, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(nf)(**{"backbone": "pdn_small"} | hyperparameter)


def test_networks_must_see_half_the_image():
    method = nf(**TINY | {"blocks": 3}, mask="horizontal", scales=1)
    with pytest.raises(ValueError, match="half an image of 32 x 32, got 3, which see 15 pixels in each direction"):
        method.stages[0].init(KEY, None, None, jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8))


def test_images_must_be_divisible():
    with pytest.raises(ValueError, match=r"height and width must be multiples of 8 \(2\^scales\), got 8 x 12"):
        nf(**TINY, scales=3).stages[0].init(KEY, None, None, jax.ShapeDtypeStruct((4, 8, 12, 3), jnp.uint8))


def test_flows_on_pixels_use_no_backbone():
    assert not nf(**TINY, backbone="unknown").pretrained
    assert nf(backbone="pdn_small").pretrained
