"""MemSeg against the classes MemSeg, MemoryBank, FocalLoss and CosineAnnealingWarmupRestarts of TooTouch/MemSeg.

Commit 836bd465a9b14422f92666dc29dc36edce2692d0. There is no official code; this is what others use. Three steps of ten,
each of four images of 64 px with given anomalies; the first of them in the warmup.

The feature extractor is timm's ResNet with one block a stage (two in the fourth, and 64 channels in the first), in two
copies, since jaxad's trained stem does not feed the frozen stages: a frozen one gives the maps of stages 1 to 3, a
trained one the stem's and, from the third map, the fourth's. Convolutions before a batch norm have no bias there, and
jaxad's variances of batches are corrected before images are scored. The anomaly is that of
`MemSegDataset.generate_anomaly` with given masks, texture and opacity; it rounds down to whole levels.
"""

import importlib
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.backbones import ResidualBlocks, resnet
from jaxad.methods.memseg import LAYERS, MemsegNetwork, memseg, warmup_cosine
from jaxad.synthesis.anomaly import blend
from tests.parity.golden import Golden, normal, pixels, synthetic
from tests.parity.steps import KEY, batch_of, follow, from_torch, gradient, shapes_of, to_torch, unbiased, under

module = importlib.import_module("jaxad.methods.memseg")
N, SIDE, STEPS = 4, 64, 100
NETWORK = resnet.make("resnet10", ResidualBlocks((1, 1, 1, 1), 1.0, 8))
EXTRACTOR = "feature_extractor"
MODULES = {
    "Conv_0": "msff.upconv32.1",
    "Conv_1": "msff.upconv21.1",
    "Conv_2": "decoder.conv",
    "Conv_3": "decoder.final_conv",
    "ConvNorm_0": ("decoder.upconv3.blk.1", "decoder.upconv3.blk.2"),
    "ConvNorm_1": ("decoder.upconv2.blk.1", "decoder.upconv2.blk.2"),
    "ConvNorm_2": ("decoder.upconv1.blk.1", "decoder.upconv1.blk.2"),
    "ConvNorm_3": (f"{EXTRACTOR}.own.conv1", f"{EXTRACTOR}.own.bn1"),
    "ConvNorm_4": ("decoder.upconv0.blk.1", "decoder.upconv0.blk.2"),
    "ConvNorm_5": ("decoder.upconv2mask.blk.1", "decoder.upconv2mask.blk.2"),
}
FUSION = {"Conv_0": "conv1", "Conv_1": "conv2.0", "Conv_2": "conv2.1"}
ATTENTION = {"ConvNorm_0": ("conv1", "bn1"), "rows": "conv_h", "columns": "conv_w"}
BLOCK = {"ConvNorm_0": ("conv1", "bn1"), "ConvNorm_1": ("conv2", "bn2"), "ConvNorm_2": ("downsample.0", "downsample.1")}
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
POSITIONS = {
    **{f"ConvNorm_{i}": (SIDE // stride) ** 2 for i, stride in enumerate((16, 8, 4, 2, 2, 1))},
    **{layer: 2 * SIDE // stride for layer, stride in zip(LAYERS, (4, 8, 16), strict=True)},
    **{f"Residual_{i}": (SIDE // 32) ** 2 for i in range(2)},
}
"""Of an image, that a batch norm averages over, by the first part of its path."""


def name_of(path: str) -> str:
    """A leaf of the parameters or statistics -> its tensor in torch."""
    first, *rest = path.split("/")
    if first.startswith("Residual"):
        part, prefix = BLOCK[rest.pop(0)], f"{EXTRACTOR}.own.layer4.{first[-1]}."
    elif first.startswith("layer"):
        prefix, second = f"msff.blk{first[-1]}.", rest.pop(0)
        if second == "CoordinateAttention_0":
            part, prefix = ATTENTION[rest.pop(0)], f"{prefix}attn."
        else:
            part = FUSION[second]
    else:
        part, prefix = MODULES[first], ""
    if not isinstance(part, str):
        part = part[rest.pop(0) == "norm"]
    return f"{prefix}{part}.{LEAVES.get(rest[0], rest[0])}"


def teacher() -> Any:
    """The frozen stages."""
    modules = jax.eval_shape(NETWORK.init, KEY)["params"]
    shapes = [resnet.source(m).shapes(v["kernel"].shape) for m, v in modules.items() if not m.startswith("layer4")]
    return NETWORK.fold({k: synthetic(f"{EXTRACTOR}.frozen.{k}", v) for part in shapes for k, v in part.items()})


def ours(golden: Golden) -> dict[str, Any]:
    method = memseg(backbone=NETWORK, image_size=(SIDE, SIDE), memory_size=N)
    frozen, embed = teacher(), jax.jit(method.embed)
    remember, train = method.stages
    normals, x = (embed(frozen, pixels(name, N, SIDE, SIDE, 3)) for name in ("memory", "images"))
    memory, _ = jax.jit(remember.update)(KEY, shapes_of(remember, normals), frozen, batch_of(normals))
    memory = remember.finalize(KEY, memory, frozen)
    start = shapes_of(train, x, memory)
    params, stats = (from_torch(tree, name_of) for tree in (start.model.params, start.model.stats))
    start = start._replace(model=MemsegNetwork(params, stats, memory))
    drawn = pixels("images", N, SIDE, SIDE, 3).astype(np.float32) / 255, normal("masks", N, SIDE, SIDE) > 1
    with patch.object(module, "anomalies", lambda *_: jax.tree.map(jnp.asarray, drawn)):
        states, losses = follow(train, start, [batch_of(x, k / STEPS) for k in range(3)], frozen)
    model = states[-1].model
    stats = unbiased(model.stats, stats, lambda path: N * POSITIONS[path.partition("/")[0]])
    scores = jax.jit(method.score)(model._replace(stats=stats), frozen, x)
    mask = (normal("noise", 8, 8) > 0) & (normal("foreground", 8, 8) > -1)
    image, texture = (pixels(name, 8, 8, 3).astype(np.float32) for name in ("image with an anomaly", "source"))
    return {
        "loss": np.asarray(losses),
        **under("gradient", to_torch(gradient(states[0]), name_of)),
        **under("parameters after 3 steps", to_torch(model.params, name_of)),
        **under("statistics after 3 steps", to_torch(stats, name_of)),
        "learning rate": 3e-3 * np.asarray(jax.jit(jax.vmap(warmup_cosine))(np.float32(range(10, STEPS, 9)) / STEPS)),
        "heat map": scores.pixel,
        "score": scores.image,
        "image with an anomaly": np.floor(jax.jit(blend)(image, texture, mask, golden.given["opacity"])),
        "its mask": mask.astype(np.float32),
    }
