"""Repeated shots of one part are noticed, and parts that only look alike are not."""

import numpy as np
import pytest

from jaxad.data import Arrays, Preprocess, open_data
from jaxad.data.repeats import LEAST, SAMPLE, alike_names, near_duplicates, sample

PARTS = [f"{i:03d}" for i in range(40)]


@pytest.mark.parametrize(
    "names",
    [
        [f"part{part}_{shot}.png" for part in PARTS for shot in range(3)],
        [f"{part} ({shot}).jpg" for part in PARTS for shot in (1, 2)],
        [f"lot7-{part}{shot}.png" for part in PARTS for shot in "abc"],
        [f"{part}_{view}.png" for part in PARTS for view in ("top", "side")],
        [f"{part}_{shot}.png" for part in PARTS for shot in range(1 + int(part) % 4)],
    ],
)
def test_names_that_tell_part_and_shot(names):
    first, second = alike_names([f"photos/good/{name}" for name in names])
    assert first != second and first[:4] == second[:4]


@pytest.mark.parametrize(
    "names",
    [
        [f"{part}.png" for part in PARTS],
        [f"img_{part}.png" for part in PARTS],
        [f"normal{part}.jpg" for part in PARTS],
        [f"exp{i % 6}_num_{100 + 7 * i}.jpg" for i in range(700)],  # MTD: the tile is not in the name
        [f"day{day}_{part}.png" for day in range(5) for part in PARTS],
        [f"20240305_{hour:02d}{minute:02d}00.png" for hour in range(8, 16) for minute in range(60)],
        [f"2024-03-05 08-{minute:02d}-{second}.png" for minute in range(60) for second in (10, 30, 50)],
        [f"IMG_20240305_{part}_{burst}.jpg" for part in PARTS for burst in range(3)],
        [f"{0x9F3A1B2C * (i + 1) % 2**32:08x}.png" for i in range(100)],
        [f"{part}_good.png" for part in PARTS],
        ["a_1.png", "a_2.png", "b_1.png", "b_2.png"],
        [f"array[{i}]" for i in range(50)],
    ],
)
def test_other_names(names):
    assert alike_names([f"photos/good/{name}" for name in names]) is None


def thumbnails(parts, shots, seed=0, pose=0.0, noise=4.0):
    """Pictures of parts that have a share `pose` of their contrast in common."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(0, 30, (16, 16, 1)), rng.normal(0, 30, (parts, 1, 16, 16, 1))
    pictures = 128 + pose * common + (1 - pose) * own
    light = rng.uniform(0.7, 1.0, (parts, shots, 1, 1, 1))
    pixels = light * pictures + rng.normal(0, noise, (parts, shots, 16, 16, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8).reshape(-1, 16, 16, 3)


@pytest.mark.parametrize("pose", [0.0, 0.7])
@pytest.mark.parametrize(("parts", "shots"), [(20, 2), (60, 3), (30, 8)])
def test_shots_of_a_part_are_near_duplicates(parts, shots, pose):
    assert near_duplicates(thumbnails(parts, shots, pose=pose)) > 0.9
    order = np.random.default_rng(0).permutation(parts * shots)
    assert near_duplicates(thumbnails(parts, shots, pose=pose)[order]) > 0.9


@pytest.mark.parametrize("pose", [0.0, 0.7, 0.98])
@pytest.mark.parametrize("parts", [LEAST, 200])
def test_different_parts_are_none(parts, pose):
    assert near_duplicates(thumbnails(parts, 1, pose=pose)) < 0.1
    assert near_duplicates(np.full((parts, 16, 16, 3), 90, np.uint8)) == 0  # nor is one gray picture


def test_a_few_images_tell_nothing():
    assert near_duplicates(thumbnails(LEAST // 2 - 1, 2)) == 0


def test_large_data_sets_are_sampled_in_runs():
    assert np.array_equal(sample(SAMPLE), np.arange(SAMPLE))
    rows = sample(10_000)
    assert len(rows) == len(set(rows)) <= SAMPLE and rows[0] == 0 and rows[-1] == 9_999
    assert (np.diff(rows) == 1).mean() > 0.9


def test_groups_end_the_search():
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8), 2, axis=0)
    assert "near duplicates" in open_data(images)["arrays"].train.repeats
    groups = np.arange(40) // 2
    assert open_data(Arrays(images, groups=groups))["arrays"].train.repeats == ""


def test_real_photographs(shared):
    """MTD has six exposures of a tile; 209 bottles and 100 pills in one pose are different ones."""
    for name, repeated in (("mtd", True), ("mvtec_bottle", False), ("pillqc", False)):
        (split,) = open_data(shared / "data" / name).values()
        assert ("near duplicates" in split.train.repeats) == repeated


@pytest.mark.slow
def test_rendered_photographs():
    data = open_data("demo", preprocess=Preprocess((32, 32)))
    assert {category: split.train.repeats for category, split in data.items()} == dict.fromkeys(data, "")
