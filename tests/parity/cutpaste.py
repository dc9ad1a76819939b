"""CutPaste against model.py, density.py and run_training.py of Runinho/pytorch-cutpaste, and GradCAM against captum's.

Commit 10d8bf7. Called are ProjectionNet, whose ResNet is torchvision's with two stages of one block, three steps of
the loop in `run_training` (cross-entropy, SGD, the cosine of step 0 to 2 of 8), and GaussianDensityTorch on normalized
embeddings of the training images. captum's LayerGradCam then explains its distance by the last stage; the map is
upsampled bilinearly and smoothed by scipy's Gaussian filter. Images upside down and mirrored take the place of both
anomalies, without color jitter. jaxad's variances of batches are biased: they are corrected before images are scored.
"""

import importlib
from typing import Any
from unittest import mock

import jax
import numpy as np

from jaxad.backbones import ResidualBlocks, resnet
from jaxad.backbones.registry import IMAGENET
from tests.parity.golden import Golden, pixels
from tests.parity.steps import KEY, batch_of, follow, from_torch, gradient, shapes_of, to_torch, unbiased, under

module = importlib.import_module("jaxad.methods.cutpaste")

STEPS, TOTAL, IMAGES, CLASSES, SIZE = 3, 8, 4, 3, (32, 16)
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
HEAD = {"Dense_0": "head.0", "BatchNorm_0": "head.1", "Dense_1": "head.3", "BatchNorm_1": "head.4", "Dense_2": "out"}
STRIDES = {"conv1": 2, "layer1": 4, "layer2": 8}


def name_of(path: str) -> str:
    """A leaf of the parameters or statistics -> its tensor in torch."""
    part, layer, *_, leaf = path.split("/")
    if part == "head":
        return f"{HEAD[layer]}.{LEAVES[leaf]}"
    if "/norm/" in path:
        layer = layer.replace("downsample.0", "downsample.1").replace("conv", "bn")
    return f"resnet18.{layer}.{LEAVES[leaf]}"


def count(path: str) -> int:
    """How many values of a batch a batch norm sees."""
    part, layer, *_ = path.split("/")
    positions = 1 if part == "head" else SIZE[0] * SIZE[1] // STRIDES[layer.partition(".")[0]] ** 2
    return CLASSES * IMAGES * positions


def ours(golden: Golden) -> dict[str, Any]:
    del golden
    backbone = resnet.make("resnet_parity", ResidualBlocks((1, 1, 1, 1), 1.0, 8))
    (mean, std), images = IMAGENET, [pixels(f"train {i}", IMAGES, *SIZE, 3) for i in range(STEPS)]
    frozen = {"params": {}, "mean": np.asarray(mean, np.float32), "std": np.asarray(std, np.float32)}
    flips = (lambda _, x: (x[::-1], None), lambda _, x: (x[:, ::-1], None))
    with mock.patch.dict(module.WAYS, {"3way": flips}), mock.patch.object(module, "JITTER", 0.0):
        method = module.cutpaste(backbone=backbone, layer="layer2", image_size=SIZE, head=(8, 4), epochs=1)
        train, describe = method.stages
        start = shapes_of(train, images[0], frozen=frozen)
        params, stats = (from_torch(tree, name_of) for tree in start.model)
        start = start._replace(model=module.CutpasteTraining(params, stats))
        batches = [batch_of(x, i / TOTAL) for i, x in enumerate(images)]
        states, losses = follow(train, start, batches, frozen)
    last = states[-1].model
    last = last._replace(stats=unbiased(last.stats, stats, count))
    network = jax.jit(train.finalize)(KEY, states[-1]._replace(model=last), frozen)
    everything = np.concatenate(images)
    features = shapes_of(describe, everything, network, frozen)._replace(params=network)
    features, _ = jax.jit(describe.update)(KEY, features, frozen, batch_of(everything))
    gaussian = jax.jit(describe.finalize)(KEY, features, frozen)
    scores = jax.jit(method.score)(gaussian, frozen, pixels("test", IMAGES, *SIZE, 3))
    return {
        "loss": np.asarray(losses),
        **under("gradient", to_torch(gradient(states[0]), name_of)),
        **under("parameters after 3 steps", to_torch(last.params, name_of)),
        **under("statistics after 3 steps", to_torch(last.stats, name_of)),
        "embedding": features.features,
        "mean": gaussian.mean,
        "score": scores.image,
        "heat map": scores.pixel,
    }
