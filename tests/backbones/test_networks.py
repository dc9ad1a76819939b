"""What backbones promise besides parity: families, stages, precision, partial weights, parameter counts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones import (
    FAMILIES,
    Backbone,
    ResidualBlocks,
    backbone,
    convolution,
    efficientnet,
    features,
    load,
    normalize,
    patchnet,
    pdn,
    registry,
    residual_blocks,
    resnet,
    stride,
    student,
    transformer,
    vgg,
)
from tests.examples import slow_after, slow_outside
from tests.rows import assert_equal
from tests.tiny import PATCH9, TINY_PDN, TINY_RESNET

from .shapes import shapes_of

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
    primitives = (jax.lax.conv_general_dilated_p, jax.lax.dot_general_p)
    return [e for e in program.jaxpr.eqns if e.primitive in primitives]


QUICK = (
    *("resnet18", "resnet50", "efficientnet_b0", "efficientnet_b1"),
    *("deit_tiny_distilled_patch16_224", "cait_xxs24_224"),
)
"""Of every path through a family; deeper ones take long to trace."""


@pytest.mark.parametrize("name", slow_outside(QUICK, PARAMETERS))
def test_parameter_count_is_the_published_one(name):
    source = resnet.source
    if "efficientnet" in name:
        source = functools.partial(efficientnet.source, efficientnet.LAYOUTS[name], keys=())
    modules = shapes_of(name)
    tensors = [source(module).shapes(leaves["kernel"]) for module, leaves in modules.items()]
    params = {key: shape for group in tensors for key, shape in group.items() if ".running_" not in key}
    width = modules["head"]["bias"][0] if "head" in modules else 512 if name in ("resnet18", "resnet34") else 2048
    assert sum(map(math.prod, params.values())) + 1000 * width + 1000 == PARAMETERS[name]


@pytest.mark.parametrize("name", slow_outside(QUICK, TRANSFORMERS))
def test_parameter_count_of_a_transformer_is_the_published_one(name):
    shapes = shapes_of(name)
    width, classifiers = shapes["norm"]["bias"][0], 2 if "distilled" in name else 1
    head = classifiers * 1000 * (width + 1)
    if name.startswith("cait"):
        head += 2 * (12 * width**2 + 15 * width) + width
    body = sum(math.prod(shape) for leaves in shapes.values() for shape in leaves.values())
    assert body + head == TRANSFORMERS[name]


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
def test_nothing_past_the_deepest_requested_stage_is_computed(name, layers, count):
    assert len(convolutions(name, layers)) == count


@pytest.mark.parametrize("name", slow_after(1, ["resnet18", "tf_efficientnet_b0", "cait_xxs24_224"]))
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
    of_uint8, of_float = embed(frozen, image), embed(frozen, image.astype(jnp.float32) / 255)
    assert of_uint8["layer1"].shape == (2, 9, 12, 64)
    assert of_uint8["layer3"].shape == (2, 3, 3, 256)
    for layer, values in of_uint8.items():
        np.testing.assert_allclose(values, of_float[layer], rtol=1e-4, atol=1e-4 * np.abs(values).max())


def test_images_are_normalized_as_the_weights_were_trained():
    image = picture(3, 4)
    means = {"resnet50": (0.485, 0.456, 0.406), "resnet50.caffe_in1k": np.divide((123.68, 116.779, 103.939), 255)}
    stds = {"resnet50": (0.229, 0.224, 0.225), "resnet50.caffe_in1k": (1 / 255,) * 3}
    for name, mean in means.items():
        entry = registry.lookup(name)
        frozen = dict(zip(("mean", "std"), np.asarray(entry.normalization, np.float32), strict=True))
        expected = (np.asarray(image) / 255 - mean) / stds[name]
        np.testing.assert_allclose(normalize(frozen, image, jnp.float32), expected, rtol=1e-4, atol=1e-4)


def test_pool_averages_over_positions(frozen):
    image = picture(40, 56)
    maps = jax.jit(features("resnet18", ("layer2",)))(frozen, image)
    pooled = jax.jit(features("resnet18", ("layer2",), True))(frozen, image)
    np.testing.assert_allclose(pooled["layer2"], maps["layer2"].mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_equal_arguments_give_the_same_function():
    assert features("resnet18", ("layer2",)) is features("resnet18", ("layer2",))
    assert features("resnet18", ("layer2",)) is features(backbone("resnet18"), ("layer2",))
    equal = resnet.make(TINY_RESNET.name, ResidualBlocks((1, 1, 1, 1), 1.0, 16))
    assert equal == TINY_RESNET and hash(equal) == hash(TINY_RESNET)
    assert features(equal, ("layer2",)) is features(TINY_RESNET, ("layer2",))


def test_every_registered_name_has_exactly_one_family():
    for name, entry in registry.ENTRIES.items():
        families = [key for key, family in FAMILIES.items() if entry.architecture in family.architectures]
        assert [backbone(name).family] == families


CUSTOM = {
    "resnet": resnet.make("bottlenecks", ResidualBlocks((1, 2, 1, 1), 0.5, 8), stride_in_1x1=True),
    "vgg": vgg.make("vgg_of_ones", (1, 1, 1, 1, 1), batch_norm=True),
    "efficientnet": efficientnet.make("narrow", efficientnet.Layout(0.25, 0.5)),
    "transformer": transformer.make("shallow", transformer.Layout(32, 2, 2, 32, ("cls_token",))),
    "pdn": TINY_PDN,
    "patchnet": PATCH9,
}
"""A backbone of every family that is not registered."""


@pytest.mark.parametrize("family", slow_after(2, ["pdn", "resnet", *sorted({*FAMILIES} - {"pdn", "resnet"})]))
def test_a_custom_backbone_has_features(family):
    network = CUSTOM[family]
    assert network.family == family and network.name not in registry.PLAIN
    frozen = network.init(jax.random.key(0))
    maps = jax.jit(features(network, network.patch_layers, image=True))(frozen, picture(64, 64))
    assert set(maps) == {"image", *network.patch_layers}
    for layer in network.patch_layers:
        border = 0 if network.pads else 8
        assert maps[layer].shape[1] == 64 // stride(network, layer) - border
        assert jnp.isfinite(maps[layer]).all() and maps[layer].std() > 0


@pytest.mark.parametrize(
    ("network", "layers"),
    slow_after(1, [(TINY_RESNET, ("layer1", "layer2")), (TINY_PDN, ("head",)), (PATCH9, ("stride8",))]),
)
def test_a_custom_backbone_has_students(network, layers):
    """Frozen, with batch norm folded in, a student is a set of weights of the backbone."""
    learner, frozen = student(network, layers), network.init(jax.random.key(0))
    params, stats = learner.init(jax.random.key(1))
    maps, new = jax.jit(learner.apply, static_argnums=4)(params, stats, frozen, picture(40, 48), True)
    assert set(maps) == set(layers) and jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, stats)
    if network.family == "resnet":
        assert not jnp.allclose(new["conv1"]["norm"]["mean"], stats["conv1"]["norm"]["mean"])
    else:
        assert stats == new == {}
    scored, unchanged = jax.jit(learner.apply, static_argnums=4)(params, new, frozen, picture(40, 48), False)
    assert_equal(unchanged, new)
    frozen = frozen | {"params": learner.freeze(params, new)}
    folded = jax.jit(network.apply, static_argnums=2)(frozen, picture(40, 48), layers)
    for layer, values in folded.items():
        np.testing.assert_allclose(values, scored[layer], rtol=1e-3, atol=1e-4 * float(jnp.abs(values).max()))


def test_a_description_can_have_several_times_the_channels():
    for network, layer in ((TINY_PDN, "head"), ("pdn_small", "layer3")):
        learner = student(network, (layer,), copies=2)
        params, _ = jax.eval_shape(learner.init, jax.random.key(0))
        assert max(leaves["bias"].shape[0] for leaves in params.values()) == 2 * pdn.OUT


def test_students_that_a_family_does_not_make_are_refused():
    with pytest.raises(ValueError, match=r"must be pdn_small, .* or wide_resnet101_2, got vgg11"):
        student("vgg11", ("pool1",))
    with pytest.raises(ValueError, match="must be pdn_small, efficientad_small or efficientad_medium, got tiny_resnet"):
        student(TINY_RESNET, ("layer1",), copies=2)
    with pytest.raises(ValueError, match="tiny_resnet has the stages"):
        student(TINY_RESNET, ("pool1",))


def test_residual_blocks_are_those_of_a_resnet():
    assert residual_blocks(TINY_RESNET) == ResidualBlocks((1, 1, 1, 1), 1.0, 16)
    assert residual_blocks("resnet50.caffe_in1k") == residual_blocks("resnet50") == resnet.BLOCKS["resnet50"]
    with pytest.raises(ValueError, match="the backbone must be a ResNet, got pdn_small"):
        residual_blocks("pdn_small")


def test_a_backbone_says_how_it_pads_and_what_patches_it_describes():
    assert [network.pads for network in map(backbone, ("pdn_small", "efficientad_small"))] == [True, False]
    assert [network.patch_size for network in map(backbone, ("patch33", "resnet18"))] == [33, None]
    assert isinstance(backbone(PATCH9), Backbone) and backbone(PATCH9) is PATCH9
    with pytest.raises(ValueError, match="the convolutions of other must reduce 10 px to 1 position, got 2"):
        patchnet.make("other", patchnet.Layout(10, ((4, 8, False), (6, 8, False))))


def test_init_is_random_and_of_the_right_scale(frozen):
    other = backbone("resnet18").init(jax.random.key(1))
    kernel = frozen["params"]["layer2.1.conv2"]["kernel"]
    assert jnp.std(kernel) == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert not jnp.allclose(kernel, other["params"]["layer2.1.conv2"]["kernel"])
    assert jax.tree.map(jnp.shape, frozen["params"]) == shapes_of("resnet18")


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


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "pad"), slow_after(1, [(5, 3, 2, 2), (3, 2, 1, 1), (2, 1, 4, 0)])
)
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
    layout = ("NHWC", "HWIO", "NHWC")
    native = values(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (stride, stride), pads, rhs_dilation=(dilation, dilation), dimension_numbers=layout
        )
    )
    for a, b in zip(shifted, native, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", slow_after(1, ["resnet18.tv_in1k", "resnet50.caffe_in1k"]))
def test_real_weights_hold_the_first_three_stages(shared, name):
    frozen = load(name, shared / "weights" / f"{name}.safetensors")
    network = backbone(name)
    maps = jax.jit(network.apply, static_argnums=2)(frozen, picture(64, 64), ("layer1", "layer3"))
    assert all(jnp.isfinite(m).all() and m.std() > 0.1 for m in maps.values())
    with pytest.raises(ValueError, match=r"hold only the stages layer1, layer2, layer3"):
        network.apply(frozen, picture(64, 64), ("layer4",))
