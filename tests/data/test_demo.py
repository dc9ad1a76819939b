"""The demo data set: reproducible images, exact masks, natural variation, and clean writes."""

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from jaxad.data import Preprocess, demo, open_data

CATEGORIES, DEFECTS = list(demo.CATEGORIES), list(demo.DEFECTS)


def test_the_demo_has_four_products_and_five_defects():
    assert CATEGORIES == ["brushed_metal", "fabric", "gear", "tablet"]
    assert DEFECTS == ["crack", "dent", "fiber", "scratch", "stain"]
    data = open_data("demo")
    assert list(data) == CATEGORIES
    for train, test in data.values():
        assert train.name == "demo" and len(train) == 40 and not train.labels.any() and test.has_masks
        assert Counter(test.defects) == {"good": 10, **dict.fromkeys(DEFECTS, 4)}
        assert len(set(train.paths + test.paths)) == 70


# Means of 16 x 16 blocks of render(category, 3, "stain", size=64), since single pixels may round differently elsewhere.
BLOCKS = {
    "brushed_metal": [[202, 210, 188, 150], [194, 196, 183, 151], [169, 174, 152, 136], [129, 140, 126, 112]],
    "fabric": [[155, 155, 149, 133], [159, 159, 154, 139], [157, 152, 148, 134], [141, 138, 126, 123]],
    "gear": [[69, 124, 99, 57], [124, 169, 127, 86], [91, 130, 141, 83], [55, 81, 87, 52]],
    "tablet": [[120, 122, 111, 98], [135, 180, 162, 103], [117, 143, 138, 97], [94, 97, 94, 92]],
}


@pytest.mark.parametrize("category", CATEGORIES)
def test_rendering_is_reproducible(category):
    image, mask = demo.render(category, 3, "stain", size=64)
    second_image, second_mask = demo.render(category, 3, "stain", size=64)
    assert np.array_equal(image, second_image) and np.array_equal(mask, second_mask)
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3) and mask.shape == (64, 64)
    blocks = image.reshape(4, 16, 4, 16, 3).mean((1, 3, 4))
    assert np.abs(blocks - BLOCKS[category]).max() < 1.5
    assert not np.array_equal(demo.render(category, 3, "stain", seed=1, size=64)[0], image)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_the_mask_covers_the_defect(category, defect):
    for index in range(2):
        normal_image, normal_mask = demo.render(category, index)
        image, mask = demo.render(category, index, defect)
        assert not normal_mask.any() and 0.0008 < mask.mean() < 0.03
        change = np.abs(image.astype(int) - normal_image).max(2)
        assert change[mask].mean() > 8 and change[mask].mean() < 120
        background = ~ndimage.binary_dilation(mask, iterations=7)  # without the shadow of a fiber or a scratch's burr
        assert change[background].max() <= 1


@pytest.mark.parametrize("category", CATEGORIES)
def test_specimens_of_a_product_vary_moderately(category):
    images = np.stack([demo.render(category, i, size=128)[0] for i in range(6)]).astype(float)
    assert images.std(0).mean() > 2
    blocks = images.reshape(6, 8, 16, 8, 16, 3).mean((2, 4, 5))
    assert blocks.std(0).mean() < 12
    assert 5 < images.mean() < 230 and images.max() > 180 and (images >= 254).mean() < 0.02


def test_written_images_equal_rendered_images(tmp_path):
    options = {"train": 2, "good": 1, "per_defect": 1, "size": 48, "seed": 5}
    root = demo.write_demo(tmp_path / "deep/demo", **options)
    data_on_disk = open_data(root, preprocess=Preprocess(None))
    records = {record.path: record for record in demo.records(**options)}
    assert list(data_on_disk) == CATEGORIES and len(records) == 4 * 8
    for split in data_on_disk.values():
        for data in split:
            indices = range(len(data))
            for path, image, mask in zip(data.paths, data.images(indices), data.masks(indices), strict=True):
                record = records[path.removeprefix(f"{root}/")]
                assert np.array_equal(image, record.image())
                assert np.array_equal(mask, record.mask() if record.mask else np.zeros((48, 48)))
    assert [path.name for path in root.parent.iterdir()] == ["demo"]
    with pytest.raises(FileExistsError, match=r"need a new folder, but .*demo exists"):
        demo.write_demo(root)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def raise_disk_full(path, pixels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_save", raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        demo.write_demo(tmp_path / "demo", train=1, good=0, per_defect=0, size=32)
    assert list(tmp_path.iterdir()) == []


def test_invalid_arguments_are_reported():
    with pytest.raises(ValueError, match="no demo category 'bolt': choose one of brushed_metal"):
        demo.render("bolt", 0)
    with pytest.raises(ValueError, match="no demo defect 'hole': choose one of crack"):
        demo.render("gear", 0, "hole")
    with pytest.raises(ValueError, match="size must be at least 32, got 8"):
        demo.render("gear", 0, size=8)
