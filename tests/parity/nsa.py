"""NSA's network and training against hmsch/natural-synthetic-anomalies, commit 9195916.

Called are ResNetEncDec, with one block a stage and an eighth of the encoder's channels, and train_and_save_model, with
Adam and CosineAnnealingLR as in train_mvtec.py: three epochs of four, of one batch. The images are their own anomalies,
and the mean of the channels is the label of a pixel. jaxad's variances of batches are biased: they are corrected before
images are scored.
"""

import importlib
from typing import Any
from unittest import mock

import jax
import numpy as np

from jaxad.backbones import ResidualBlocks, resnet
from jaxad.backbones.registry import IMAGENET
from tests.parity.golden import Golden, pixels, synthetic
from tests.parity.steps import batch_of, follow, from_torch, gradient, shapes_of, to_torch, unbiased, under

module = importlib.import_module("jaxad.methods.nsa")
IMAGES, SIZE, EPOCHS = 4, (64, 32), 4
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
DECODER = {"Convolution_0": "nin.0", "Convolution_1": "nin.2", "Convolution_2": "convtranspose1"}
BLOCK = {
    "ConvNorm_0": ("conv1", "bn1"),
    "ConvNorm_1": ("conv2", "bn2"),
    "ConvNorm_2": ("upsample.0", "upsample.1"),
}
STRIDES = {"conv1": 2, "layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}

WHY = "Adam's steps are as long where a gradient is hardly more than rounding"
TOLERANCES = {"parameters after 3 steps": (1e-3, WHY), "statistics after 3 steps": (1e-3, WHY)}


def name_of(path: str) -> str:
    """A leaf of the parameters or statistics -> its tensor in torch."""
    part, layer, *inner, leaf = path.split("/")
    norm = "norm" in inner
    if part == "encoder":
        layer = layer.replace("downsample.0", "downsample.1").replace("conv", "bn") if norm else layer
        return f"{layer}.{LEAVES[leaf]}"
    if layer in DECODER:
        return f"{DECODER[layer]}.{LEAVES[leaf]}"
    return f"uplayer{int(layer[-1]) + 1}.0.{BLOCK[inner[0]][norm]}.{LEAVES[leaf]}"


def is_transposed(name: str) -> bool:
    """Whether it is the kernel of a transposed convolution."""
    return name.startswith("convtranspose1") or ("uplayer" in name and (".conv1." in name or ".upsample.0." in name))


def turned(kernel: np.ndarray) -> np.ndarray:
    """That of a transposed convolution: inputs and outputs swapped, from right to left and from below."""
    return kernel.swapaxes(0, 1)[:, :, ::-1, ::-1]


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the reference's module, laid out as those of other convolutions."""
    if not is_transposed(name):
        return synthetic(name, shape)
    return turned(synthetic(name, (shape[1], shape[0], *shape[2:])))


def torch_tensors(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree as torch's module has them."""
    return {k: turned(v) if is_transposed(k) else v for k, v in to_torch(tree, name_of).items()}


def count(path: str) -> int:
    """How many values of a batch a batch norm sees."""
    part, layer, *_ = path.split("/")
    stride = STRIDES[layer.partition(".")[0]] if part == "encoder" else 2 ** (4 - int(layer[-1]))
    return IMAGES * SIZE[0] * SIZE[1] // stride**2


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    backbone = resnet.make("resnet_parity", ResidualBlocks((1, 1, 1, 1), 1.0, 8))
    (mean, std), images = IMAGENET, pixels("train", IMAGES, *SIZE, 3)
    frozen = {"params": {}, "mean": np.asarray(mean, np.float32), "std": np.asarray(std, np.float32)}
    batches = [batch_of(images, (i + 0.5) / EPOCHS) for i in range(3)]
    with mock.patch.object(module, "natural_anomaly", lambda key, image, source, **_: (image, image.mean(-1))):
        method = module.nsa(
            backbone=backbone, image_size=SIZE, shift=0, degrees=0.0, on_foreground=False, epochs=EPOCHS
        )
        stage = method.stages[0]
        start = shapes_of(stage, images, frozen=frozen)
        params, stats = (from_torch(tree, name_of, tensor) for tree in start.model)
        states, losses = follow(stage, start._replace(model=module.NsaNetwork(params, stats)), batches, frozen)
    last = states[-1].model
    last = last._replace(stats=unbiased(last.stats, stats, count))
    scores = jax.jit(method.score)(last, frozen, pixels("test", IMAGES, *SIZE, 3))
    return {
        "loss": np.asarray(losses),
        **under("gradient", torch_tensors(gradient(states[0]))),
        **under("parameters after 3 steps", torch_tensors(last.params)),
        **under("statistics after 3 steps", torch_tensors(last.stats)),
        "heat map": scores.pixel,
        "score": scores.image,
    }
