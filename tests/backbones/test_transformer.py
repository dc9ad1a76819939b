"""DeiT and CaiT: their tokens and positions, sizes of images, precision, partial and unsuitable weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxad.backbones import backbone, load, transformer

from .make_golden import synthetic
from .shapes import shapes_of

DEIT, PLAIN, CAIT = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224", "cait_xxs24_224"
LAYERS = ("blocks.0", "blocks.1")
IMAGE = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)


def checkpoint(name, blocks=2):
    """A random checkpoint of the first blocks."""
    groups = transformer.torch_shapes(shapes_of(name)).items()
    first = {f"blocks.{i}" for i in range(blocks)}
    selected = [group for m, group in groups if not m.startswith("blocks.") or ".".join(m.split(".")[:2]) in first]
    return {key: synthetic(key, shape) for group in selected for key, shape in group.items()}


def maps(name, tensors, image=IMAGE, layers=LAYERS):
    network = backbone(name)
    return jax.jit(network.apply, static_argnums=2)(network.fold(tensors), image, layers)


def largest_change(one, other):
    return max(float(np.abs(one[layer] - other[layer]).max()) for layer in one)


@pytest.fixture(scope="module")
def whole():
    return {name: (tensors := checkpoint(name), maps(name, tensors)) for name in (DEIT, CAIT)}


def test_maps_are_normalized_patch_tokens(whole):
    for name, (tensors, features) in whole.items():
        for values in features.values():
            assert values.shape == (2, 2, 3, 192) and values.dtype == jnp.float32
            plain = (values - tensors["norm.bias"]) / tensors["norm.weight"]
            np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-5)
            np.testing.assert_allclose(plain.std(-1), 1, atol=1e-3)
        assert backbone(name).normalized
    assert not backbone("resnet18").normalized


def test_deit_has_its_tokens_in_attention_and_cait_has_none(whole):
    for name, tokens in ((DEIT, {"cls_token", "dist_token"}), (PLAIN, {"cls_token"}), (CAIT, set())):
        shapes = shapes_of(name)
        assert {key for key in shapes if key.endswith("token")} == tokens
        assert shapes["pos_embed"]["value"] == (1, 14 * 14 + len(tokens), 192)
    tensors, features = whole[DEIT]
    for token in ("cls_token", "dist_token"):
        assert largest_change(features, maps(DEIT, tensors | {token: -tensors[token]})) > 1e-2


def test_an_image_does_not_depend_on_the_others_in_the_batch(whole):
    for name, (tensors, features) in whole.items():
        network = backbone(name)
        single = jax.vmap(lambda image, apply=network.apply, frozen=network.fold(tensors): apply(frozen, image, LAYERS))
        assert largest_change(features, {k: v[:, 0] for k, v in jax.jit(single)(IMAGE[:, None]).items()}) < 1e-4


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (14, 14), (20, 17)])
def test_positions_are_interpolated_linearly_where_they_are_linear(rows, columns):
    y, x = np.meshgrid(np.arange(14) + 0.5, np.arange(14) + 0.5, indexing="ij")
    table = np.concatenate([[[7.0, 8.0]], np.stack([y, x], -1).reshape(-1, 2)]).astype(np.float32)[None]
    resampled = np.asarray(transformer.resample(jnp.asarray(table), 1, (rows, columns)))[0]
    np.testing.assert_array_equal(resampled[0], [7, 8])
    grid = resampled[1:].reshape(rows, columns, 2)
    middle, column = rows // 2, columns // 2
    np.testing.assert_allclose(grid[middle, column, 0], (middle + 0.5) * 14 / rows, rtol=1e-4)
    np.testing.assert_allclose(grid[middle, column, 1], (column + 0.5) * 14 / columns, rtol=1e-4)


def test_image_sizes_must_be_multiples_of_the_patch(whole):
    with pytest.raises(ValueError) as caught:
        maps(DEIT, whole[DEIT][0], IMAGE[:, :31, :41])
    text = "deit_tiny_distilled_patch16_224 takes image sizes that are multiples of 16, got (31, 41): try (32, 48)"
    assert str(caught.value) == text


def test_bfloat16_is_near_float32(whole, tmp_path):
    for name, (tensors, features) in whole.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        frozen = load(name, tmp_path / f"{name}.safetensors", jnp.bfloat16)
        half = jax.jit(backbone(name).apply, static_argnums=2)(frozen, IMAGE, LAYERS)
        for layer, exact in features.items():
            assert half[layer].dtype == jnp.float32
            assert 1e-5 < jnp.sqrt(jnp.mean((exact - half[layer]) ** 2) / jnp.mean(exact**2)) < 0.05


def test_the_deepest_blocks_may_be_missing(whole):
    ignored = {"head.weight": np.ones((1000, 192)), "blocks_token_only.0.attn.q.weight": np.ones((192, 192))}
    for name, (tensors, features) in whole.items():
        assert largest_change(features, maps(name, tensors | ignored)) == 0
        with pytest.raises(ValueError, match=rf"{name} hold only the stages blocks.0, blocks.1, got .*blocks.2"):
            maps(name, tensors, layers=("blocks.2",))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (DEIT, {"norm.weight": None}, r"needs the tensor norm.weight of shape \(192,\), which is missing"),
        (DEIT, {"dist_token": None}, r"needs the tensor dist_token of shape \(1, 1, 192\), which is missing"),
        (DEIT, {"blocks.0.attn.qkv.weight": np.ones((192, 576))}, r"of shape \(576, 192\), got \(192, 576\)"),
        (DEIT, {"pos_embed": np.ones((1, 197, 192))}, r"pos_embed of shape \(1, 198, 192\), got \(1, 197, 192\)"),
        (DEIT, {"patch_embed.proj.weight": np.ones((192, 3, 8, 8))}, r"of shape \(192, 3, 16, 16\), got"),
        (
            DEIT,
            {"blocks.0.norm2.bias": np.full(192, np.nan)},
            "needs finite numbers, got others in blocks.0.norm2.bias",
        ),
        (DEIT, {"blocks.0.gamma_1": np.ones(192)}, r"has no tensor blocks.0.gamma_1, got one of shape \(192,\)"),
        (CAIT, {"blocks.1.gamma_2": None}, r"needs the tensor blocks.1.gamma_2 of shape \(192,\), which is missing"),
        (CAIT, {"blocks.1.attn.proj_w.bias": np.ones(6)}, r"proj_w.bias of shape \(4,\), got \(6,\)"),
        (CAIT, {"blocks.24.attn.qkv.weight": np.ones((576, 192))}, r"has no tensor blocks.24.attn.qkv.weight"),
    ],
)
def test_weights_of_another_architecture_are_refused(whole, name, change, message):
    tensors = {key: value for key, value in (whole[name][0] | change).items() if value is not None}
    with pytest.raises(ValueError, match=f"{name} {message}|{name} needs the tensor .*{message}") as caught:
        backbone(name).fold(tensors)
    assert "\n" not in str(caught.value)


def test_default_layers_are_those_of_fastflow():
    expected = {DEIT: 7, "deit_base_distilled_patch16_384": 7, CAIT: 20, "cait_s36_384": 30, "cait_m48_448": 40}
    for name, block in expected.items():
        network = backbone(name)
        assert network.pyramid_layers == network.patch_layers == (f"blocks.{block}",)


def test_random_weights_are_of_the_right_shapes_and_scales():
    network = backbone(DEIT)
    params = jax.eval_shape(network.init, jax.random.key(0))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes_of(DEIT)
    some = jax.jit(lambda key: [network.init(key)["params"][m] for m in ("norm", "blocks.0.mlp.fc1")])
    norm, dense = some(jax.random.key(0))
    assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
    assert jnp.std(dense["kernel"]) == pytest.approx((2 / 192) ** 0.5, rel=0.02)
