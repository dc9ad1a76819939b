"""The demo data set: reproducible, exactly masked, varied, and written without leftovers."""

import numpy as np
import pytest
from scipy import ndimage

from jaxad.data import Preprocess, demo, open_data

CATEGORIES, DEFECTS = list(demo.CATEGORIES), list(demo.DEFECTS)


def test_four_products_and_five_defects():
    assert CATEGORIES == ["brushed_metal", "fabric", "gear", "tablet"]
    assert DEFECTS == ["crack", "dent", "fiber", "scratch", "stain"]
    data = open_data("demo")
    assert list(data) == CATEGORIES
    for train, test in data.values():
        assert train.name == "demo" and len(train) == 40 and not train.labels.any() and test.has_masks
        assert {kind: test.defects.count(kind) for kind in test.defects} == {"good": 10, **dict.fromkeys(DEFECTS, 4)}
        assert len(set(train.paths + test.paths)) == 70


# Means of 16 x 16 blocks of render(category, 3, "stain", size=64); other machines may round single pixels differently.
BLOCKS = {
    "brushed_metal": [[202, 210, 188, 150], [194, 196, 183, 151], [169, 174, 152, 136], [129, 140, 126, 112]],
    "fabric": [[155, 155, 149, 133], [159, 159, 154, 139], [157, 152, 148, 134], [141, 138, 126, 123]],
    "gear": [[69, 124, 99, 57], [124, 169, 127, 86], [91, 130, 141, 83], [55, 81, 87, 52]],
    "tablet": [[120, 122, 111, 98], [135, 180, 162, 103], [117, 143, 138, 97], [94, 97, 94, 92]],
}


@pytest.mark.parametrize("category", CATEGORIES)
def test_rendering_is_reproducible(category):
    image, mask = demo.render(category, 3, "stain", size=64)
    again, mask_again = demo.render(category, 3, "stain", size=64)
    assert np.array_equal(image, again) and np.array_equal(mask, mask_again)
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3) and mask.shape == (64, 64)
    blocks = image.reshape(4, 16, 4, 16, 3).mean((1, 3, 4))
    assert np.abs(blocks - BLOCKS[category]).max() < 1.5
    assert not np.array_equal(demo.render(category, 3, "stain", seed=1, size=64)[0], image)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_the_mask_is_where_the_defect_is(category, defect):
    for index in range(2):
        flawless, empty = demo.render(category, index)
        flawed, mask = demo.render(category, index, defect)
        assert not empty.any() and 0.0008 < mask.mean() < 0.03
        change = np.abs(flawed.astype(int) - flawless).max(2)
        assert change[mask].mean() > 8 and change[mask].mean() < 120
        beyond = ~ndimage.binary_dilation(mask, iterations=7)  # the shadow of a fiber, the burr of a scratch
        assert change[beyond].max() <= 1


@pytest.mark.parametrize("category", CATEGORIES)
def test_specimens_vary_but_stay_one_product(category):
    images = np.stack([demo.render(category, i, size=128)[0] for i in range(6)]).astype(float)
    assert images.std(0).mean() > 2
    blocks = images.reshape(6, 8, 16, 8, 16, 3).mean((2, 4, 5))
    assert blocks.std(0).mean() < 12
    assert 5 < images.mean() < 230 and images.max() > 180 and (images >= 254).mean() < 0.02


def test_written_images_are_those_rendered_on_demand(tmp_path):
    options = {"train": 2, "good": 1, "per_defect": 1, "size": 48, "seed": 5}
    root = demo.write_demo(tmp_path / "deep/demo", **options)
    written = open_data(root, preprocess=Preprocess(None))
    records = {record.path: record for record in demo.records(**options)}
    assert list(written) == CATEGORIES and len(records) == 4 * 8
    for split in written.values():
        for data in split:
            every = range(len(data))
            for path, image, mask in zip(data.paths, data.images(every), data.masks(every), strict=True):
                record = records[path.removeprefix(f"{root}/")]
                assert np.array_equal(image, record.image())
                assert np.array_equal(mask, record.mask() if record.mask else np.zeros((48, 48)))
    assert [path.name for path in root.parent.iterdir()] == ["demo"]
    with pytest.raises(FileExistsError, match=r"want a new folder, but .*demo exists"):
        demo.write_demo(root)


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def full(path, pixels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        demo.write_demo(tmp_path / "demo", train=1, good=0, per_defect=0, size=32)
    assert list(tmp_path.iterdir()) == []


def test_faults():
    with pytest.raises(ValueError, match="no demo category 'bolt': choose one of brushed_metal"):
        demo.render("bolt", 0)
    with pytest.raises(ValueError, match="no demo defect 'hole': choose one of crack"):
        demo.render("gear", 0, "hole")
    with pytest.raises(ValueError, match="size must be at least 32, got 8"):
        demo.render("gear", 0, size=8)
