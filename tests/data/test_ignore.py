"""Regions to ignore: what they hold never reaches a method, and nothing else changes."""

import numpy as np
import pytest
from PIL import Image

from jaxad.data import ImageError, Preprocess, open_data
from jaxad.data.ignore import origins, regions

CORNER = np.zeros((40, 60), bool)
CORNER[:12, :20] = True
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), np.uint8)
OTHER = np.where(CORNER[..., None], 255 - IMAGES, IMAGES)
"""The same images with something else in the corner."""


@pytest.mark.parametrize(
    "preprocess", [Preprocess(None), Preprocess((64, 64)), Preprocess((17, 31)), Preprocess((32, 48), (24, 40))]
)
def test_no_pixel_depends_on_what_is_ignored(preprocess):
    ignoring = preprocess._replace(ignore=regions(CORNER))
    plain, filled, other = (
        open_data(images, preprocess=p)["arrays"].train.images(range(3))
        for images, p in ((IMAGES, preprocess), (IMAGES, ignoring), (OTHER, ignoring))
    )
    np.testing.assert_array_equal(filled, other)
    data = open_data(IMAGES, preprocess=ignoring)["arrays"].train
    ignored = data.ignored(range(3))
    np.testing.assert_array_equal(filled[~ignored], plain[~ignored])
    assert 0 < ignored.mean() < 0.25 and (ignored == ignored[0]).all()
    assert data.original_ignored(0).sum() == CORNER.sum()


def test_the_surroundings_are_mirrored_into_the_region():
    ignored = np.zeros((1, 8), bool)
    ignored[0, 3:5] = True
    assert origins(ignored).tolist() == [[0, 1, 2, 1, 6, 5, 6, 7]]
    ignored[0, :6] = True  # more than there is to mirror
    assert origins(ignored).tolist() == [[6, 6, 6, 6, 6, 7, 6, 7]]


def test_masks_of_single_images_add_to_those_of_all(tmp_path):
    own = np.zeros((40, 60), np.uint8)
    own[30:, 50:] = 255
    for name, pixels in (("own.png", own), ("0.png", IMAGES[0]), ("1.png", IMAGES[1])):
        Image.fromarray(pixels).save(tmp_path / name)
    table = tmp_path / "table.csv"
    table.write_text("image_path,label,split,ignore_path\n0.png,good,train,own.png\n1.png,good,train,\n")
    data = open_data(table, preprocess=Preprocess(None, ignore_margin=0.0))["table"].train
    assert data.ignores and data.ignored([0, 1]).sum((1, 2)).tolist() == [100, 0]
    both = data.ignoring(regions(CORNER))
    assert both.ignored([0, 1]).sum((1, 2)).tolist() == [340, 240]
    np.testing.assert_array_equal(both.images([0, 1])[~both.ignored([0, 1])], IMAGES[:2][~both.ignored([0, 1])])
    assert open_data(IMAGES)["arrays"].train.ignored([0]) is None
    grown = open_data(table, preprocess=Preprocess(None))["table"].train
    assert grown.ignored([0, 1])[:, 26:, 46:].sum((1, 2)).tolist() == [14 * 14 - 8, 0]
    np.testing.assert_array_equal(grown.images([0]), data.images([0]))
    (tmp_path / "own.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"ignore mask not found: .*own\.png of .*0\.png"):
        open_data(table)


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (np.zeros((4, 4), bool), "it marks none of its pixels"),
        (np.ones((4, 4), bool), "it marks all of its pixels"),
        (np.eye(8, dtype=bool), r"the proportions of its image, got 8 x 8 for 40 x 60 in array\[0\]"),
    ],
)
def test_masks_that_cannot_be_meant(mask, rule):
    with pytest.raises(ValueError, match=rule):
        open_data(IMAGES, preprocess=Preprocess(ignore=regions(mask)))["arrays"].train.images([0])


def test_a_mask_must_leave_pixels_of_what_is_kept():
    border = np.ones((40, 60), bool)
    border[0] = False
    data = open_data(IMAGES, preprocess=Preprocess((40, 60), (20, 30), regions(border)))["arrays"].train
    with pytest.raises(ValueError, match=r"leave none of array\[0\]"):
        data.images([0])


def test_a_mask_that_is_no_image_is_no_broken_image(tmp_path):
    (tmp_path / "mask.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot decode the ignore mask .*mask\.png") as error:
        regions(tmp_path / "mask.png")
    assert not isinstance(error.value, ImageError)
