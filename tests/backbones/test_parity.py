"""Every stage equals that of the PyTorch original with the same random weights, whose outputs `make_golden.py` wrote.

`PYTHONPATH=. python -m tests.backbones.test_parity` compares all golden files, those of deep networks too.
"""

import functools

import jax
import numpy as np
import pytest

from jaxad.backbones import backbone, efficientnet, pdn, registry, resnet, transformer, vgg
from tests.examples import slow_after

from .make_golden import GOLDEN, PATCHED, SIZES, TRANSFORMERS, image, kept, sizes, synthetic
from .shapes import shapes_of

TOLERANCE = 1e-4
QUICK = (
    ("resnet18", SIZES[:2]),
    ("resnet50.caffe_in1k", SIZES[1:2]),
    ("vgg11_bn", SIZES[1:2]),
    ("vgg16", SIZES[2:]),
    ("efficientad_small", SIZES[1:2]),
    ("efficientnet_b0.torchvision", SIZES[:1]),
    ("tf_efficientnet_b0", SIZES[:1]),
    ("deit_tiny_distilled_patch16_224", PATCHED[1:2]),
)
"""Of every family but CaiT, and of every variant that takes another path."""
SLOW = (
    ("resnet50", SIZES[1:2]),
    ("wide_resnet50_2", SIZES[1:2]),
    ("vgg11", SIZES[2:]),
    ("vgg16_bn", SIZES[:1]),
    ("vgg19", SIZES[:1]),
    ("vgg19_bn", SIZES[2:]),
    ("efficientad_medium", SIZES[:1]),
    ("efficientnet_b0", SIZES[2:]),
    ("tf_efficientnet_b0", SIZES[1:2]),
    ("deit_tiny_distilled_patch16_224", PATCHED[:1]),
    ("deit_tiny_patch16_224", PATCHED[:1]),
    ("cait_xxs24_224", PATCHED[::2]),
)


def checkpoint(name: str) -> dict[str, np.ndarray]:
    """The random checkpoint that `make_golden` gave the original of that name."""
    plain = name.removesuffix(".torchvision")
    if name in TRANSFORMERS:
        groups = transformer.torch_shapes(shapes_of(name)).values()
        return {key: synthetic(key, shape) for group in groups for key, shape in group.items()}
    source = resnet.source
    if name in vgg.ARCHITECTURES:
        source = functools.partial(vgg.source, vgg.CONVOLUTIONS[name.removesuffix("_bn")], name.endswith("_bn"))
    elif name in pdn.PUBLISHED:
        source = functools.partial(pdn.source, keys=())
    elif "efficientnet" in name:
        keys = ("features.0.0.weight",) if plain != name else ()
        source = functools.partial(efficientnet.source, efficientnet.LAYOUTS[plain], keys=keys)
    groups = [source(module).shapes(leaves["kernel"]) for module, leaves in shapes_of(plain).items()]
    shapes = {key: shape for group in groups for key, shape in group.items()}
    if name in vgg.ARCHITECTURES:
        shapes["pre_logits.fc1.weight"] = (4, 512, 7, 7)  # timm keeps the classifier as convolutions
    return {key: synthetic(key, shape) for key, shape in shapes.items()}


def differences(name: str, sizes: tuple[tuple[int, int], ...]) -> dict[tuple[tuple[int, int], str], float]:
    """For every size and stage the largest difference from the original, relative to the stage's largest value."""
    network = backbone(name.removesuffix(".torchvision"))
    frozen = network.fold(checkpoint(name))
    # the factor by which the first kernel was multiplied, 1 unless the weights are Caffe's
    factor = frozen["std"] / np.float32(registry.lookup(network.name).normalization[1])
    frozen = frozen | {"mean": np.zeros(3, np.float32), "std": 255 * factor}
    apply = jax.jit(lambda frozen, image: network.apply(frozen, image, network.stages))
    golden = np.load(GOLDEN / f"{name}.npz")
    errors = {}
    for size in sizes:
        maps = apply(frozen, image(size))
        shapes, peaks, values = (golden[f"{size[0]}x{size[1]}/{key}"] for key in ("shape", "peak", "kept"))
        for i, stage in enumerate(network.stages):
            assert maps[stage].shape == tuple(shapes[i])
            errors[size, stage] = float(np.abs(kept(np.asarray(maps[stage])) - values[i]).max() / peaks[i])
    return errors


@pytest.mark.parametrize(("name", "sizes"), slow_after(len(QUICK), QUICK + SLOW))
def test_every_stage_equals_the_original(name, sizes):
    assert max(differences(name, sizes).values()) < TOLERANCE


def test_golden_files_are_small_and_complete():
    files = list(GOLDEN.glob("*.npz"))
    assert {file.stem.removesuffix(".torchvision") for file in files} >= {
        *resnet.BLOCKS,
        *vgg.ARCHITECTURES,
        *pdn.PUBLISHED,
        "resnet50.caffe_in1k",
    } | {f"{prefix}efficientnet_b{i}" for prefix in ("", "tf_") for i in range(8)} | {*TRANSFORMERS}
    assert sum(file.stat().st_size for file in files) < 1.5e6


if __name__ == "__main__":
    for file in sorted(GOLDEN.glob("*.npz")):
        worst = differences(file.stem, sizes(file.stem))
        print(f"{file.stem:30} {max(worst.values()):.1e} at {max(worst, key=worst.__getitem__)}", flush=True)
        jax.clear_caches()
