"""Splits by part."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.command import ROOT
from experiments.opening import grouped, split_by_part
from jaxad.data import Preprocess, Split, open_data

NORMAL, PARTS = 20, 5


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """20 normal photographs of 5 parts, of which the last 4 are test images, and 3 anomalous ones."""
    for i in range(NORMAL + 3):
        folder = "train/good" if i < 16 else "test/good" if i < NORMAL else "test/scratch"
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(tmp_path / folder / f"{i}.png")
    return open_data(tmp_path, preprocess=Preprocess((8, 8)))[tmp_path.name]


def parts(folder: Path, names: range) -> Path:
    path = folder / "parts.csv"
    path.write_text("image,part\n" + "".join(f"{i},{i % PARTS}\n" for i in names))
    return path


def test_no_part_of_the_test_set_is_in_the_training_set(split: Split, tmp_path: Path) -> None:
    data, tested = grouped(split, parts(tmp_path, range(NORMAL + 3))), set()
    for seed in range(8):
        train, test = split_by_part(data, seed)
        assert test is not None and test.split == "test" and not train.labels.any()
        names = [sorted(int(Path(p).stem) for p in data.paths) for data in (train, test)]
        assert sorted(names[0] + names[1]) == list(range(NORMAL + 3)) and names[1][-3:] == [20, 21, 22]
        new = {i % PARTS for i in names[1][:-3]}
        assert len(new) == 1 and new.isdisjoint(i % PARTS for i in names[0])
        again = split_by_part(data, seed)
        assert again.train.paths == train.paths
        tested |= new
    assert len(tested) > 1


def test_image_without_a_part_is_named(split: Split, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parts.csv must name the part of every image, got none for .*22.png"):
        grouped(split, parts(tmp_path, range(NORMAL + 2)))
    with pytest.raises(ValueError, match="needs anomalous images"):
        grouped(Split(split.train, None), parts(tmp_path, range(NORMAL + 3)))


def test_tiles_of_mtd() -> None:
    rows = np.loadtxt(ROOT / "data" / "mtd_tiles.csv", str, delimiter=",", skiprows=1)
    normal = [tile for _, tile in rows if tile.startswith("good")]
    assert len(rows) == len({*rows[:, 0]}) == 1344 and len(normal) == 952 and len({*normal}) == 172
