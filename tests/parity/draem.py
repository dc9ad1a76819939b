"""DRAEM against the official code, with networks of 2 channels at 64 px.

From github.com/VitjanZ/DRAEM at 2dbf67397ab5c10a1494e5ae70ab59a25d7c35ef these were called, in float64:
`ReconstructiveSubNetwork`, `DiscriminativeSubNetwork`, `SSIM` and `FocalLoss` (and torch's mean squared error) as in
`train_on_device`, with Adam and the milestones of a training of 10 epochs, of which the first and the last two took a
step; and the score of its `test`, of means over 5 x 5 pixels. anomalib has the same networks, but other losses.

Anomalies are given: in some images bright pixels are inverted. Restored images stay above -0.5, below which the
official similarity changes. Biases that batch norm cancels are 0; its own are near 2, so that few ReLUs are near 0,
where rounding decides. Batch norms start from the statistics of the images; variances, which are biased in jaxad, are
compared after they are made unbiased.
"""

import importlib
import re
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.methods.draem import DraemNetworks, draem
from tests.parity.golden import Golden, pixels, synthetic
from tests.parity.steps import KEY, batch_of, from_torch, gradient, shapes_of, to_torch, under

N, SIZE = 4, 64
PROGRESS = (0.0, 0.8, 0.9)
TOLERANCES = {"gradient": (3e-3, "a ReLU near 0 that rounds to the other side changes small gradients by as much")}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def two(part: str) -> list[tuple[str, int]]:
    """A block of two convolutions: the sequence, and the place of each convolution in it."""
    return [(part, 0), (part, 3)]


def blocks(sspcab: bool) -> dict[str, list[tuple[int, list[tuple[str, int]]]]]:
    """The convolutions of every block, in jaxad's order, and how often its input was halved."""
    encoder = [(i, two(f"encoder.block{i + 1}")) for i in range(4 if sspcab else 5)]
    decoder = [(4 - i, [(f"decoder.up{i}", 1), *two(f"decoder.db{i}")]) for i in range(1, 5)]
    segment = [(i, two(f"encoder_segment.block{i + 1}")) for i in range(6)]
    for level, number in zip(range(4, -1, -1), ("_b", 1, 2, 3, 4), strict=True):
        segment += [(level, [(f"decoder_segment.up{number}", 1)]), (level, two(f"decoder_segment.db{number}"))]
    return {"reconstructive": encoder + decoder, "discriminative": segment}


def compare(golden: Golden, sspcab: bool) -> dict[str, Any]:
    """What DRAEM gives, with or without SSPCAB."""
    parts = blocks(sspcab)

    def place(path: str) -> tuple[str, int, str, int, str]:
        """Of a leaf in a block: network, number of halvings, sequence, place of the convolution, kind of module."""
        network, block, conv, kind = re.fullmatch(r"(\w+)/Blocks_(\d+)/ConvNorm_(\d+)/(\w+)/\w+", path).groups()
        level, convolutions = parts[network][int(block)]
        return network, level, *convolutions[int(conv)], kind

    def name_of(path: str) -> str:
        leaf = LEAVES[path.rpartition("/")[2]]
        if "Blocks" in path:
            network, _, sequence, number, kind = place(path)
            return f"{network}.{sequence}.{number + (kind == 'norm')}.{leaf}"
        network, module, *part = path.split("/")[:-1]
        if module == "Sspcab_0":
            corner = re.fullmatch(r"corner(\d)", part[0])
            inner = f"conv{int(corner[1]) + 1}" if corner else {"squeeze": "se.fc1", "excite": "se.fc2"}[part[0]]
            return f"{network}.encoder.block5.{inner}.{leaf}"
        return f"{network}.{'decoder' if network == 'reconstructive' else 'decoder_segment'}.fin_out.0.{leaf}"

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in golden.given:
            return golden.given[name]
        value = synthetic(name, shape) + np.float32(shifts.get(name, 0))
        if re.fullmatch(r"reconstructive\.encoder\.block5\.conv\d\.weight", name):
            return value - value.mean(1, keepdims=True)
        return value / 16 if name == "reconstructive.decoder.fin_out.0.weight" else value

    def unbiased(path: Any, after: Any, before: np.ndarray) -> np.ndarray:
        """The variance of torch: only what the steps have added is multiplied by n / (n - 1)."""
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        n = N * SIZE**2 / 4 ** place(path)[1]
        after, rest = np.asarray(after), before * np.float32(0.9 ** len(PROGRESS))
        return rest + (after - rest) * np.float32(n / (n - 1)) if path.endswith("var") else after

    shifts = {name.replace("running_mean", "bias"): 2 for name in golden.given}
    shifts["reconstructive.decoder.fin_out.0.bias"] = 0.5
    method = draem(image_size=(SIZE, SIZE), reconstructive_width=2, discriminative_width=2, sspcab=sspcab)
    x = pixels("predicted" if sspcab else "images", N, SIZE, SIZE, 3)
    training = shapes_of(method.stages[0], x)
    model = DraemNetworks(*(from_torch(tree, name_of, tensor) for tree in training.model))
    training = training._replace(model=model)

    def add_texture(key: Any, image: Any, texture: Any) -> tuple[Any, Any]:
        mask = (image[..., 0] > 0.7) & (image[0, 0, 0] > 0.5)
        return jnp.where(mask[..., None], 1 - image, image), mask

    replaced = dict(add_texture=add_texture, rotate=lambda image, _: image, source=lambda *_: None, ANOMALOUS=1.0)
    update, states, losses = jax.jit(method.stages[0].update), [], []
    with patch.multiple(importlib.import_module("jaxad.methods.draem"), **replaced):
        for progress in PROGRESS:
            training, metrics = update(KEY, training, None, batch_of(x, progress))
            states.append(training)
            losses.append(metrics["loss"])
    stats = jax.tree_util.tree_map_with_path(unbiased, training.model.stats, model.stats)
    scores = jax.jit(method.score)(DraemNetworks(training.model.params, stats), None, x)
    return {
        "loss": np.asarray(losses),
        **under("gradient", to_torch(gradient(states[0]), name_of)),
        **under("parameters after 3 steps", to_torch(training.model.params, name_of)),
        **under("statistics after 3 steps", to_torch(stats, name_of)),
        "heat map": scores.pixel,
        "score": scores.image,
    }


def ours(golden: Golden) -> dict[str, Any]:
    return compare(golden, sspcab=False)
