"""NF: its likelihoods against closed forms, and against what no density can do better than."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxad.base import Batch
from jaxad.methods import nf
from jaxad.methods.nf import Residual, dequantize, pixels, spatial_masks

KEY = jax.random.key(0)
TINY: dict[str, Any] = dict(backbone="pdn_small", on="pixels", hidden=4, blocks=1, learning_rate=3e-3)
KINDS = {
    "realnvp": dict(scales=2, couplings=2),
    "glow": dict(flow="glow", scales=2, couplings=2),
    "cycle": dict(mask="cycle", scales=1, couplings=4, blocks=2),
}


def noise_images(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8)


def batch_of(x: Any, n: int) -> Batch:
    return Batch(x, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, jnp.arange(n, dtype=jnp.int32), jnp.float32(0))


def trained(method: Any, x: Any, n: int, steps: int) -> tuple[Any, list[float]]:
    state = method.init(KEY, None, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x))
    state, _ = method.stages[0].update(KEY, state, None, batch_of(x, n))
    state = method.stages[0].finalize(KEY, state, None)

    step, losses = jax.jit(method.stages[1].update), []
    for key in jax.random.split(KEY, steps):
        state, metrics = step(key, state, None, batch_of(x, n))
        losses.append(float(metrics["loss"]))
    return method.stages[1].finalize(KEY, state, None), losses


@pytest.mark.parametrize("kind", KINDS)
def test_no_flow_compresses_noise(kind):
    """Uniform noise of 256 levels has 8 bits a pixel: a log-determinant that is wrong would promise fewer."""
    method = nf(**TINY | KINDS[kind])
    flow, losses = trained(method, jnp.asarray(noise_images(0, 64)), 64, 20)
    found = jax.jit(method.score)(flow, None, jnp.asarray(noise_images(1, 256))).image
    assert losses[-1] < losses[0] < 8.1
    assert 7.99 < found.mean() < 8.5


def test_before_training_pixels_are_independent_gaussians():
    method, images = nf(**TINY, scales=1), jnp.asarray(noise_images(2, 16) // 2)
    flow, _ = trained(method, images, 16, 0)
    noise = np.asarray(jax.random.uniform(KEY, (8, 8, 3)), np.float64)
    u = 0.05 + 0.9 * (np.asarray(images, np.float64) + noise) / 256
    middle = 0.05 + 0.9 * (np.asarray(images, np.float64) + 0.5) / 256
    logit, reference = np.log(u / (1 - u)), np.log(middle / (1 - middle))
    log_p = stats.norm.logpdf(logit, reference.mean((0, 1, 2)), reference.std((0, 1, 2)))
    log_p = log_p + np.log(0.9 / 256 / (u * (1 - u)))
    wanted = -log_p.sum((1, 2, 3)) / (8 * 8 * 3 * np.log(2))
    np.testing.assert_allclose(jax.jit(method.score)(flow, None, images).image, wanted, rtol=1e-4)


def test_before_training_an_embedding_has_independent_gaussian_channels():
    method = nf(backbone="pdn_small", layers=("layer1", "layer2"), couplings=2, hidden=4)
    x = {f"layer{i}": 3 * jax.random.normal(jax.random.key(i), (12, 4 + i)) + i for i in (1, 2)}
    flow, _ = trained(method, x, 12, 0)
    both = np.concatenate([x["layer1"], x["layer2"]], -1).astype(np.float64)
    wanted = -stats.norm.logpdf(both, both.mean(0), both.std(0)).mean(-1) / np.log(2)
    np.testing.assert_allclose(method.score(flow, None, x).image, wanted, rtol=1e-4)


def test_training_finds_what_channels_have_in_common():
    method = nf(backbone="pdn_small", layers=("layer1",), couplings=4, hidden=16, learning_rate=1e-2)
    common = jax.random.normal(jax.random.key(1), (64, 1))
    x = {"layer1": common * jnp.array([1.0, -2.0, 0.5, 1.0]) + 0.1 * jax.random.normal(KEY, (64, 4))}
    flow, losses = trained(method, x, 64, 200)
    assert losses[-1] < losses[0] - 1
    broken = {"layer1": x["layer1"] * jnp.array([1.0, 1.0, -1.0, 1.0])}
    own, foreign = (method.score(flow, None, one).image for one in (x, broken))
    assert np.median(foreign) > own.max()


def test_dequantization_is_a_change_of_variables():
    image = jnp.asarray(noise_images(3, 2))
    noise = jax.random.uniform(KEY, image.shape)
    _, log_det = dequantize(image, noise)
    slopes = jax.grad(lambda noise: dequantize(image, noise)[0].sum())(noise)
    np.testing.assert_allclose(log_det, jnp.log(slopes).sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(pixels(None, image.astype(jnp.float32) / 255), image)


def test_masks_hide_what_is_transformed():
    for kind in ("checkerboard", "horizontal", "cycle"):
        keep, seen = spatial_masks(kind, 4, (4, 6, 2))
        assert keep.shape == seen.shape == (4, 4, 6, 2)
        assert not (seen & ~keep).any() and (~keep).any(0).all()
        neighbors = seen[:, :, :-1] & ~keep[:, :, 1:]  # seen beside what is transformed
        assert neighbors.mean() > 0.4 if kind == "checkerboard" else neighbors.mean() < 0.2
    keep, seen = spatial_masks("cycle", 4, (4, 6, 2))
    np.testing.assert_array_equal(~keep[:-1], seen[1:])
    assert (~keep).sum((1, 2, 3)).tolist() == [12] * 4


@pytest.mark.parametrize("kind", ["horizontal", "cycle"])
def test_the_networks_of_the_remedies_see_something_for_every_pixel(kind):
    """A network that sees 7 pixels far sees across half of an image of 14, and one of 3 does not."""
    x = jax.random.normal(KEY, (32, 14, 14, 1))
    for keep, seen in zip(*spatial_masks(kind, 4, (14, 14, 1)), strict=True):
        for blocks, blind in ((2, False), (1, True)):
            net = Residual(8, blocks, 1, True, True)
            params = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), net.init(KEY, x))
            run = jax.jit(lambda x, net=net, params=params, seen=seen: net.apply(params, jnp.where(seen, x, 0)))
            same = np.asarray(run(x) == run(-x)).all(0)
            assert same[~keep].any() == blind


@pytest.mark.parametrize(
    ("hyperparameter", "rule"),
    [
        ({"flow": "glow"}, "a flow on embeddings must be a realnvp with even couplings, got glow with 8"),
        ({"couplings": 3}, "must be a realnvp with even couplings, got realnvp with 3"),
        ({"mask": "stripes"}, "mask must be one of checkerboard, horizontal, cycle, got stripes"),
        (
            {"mask": "cycle"},
            "the mask cycle is of a realnvp on pixels with 1 of scales, got realnvp on embedding with 3",
        ),
        ({"hidden": 0}, "hidden must be 1 or more, got 0"),
        ({"clamp": 0.0}, "clamp must be above 0, got 0"),
    ],
)
def test_bad_hyperparameters(hyperparameter, rule):
    with pytest.raises(ValueError, match=rule):
        inspect.unwrap(nf)(**{"backbone": "pdn_small"} | hyperparameter)


def test_networks_must_see_half_the_image():
    method = nf(**TINY | {"blocks": 3}, mask="horizontal", scales=1)
    with pytest.raises(ValueError, match="half an image of 32 x 32, got 3, which see 15 pixels far"):
        method.init(KEY, None, jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8))


def test_images_must_be_divisible():
    with pytest.raises(ValueError, match=r"height and width must be multiples of 8 \(2\^scales\), got 8 x 12"):
        nf(**TINY, scales=3).init(KEY, None, jax.ShapeDtypeStruct((4, 8, 12, 3), jnp.uint8))
