"""Trains a model of anomalib on arrays; anomalib_peers.py runs this file with a Python that has anomalib.

The command line is JSON (folder, method, options, weights, teacher, auxiliary, epochs, batch_size, seed, channels). The
folder holds train.npy and test.npy (uint8 n h w 3) and gets image.npy and pixel.npy, the scores; the seconds are
printed as JSON.
"""

# pyright: reportMissingImports=false
import json
import sys
import time
from pathlib import Path

import anomalib.models
import FrEIA.framework
import numpy as np
import timm
import torch
import torchvision
from anomalib.data import ImageBatch
from anomalib.models.image.csflow import torch_model as csflow
from anomalib.models.image.csflow.anomaly_map import AnomalyMapMode
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from PIL import Image
from safetensors.torch import load_file

MODELS = {
    "cfa": "Cfa",
    "cflow": "Cflow",
    "csflow": "Csflow",
    "draem": "Draem",
    "efficientad": "EfficientAd",
    "fastflow": "Fastflow",
    "glass": "Glass",
    "padim": "Padim",
    "patchcore": "Patchcore",
    "rd4ad": "ReverseDistillation",
    "stfpm": "Stfpm",
}
HELD_OUT = 0.1
"""The share of the training images that EfficientAD takes the range of its maps from; anomalib takes test images."""


def use_weights(path):
    """Gives every pretrained ResNet-18 the weights of a file, in which layer4 and the head are missing.

    Untrained ones, the students of STFPM, begin as torchvision's; timm's would have residual branches of zero.
    """
    create, build = timm.create_model, torchvision.models.resnet18

    def load(model):
        missing = model.load_state_dict(load_file(path), strict=False).missing_keys
        assert all(name.startswith(("layer4.", "fc.")) or "num_batches" in name for name in missing), missing
        return model

    def create_model(name, pretrained=False, **options):
        if pretrained:
            return load(create(name, pretrained=False, **options))
        return create(name, pretrained=False, zero_init_last=False, **options)

    timm.create_model = create_model
    torchvision.models.resnet18 = lambda weights=None, **options: load(build(**options)) if weights else build()


def read_image(path, mode=None):
    """Reads a photograph where torchvision has no readers."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


class ThreeScales(torch.nn.Module):
    """CS-Flow's features, of layer3 of a ResNet-18 instead of an EfficientNet-B5."""

    def __init__(self, n_scales, input_size):
        super().__init__()
        self.network = timm.create_model("resnet18", pretrained=True, features_only=True, out_indices=[3]).eval()
        self.sizes = [[n // 2**scale for n in input_size] for scale in range(n_scales)]

    def forward(self, x):
        """B 3 h w -> the maps of all scales."""
        with torch.no_grad():
            return [self.network(torch.nn.functional.interpolate(x, size))[0] for size in self.sizes]


def use_official_csflow(module):
    """Adam and the heat map of CS-Flow's official code; anomalib's have other betas, and the product of all scales."""
    module.model.anomaly_map_generator.mode = AnomalyMapMode.MAX
    options = dict(lr=1e-3, eps=1e-4, weight_decay=1e-5)
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), **options)


def use_three_scales(size):
    """Has CS-Flow take these features."""
    sides = iter([-(-(size // 2**scale) // 16) for scale in range(3)])

    def input_node(*_, name):
        side = next(sides)
        return FrEIA.framework.InputNode(256, side, side, name=name)

    csflow.InputNode, csflow.CsFlowMultiScaleFeatureExtractor = input_node, ThreeScales


def prepare_efficientad(module, settings, train):
    """What EfficientAD's Lightning module does before training, with a teacher and photographs that are given."""
    module.model.teacher.load_state_dict(load_file(settings["teacher"]))
    photographs = [Image.open(path).convert("RGB") for path in sorted(Path(settings["auxiliary"]).rglob("*.jpg"))]
    size = train.shape[2:]
    twice = [np.asarray(image.resize([2 * n for n in size[::-1]], Image.Resampling.BILINEAR)) for image in photographs]
    inner = np.stack([x[size[0] // 2 :][: size[0], size[1] // 2 :][:, : size[1]] for x in twice])
    images = torch.from_numpy(inner).permute(0, 3, 1, 2) / 255
    loader = torch.utils.data.DataLoader(images, batch_size=1, shuffle=True)
    gray = torchvision.transforms.RandomGrayscale(0.3)
    module.imagenet_loader = Repeated(loader, gray)
    module.imagenet_iterator = iter(module.imagenet_loader)
    module.on_train_start = lambda: None
    module.model.mean_std.update(module.teacher_channel_mean_std([ImageBatch(image=x[None]) for x in train]))


def use_published_rate(module, steps):
    """Has CFLOW's rate warm up and fall as published; anomalib's is constant."""
    rate, first, last, warm_up, training_step, done = module.learning_rate, 0.1, 1e-3, 0.08, module.training_step, 0

    def cosine(progress):
        return last + (1 - last) * 0.5 * (1 + np.cos(np.pi * progress))

    def scheduled_step(batch, *rest):
        nonlocal done
        progress, done = done / steps, done + 1
        warming = first + (cosine(warm_up) - first) * progress / warm_up
        for group in module.optimizers().param_groups:
            group["lr"] = rate * float(warming if progress < warm_up else cosine(progress))
        return training_step(batch, *rest)

    module.training_step = scheduled_step


class Repeated:
    """Batches of photographs, some of them gray, in tuples as a folder of images gives them."""

    def __init__(self, loader, transform):
        self.loader, self.transform = loader, transform

    def __iter__(self):
        return ((self.transform(batch),) for batch in self.loader)


class Loaded(LightningDataModule):
    """The training images, where a model asks the data module for them."""

    def __init__(self, loader):
        super().__init__()
        self.train_dataloader = lambda: loader


def build(settings, size):
    """The Lightning module."""
    make = getattr(anomalib.models, MODELS[settings["method"]])
    parts = dict(post_processor=False, evaluator=False, visualizer=False)
    return make(pre_processor=make.configure_pre_processor((size, size)), **parts, **settings["options"])


def main(settings):
    """Trains and scores."""
    torch.set_num_threads(settings["threads"])
    seed_everything(settings["seed"])
    folder, method = Path(settings["folder"]), settings["method"]
    train, test = (
        torch.from_numpy(np.load(folder / f"{part}.npy")).permute(0, 3, 1, 2) / 255 for part in ("train", "test")
    )
    use_weights(settings["weights"])
    torchvision.io.read_image = read_image
    if method == "csflow":
        use_three_scales(train.shape[2])
    module, held_out = build(settings, train.shape[2]), None
    if settings["channels"]:
        module.model.idx = torch.tensor(settings["channels"])
    if method == "csflow":
        use_official_csflow(module)
    started = time.perf_counter(), time.process_time()
    if method == "efficientad":
        rows = np.random.default_rng(settings["seed"]).permutation(len(train))
        count = int(HELD_OUT * len(train))
        held_out, train = train[rows[:count]], train[rows[count:]]
        prepare_efficientad(module, settings, train)
    loader = torch.utils.data.DataLoader(
        [ImageBatch(image=x[None], gt_label=torch.zeros(1, dtype=torch.bool)) for x in train],
        batch_size=settings["batch_size"],
        shuffle=True,
        drop_last=settings["epochs"] is not None,
        collate_fn=lambda items: ImageBatch(
            image=torch.cat([item.image for item in items]), gt_label=torch.cat([item.gt_label for item in items])
        ),
    )
    if method == "cflow":
        use_published_rate(module, settings["epochs"] * len(loader))
    trainer = Trainer(
        max_epochs=settings["epochs"] or 1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        gradient_clip_val=module.trainer_arguments.get("gradient_clip_val"),
    )
    trainer.fit(module, datamodule=Loaded(loader))
    module.eval()
    if held_out is not None:
        images = [ImageBatch(image=held_out, gt_label=torch.zeros(len(held_out), dtype=torch.bool))]
        module.model.quantiles.update(module.map_norm_quantiles(images))
    fitted = time.perf_counter(), time.process_time()
    with torch.no_grad():
        results = [module(x) for x in test.split(8)]
    scored = time.perf_counter(), time.process_time()
    np.save(folder / "image.npy", torch.cat([r.pred_score.reshape(-1) for r in results]).numpy())
    np.save(folder / "pixel.npy", torch.cat([r.anomaly_map.reshape(-1, *test.shape[2:]) for r in results]).numpy())
    seconds = {
        "fit": fitted[0] - started[0],
        "cpu_fit": fitted[1] - started[1],
        "score_per_image": (scored[0] - fitted[0]) / len(test),
        "cpu_score_per_image": (scored[1] - fitted[1]) / len(test),
    }
    print(json.dumps({"seconds": seconds, "anomalib": anomalib.__version__, "torch": torch.__version__}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
