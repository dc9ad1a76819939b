"""Writes golden/efficientad.npz with anomalib's EfficientAD, in float64.

The hidden layers of its patch networks have fewer channels, and the last convolution of its encoder a kernel of 4 x 4
for images of 128 px. Draws are replaced: another kind and factor of jitter in every step, and dropout of what `normal`
gives.
"""

# pyright: reportMissingImports=false
from importlib.metadata import version
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import torch
from anomalib.models.image.efficient_ad.lightning_model import EfficientAd
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
from torchvision.transforms import functional

from tests.parity.golden import fill, normal, pixels, write

SIZE, HIDDEN = 128, (8, 16, 16)
KINDS, DRAWS = (2, 1, 0), (0.1, 0.6, 0.9)
JITTER = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation


def images(name: str, n: int) -> torch.Tensor:
    """n images in [0, 1]."""
    return torch.from_numpy(np.moveaxis(pixels(name, n, SIZE, SIZE, 3), -1, 1) / 255.0)


def narrow(network: torch.nn.Module) -> None:
    """Replaces the convolutions of a patch network by ones with fewer channels."""
    out = network.conv4.out_channels
    widths = (3, *HIDDEN, out)
    for i, kernel in enumerate((4, 4, 3, 4)):
        setattr(network, f"conv{i + 1}", torch.nn.Conv2d(widths[i], widths[i + 1], kernel))


def dropout(x: torch.Tensor, p: float, training: bool, inplace: bool) -> torch.Tensor:
    """Dropout that depends on the shape alone."""
    del inplace
    if not training:
        return x
    b, c, h, w = x.shape
    keep = normal(f"dropout {h}", b, h, w, c) < NormalDist().inv_cdf(1 - p)
    return x * torch.from_numpy(np.moveaxis(keep, -1, 1).copy()) / (1 - p)


torch.set_default_dtype(torch.float64)
torch.nn.functional.dropout = dropout
model = EfficientAdModel(pad_maps=False)
narrow(model.teacher)
narrow(model.student)
model.ae.encoder.enconv6 = torch.nn.Conv2d(64, 64, 4)
fill(model)
collecting = SimpleNamespace(model=model, device="cpu")
batch = [SimpleNamespace(image=image) for image in images("image", 3).split(1)]
model.mean_std.update(EfficientAd.teacher_channel_mean_std(collecting, batch))
given = {"mean": model.mean_std["mean"].flatten(), "deviation": model.mean_std["std"].flatten()}
expected = {f"mean and deviation/{k}": v for k, v in given.items()}

model.train()
trained = {k: p for k, p in model.named_parameters() if k.startswith(("student", "ae"))}
for name, parameter in model.named_parameters():
    parameter.requires_grad_(name in trained)
hyperparameters = {"lr": 1e-4, "weight_decay": 1e-5, "trainer": SimpleNamespace(max_epochs=-1, max_steps=3)}
training = EfficientAd.configure_optimizers(SimpleNamespace(model=model, **hyperparameters))
optimizer, schedule = training["optimizer"], training["lr_scheduler"]
losses = []
for step, (kind, draw) in enumerate(zip(KINDS, DRAWS, strict=True)):
    model.choose_random_aug_image = lambda image, kind=kind, draw=draw: JITTER[kind](image, 0.8 + 0.4 * draw)
    photograph = images("photographs", 3)[kind][None]
    if draw < 0.3:
        photograph = functional.rgb_to_grayscale(photograph, 3)
    optimizer.zero_grad()
    loss = sum(model(batch[step].image, photograph))
    loss.backward()
    if not losses:
        expected |= {f"gradient/{k}": p.grad + 1e-5 * p.detach() for k, p in trained.items()}
    losses.append(loss.item())
    optimizer.step()
    schedule.step()
expected["loss"] = losses
expected |= {f"parameters after 3 steps/{k}": p for k, p in trained.items()}

model.eval()
for part, errors in zip(("student", "autoencoder"), model.get_maps(batch[0].image), strict=True):
    expected[f"errors/{part}"] = errors
write("efficientad", f"anomalib {version('anomalib')}", given, expected)
