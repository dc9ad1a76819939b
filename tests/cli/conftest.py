"""Folders of images, random weights and fitted runs."""

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

from jaxad.backbones import backbone
from jaxad.cli import main
from tests.cli.images import SMALL, save_image


@pytest.fixture(scope="module")
def backbone_options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Random weights, so that no test needs the real ones."""
    path = tmp_path_factory.mktemp("weights") / "pdn_small.safetensors"
    modules = backbone("pdn_small").init(jax.random.key(0))["params"]
    tensors = {f"{name}.{leaf}": np.asarray(leaves[leaf]) for name, leaves in modules.items() for leaf in leaves}
    safetensors.numpy.save_file(tensors, path)
    return ("--backbone", "pdn_small", "--weights", str(path), *SMALL)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder: two days with the same file names, two sizes, two endings for one name."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for i in range(4):
        save_image(root / "monday" / f"{i}.png", i)
        save_image(root / "tuesday" / f"{i}.png", i + 10, (32, 64))
    save_image(root / "tuesday" / "0.bmp", 20)
    return root


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "parts"
    for offset, category in ((0, "bolt"), (100, "nut")):
        for i in range(6):
            save_image(root / category / "train" / "good" / f"{i}.png", offset + i)
        for i in range(3):
            save_image(root / category / "test" / "good" / f"{i}.png", offset + 10 + i)
            save_image(root / category / "test" / "scratch" / f"{i}.png", offset + 20 + i, scratch=True)
            mask = np.zeros((48, 40), np.uint8)
            mask[10:20, 5:30] = 255
            path = root / category / "ground_truth" / "scratch" / f"{i}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return root


@pytest.fixture(scope="module")
def flat_run(tmp_path_factory: pytest.TempPathFactory, photos: Path, backbone_options: tuple[str, ...]) -> Path:
    output = tmp_path_factory.mktemp("runs")
    assert main(["fit", str(photos), *backbone_options, "--output", str(output)]) == 0
    return output / "patchcore" / "photos" / "photos"


@pytest.fixture(scope="module")
def parts_runs(tmp_path_factory: pytest.TempPathFactory, mvtec: Path, backbone_options: tuple[str, ...]) -> Path:
    output = tmp_path_factory.mktemp("runs")
    options = ("--method", "padim", "--n-features", "8", "--layers", "layer1", "layer2", "--holdout", "0.34")
    assert main(["fit", str(mvtec), *options, *backbone_options, "--output", str(output)]) == 0
    return output
