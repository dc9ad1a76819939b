"""What the backbones promise besides parity: stages, sizes, precision, partial weights, parameter counts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import backbone, convolution, efficientnet, features, load, networks, registry, resnet

# with the classifier, as the torchvision documentation gives them
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704,
    "efficientnet_b7": 66_347_960,
}
# with classifiers and CaiT's class attention, as timm counts them
TRANSFORMERS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_distilled_patch16_384": 87_630_032,
    "cait_xxs24_224": 11_956_264,
    "cait_xxs36_224": 17_299_720,
    "cait_xs24_384": 26_670_088,
    "cait_s24_384": 47_062_120,
    "cait_s36_384": 68_366_632,
    "cait_m36_384": 271_221_352,
    "cait_m48_448": 356_460_520,
}


@pytest.fixture(scope="module")
def frozen():
    return backbone("resnet18").init(jax.random.key(0))


def picture(height, width):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8))


def in_type(frozen, dtype):
    """The frozen weights, or their shapes, with parameters of that type."""

    def cast(p):
        return jax.ShapeDtypeStruct(p.shape, dtype) if isinstance(p, jax.ShapeDtypeStruct) else p.astype(dtype)

    return frozen | {"params": jax.tree.map(cast, frozen["params"])}


def convolutions(name, layers, dtype=jnp.float32):
    """The convolutions in the program that computes those layers; those of one pixel are matrix products."""
    network = backbone(name)
    frozen = in_type(jax.eval_shape(network.init, jax.random.key(0)), dtype)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    program = jax.make_jaxpr(network.apply, static_argnums=2)(frozen, image, layers)
    found = (jax.lax.conv_general_dilated_p, jax.lax.dot_general_p)
    return [e for e in program.jaxpr.eqns if e.primitive in found]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    source = resnet.source
    if "efficientnet" in name:
        source = functools.partial(efficientnet.source, name, keys=())
    modules = networks.shapes(name)
    tensors = [source(module).shapes(leaves["kernel"]) for module, leaves in modules.items()]
    learned = {key: shape for group in tensors for key, shape in group.items() if ".running_" not in key}
    width = modules["head"]["bias"][0] if "head" in modules else 512 if name in ("resnet18", "resnet34") else 2048
    assert sum(map(math.prod, learned.values())) + 1000 * width + 1000 == PARAMETERS[name]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parameter_count_of_a_transformer_is_the_published_one(name):
    shapes = networks.shapes(name)
    width, heads = shapes["norm"]["bias"][0], 2 if "distilled" in name else 1
    beyond = heads * 1000 * (width + 1)
    if name.startswith("cait"):
        beyond += 2 * (12 * width**2 + 15 * width) + width
    own = sum(math.prod(shape) for leaves in shapes.values() for shape in leaves.values())
    assert own + beyond == TRANSFORMERS[name]


@pytest.mark.parametrize(
    ("name", "layers", "count"),
    [
        ("resnet18", ("layer1",), 5),
        ("resnet18", ("layer1", "layer2"), 10),
        ("resnet50", ("layer3",), 1 + 10 + 13 + 19),
        ("efficientnet_b0", ("stem",), 1),
        ("efficientnet_b0", ("blocks.0",), 4),
        ("pdn_small", ("layer1",), 2),
        ("deit_tiny_patch16_224", ("blocks.0",), 1 + 6),
        ("cait_xxs24_224", ("blocks.0", "blocks.2"), 1 + 3 * 8),
    ],
)
def test_nothing_past_the_last_wanted_stage_is_computed(name, layers, count):
    assert len(convolutions(name, layers)) == count


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_b0", "cait_xxs24_224"])
def test_bfloat16_computes_in_bfloat16_and_returns_float32(name):
    stages = backbone(name).stages
    assert {e.invars[0].aval.dtype for e in convolutions(name, stages, jnp.bfloat16)} == {jnp.dtype(jnp.bfloat16)}
    network = backbone(name)
    maps = jax.eval_shape(
        lambda frozen, image: network.apply(frozen, image, stages),
        in_type(jax.eval_shape(network.init, jax.random.key(0)), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32),
    )
    assert {m.dtype for m in maps.values()} == {jnp.dtype(jnp.float32)}


def test_bfloat16_features_are_near_the_float32_ones(frozen):
    exact, half = (
        jax.jit(features("resnet18", ("layer2",)))(in_type(frozen, dtype), picture(40, 56))["layer2"]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    error = jnp.sqrt(jnp.mean((exact - half) ** 2) / jnp.mean(exact**2))
    assert 1e-5 < error < 0.05


def test_uint8_and_float_images_give_the_same_features(frozen):
    image = picture(33, 47)
    embed = jax.jit(features("resnet18", ("layer1", "layer3")))
    whole, unit = embed(frozen, image), embed(frozen, image.astype(jnp.float32) / 255)
    assert whole["layer1"].shape == (2, 9, 12, 64)
    assert whole["layer3"].shape == (2, 3, 3, 256)
    for layer, values in whole.items():
        np.testing.assert_allclose(values, unit[layer], rtol=1e-4, atol=1e-4 * np.abs(values).max())


def test_images_are_normalized_as_the_weights_were_trained():
    image = picture(3, 4)
    means = {"resnet50": (0.485, 0.456, 0.406), "resnet50.caffe_in1k": np.divide((123.68, 116.779, 103.939), 255)}
    stds = {"resnet50": (0.229, 0.224, 0.225), "resnet50.caffe_in1k": (1 / 255,) * 3}
    for name, mean in means.items():
        entry = registry.lookup(name)
        frozen = dict(zip(("mean", "std"), np.asarray(entry.normalization, np.float32), strict=True))
        expected = (np.asarray(image) / 255 - mean) / stds[name]
        np.testing.assert_allclose(networks.normalize(frozen, image, jnp.float32), expected, rtol=1e-4, atol=1e-4)


def test_pool_averages_over_positions(frozen):
    image = picture(40, 56)
    maps = jax.jit(features("resnet18", ("layer2",)))(frozen, image)
    pooled = jax.jit(features("resnet18", ("layer2",), True))(frozen, image)
    np.testing.assert_allclose(pooled["layer2"], maps["layer2"].mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_the_same_arguments_give_the_same_function():
    assert features("resnet18", ("layer2",)) is features("resnet18", ("layer2",))


def test_init_is_random_and_of_the_right_scale(frozen):
    again = backbone("resnet18").init(jax.random.key(1))
    kernel = frozen["params"]["layer2.1.conv2"]["kernel"]
    assert jnp.std(kernel) == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert not jnp.allclose(kernel, again["params"]["layer2.1.conv2"]["kernel"])
    assert jax.tree.map(jnp.shape, frozen["params"]) == networks.shapes("resnet18")


@pytest.mark.parametrize("layers", [(), ("layer9",), ("layer1", "stem")])
def test_unknown_layers_are_refused(layers):
    with pytest.raises(ValueError, match="resnet18 has the stages layer1, layer2, layer3, layer4"):
        features("resnet18", layers)


def test_unknown_names_are_refused_with_the_near_ones():
    with pytest.raises(ValueError, match=r"'wide_resnet50'.*did you mean wide_resnet50_2"):
        backbone("wide_resnet50")
    with pytest.raises(ValueError, match="known are cait_m36_384"):
        backbone("zzz")


def test_a_missing_stage_is_named(frozen):
    params = {module: leaves for module, leaves in frozen["params"].items() if not module.startswith("layer4")}
    network = backbone("resnet18")
    with pytest.raises(ValueError, match=r"resnet18 hold only the stages layer1, layer2, layer3, got .*layer4"):
        network.apply(frozen | {"params": params}, picture(32, 32), ("layer2", "layer4"))


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_is_that_of_xla(size, kernel, stride):
    assert [convolution.padding(size, kernel, stride, True)] == jax.lax.padtype_to_pads(
        (size,), (kernel,), (stride,), "SAME"
    )


@pytest.mark.parametrize(("kernel", "stride", "dilation", "pad"), [(2, 1, 4, 0), (3, 2, 1, 1), (5, 3, 2, 2)])
def test_shifted_products_are_the_convolution(kernel, stride, dilation, pad):
    """And so are their gradients, for several kernels at once."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernels = jax.random.normal(keys[0], (2, 14, 17, 3)), jax.random.normal(keys[1], (2, kernel, kernel, 3, 4))

    def values(convolved):
        def total(x, kernels):
            y = jax.vmap(functools.partial(convolved, x))(kernels)
            return jnp.sum(y**2), y

        (_, y), gradient = jax.value_and_grad(total, (0, 1), has_aux=True)(x, kernels)
        return y, *gradient

    pads = [(pad, pad)] * 2
    shifted = values(lambda x, k: convolution.convolve(x, k, stride, pads, dilation))
    order = ("NHWC", "HWIO", "NHWC")
    apart = (dilation, dilation)
    native = values(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (stride, stride), pads, rhs_dilation=apart, dimension_numbers=order
        )
    )
    for a, b in zip(shifted, native, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["resnet18.tv_in1k", "resnet50.caffe_in1k"])
def test_real_weights_hold_the_first_three_stages(shared, name):
    frozen = load(name, shared / "weights" / f"{name}.safetensors")
    network = backbone(name)
    maps = jax.jit(network.apply, static_argnums=2)(frozen, picture(64, 64), ("layer1", "layer3"))
    assert all(jnp.isfinite(m).all() and m.std() > 0.1 for m in maps.values())
    with pytest.raises(ValueError, match=r"hold only the stages layer1, layer2, layer3"):
        network.apply(frozen, picture(64, 64), ("layer4",))
