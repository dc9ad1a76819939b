"""Writes golden/*.npz: the feature maps of the PyTorch originals with random weights, for `test_parity.py`.

    python tests/backbones/make_golden.py [NAME ...]

It needs torch, torchvision and timm, which the project does not need; the files are committed. `synthetic` draws
weights and batch-norm statistics from the names of the tensors, so the files hold only a few entries of every map.
"""

# pyright: reportMissingImports=false
import sys
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("golden")
SIZES = ((64, 64), (65, 97), (78, 51))
"""Heights and widths of the images: even, odd, and multiples of no stride."""
PATCHED = ((32, 48), (224, 224), (256, 240))
"""Heights and widths for transformers: fewer patches than in training, as many, and more."""
KEPT = 192
"""Number of entries of a feature map that are stored."""
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
EFFICIENTNETS = tuple(f"efficientnet_b{i}" for i in range(8))
VGGS = tuple(f"vgg{depth}{norm}" for norm in ("", "_bn") for depth in (11, 13, 16, 19))
PATCH_NETWORKS = ("efficientad_small", "efficientad_medium")
TRANSFORMERS = ("deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224", "cait_xxs24_224")


def synthetic(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A random float32 tensor for that name in a checkpoint, scaled so that activations stay in range."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 3:  # a transformer's tokens and their positions
        return rng.standard_normal(shape, np.float32) / 2
    if len(shape) != 1:
        return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    low, high = {"weight": (0.4, 0.9), "running_var": (0.2, 1.2)}.get(name.rpartition(".")[2], (-0.3, 0.3))
    return rng.uniform(low, high, shape).astype(np.float32)


def image(size: tuple[int, int]) -> np.ndarray:
    """A random RGB image b h w 3, already normalized."""
    return np.random.default_rng(size).standard_normal((1, *size, 3), np.float32)


def sizes(name: str) -> tuple[tuple[int, int], ...]:
    """The sizes of the images for a golden file of that name."""
    return PATCHED if name in TRANSFORMERS else SIZES


def kept(maps: np.ndarray) -> np.ndarray:
    """The entries of a feature map (b h w c) that are stored: evenly spread, including the first and the last."""
    flat = maps.reshape(-1)
    return flat[np.linspace(0, flat.size - 1, KEPT).astype(int)]


def original(name: str):
    """The PyTorch module for the name of a golden file, and its submodules whose outputs are our stages."""
    import torch
    import torchvision

    architecture, _, variant = name.partition(".")
    if architecture in RESNETS:
        module = torchvision.models.get_model(architecture)
        if variant == "caffe_in1k":
            for block in module.modules():
                if isinstance(block, torchvision.models.resnet.Bottleneck):
                    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
        stages = {stage: module.get_submodule(stage) for stage in ("layer1", "layer2", "layer3", "layer4")}
    elif architecture in VGGS:
        module = torchvision.models.get_model(architecture)
        pools = [layer for layer in module.features if isinstance(layer, torch.nn.MaxPool2d)]
        stages = {f"pool{i + 1}": pool for i, pool in enumerate(pools)}
        module.classifier = torch.nn.Identity()
    elif architecture in PATCH_NETWORKS:
        module = patch_network(architecture)
        stages = {"head": module[-1]}
    elif variant == "torchvision":
        module = torchvision.models.get_model(architecture)
        names = ("stem", *(f"blocks.{i}" for i in range(7)), "head")
        stages = dict(zip(names, module.features, strict=True))
    else:
        import timm

        module = timm.create_model(architecture)
        blocks = {f"blocks.{i}": block for i, block in enumerate(module.blocks)}
        stages = {"stem": module.bn1, **blocks, "head": module.bn2}
    state = {k: torch.from_numpy(synthetic(k, v.shape)) for k, v in module.state_dict().items() if v.ndim}
    module.load_state_dict(state, strict=False)
    return module.eval(), stages


def patch_network(name: str):
    """EfficientAD's network, laid out as in nelson1425/EfficientAD."""
    from torch import nn

    if name == "efficientad_small":
        widths, rest = (128, 256), [nn.Conv2d(256, 256, 3), nn.ReLU(), nn.Conv2d(256, 384, 4)]
    else:
        widths, rest = (256, 512), [nn.Conv2d(512, 512, 1), nn.ReLU(), nn.Conv2d(512, 512, 3), nn.ReLU()]
        rest += [nn.Conv2d(512, 384, 4), nn.ReLU(), nn.Conv2d(384, 384, 1)]
    first = [nn.Conv2d(3, widths[0], 4), nn.ReLU(), nn.AvgPool2d(2, 2)]
    return nn.Sequential(*first, nn.Conv2d(*widths, 4), nn.ReLU(), nn.AvgPool2d(2, 2), *rest)


def convolutional(name: str):
    """A function from an image b 3 h w to the feature maps of all stages."""
    module, stages = original(name)
    outputs = {}
    for stage, submodule in stages.items():
        submodule.register_forward_hook(lambda _module, _inputs, out, stage=stage: outputs.update({stage: out}))

    def stages_of(x):
        module(x)
        return [outputs[stage] for stage in stages]

    return stages_of


def transformer(name: str):
    """The same for a transformer, built for the size of the image, with its position embedding resampled to it."""
    import timm
    import torch
    from timm.layers import resample_abs_pos_embed

    shapes = {k: v.shape for k, v in timm.create_model(name).state_dict().items()}

    def stages_of(x):
        module = timm.create_model(name, img_size=tuple(x.shape[2:])).eval()
        state = {k: torch.from_numpy(synthetic(k, shape)) for k, shape in shapes.items()}
        tokens = 0 if name.startswith("cait") else module.num_prefix_tokens
        grid = module.patch_embed.grid_size
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=tokens)
        module.load_state_dict(state)
        return module.forward_intermediates(x, norm=True, intermediates_only=True)

    return stages_of


def make(name: str) -> None:
    """Writes the golden file of that name."""
    import torch

    stages_of = transformer(name) if name in TRANSFORMERS else convolutional(name)
    arrays = {}
    for size in sizes(name):
        with torch.no_grad():
            outputs = stages_of(torch.from_numpy(image(size)).permute(0, 3, 1, 2))
        maps = [output.permute(0, 2, 3, 1).contiguous().numpy() for output in outputs]
        prefix = f"{size[0]}x{size[1]}"
        arrays[f"{prefix}/shape"] = np.array([m.shape for m in maps])
        arrays[f"{prefix}/peak"] = np.array([np.abs(m).max() for m in maps])
        arrays[f"{prefix}/kept"] = np.stack([kept(m) for m in maps])
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)


if __name__ == "__main__":
    everything = (
        *RESNETS,
        "resnet50.caffe_in1k",
        *VGGS,
        *PATCH_NETWORKS,
        *EFFICIENTNETS,
        *(f"tf_{name}" for name in EFFICIENTNETS),
        *(f"{name}.torchvision" for name in EFFICIENTNETS),
        *TRANSFORMERS,
    )
    for name in sys.argv[1:] or everything:
        make(name)
        print(name, flush=True)
