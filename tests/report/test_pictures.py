import matplotlib
import numpy as np
import pytest
from PIL import Image

from jaxad.report import pictures

RED = (255, 0, 0)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)


def test_low_scores_keep_the_pixel_and_high_scores_take_the_hottest_color(image):
    heat = np.full((12, 16), 1.0, np.float32)
    heat[3, 4], heat[5, 6] = 3.0, 99.0
    result = pictures.overlay(image, heat, 1.0, 3.0, alpha=0.5)
    hottest = np.array(matplotlib.colormaps[pictures.COLORMAP](1.0)[:3]) * 255
    expected = image.copy()
    for pixel in ((3, 4), (5, 6)):
        expected[pixel] = np.rint(0.5 * image[pixel] + 0.5 * hottest)
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == np.uint8


def test_limits_do_not_depend_on_the_map(image):
    heat = np.linspace(1.0, 1.1, image[..., 0].size, dtype=np.float32).reshape(12, 16)
    result = pictures.overlay(image, heat, 1.0, 11.0)
    assert np.abs(result.astype(int) - image).max() <= 3


def test_equal_limits_split_the_map_into_two_parts(image):
    heat = np.zeros((12, 16), np.float32)
    heat[0, 0] = 1
    changed = (pictures.overlay(image, heat, 0.0, 0.0, alpha=1.0) != image).any(-1)
    assert changed[0, 0] and changed.sum() == 1


@pytest.mark.parametrize(
    ("low", "high", "alpha", "size", "message"),
    [
        (2.0, 1.0, 0.5, (12, 16), "low=2.0, high=1.0"),
        (float("nan"), 1.0, 0.5, (12, 16), "low=nan"),
        (0.0, 1.0, 1.5, (12, 16), "alpha must be between 0 and 1; got 1.5"),
        (0.0, 1.0, 0.5, (6, 8), r"\(6, 8\) for \(12, 16, 3\)"),
    ],
)
def test_overlay_rejects_invalid_arguments(image, low, high, alpha, size, message):
    with pytest.raises(ValueError, match=message):
        pictures.overlay(image, np.zeros(size, np.float32), low, high, alpha)


def test_a_contour_covers_both_sides_of_the_edge_only(image):
    mask = np.zeros((12, 16), bool)
    mask[3:9, 4:12] = True
    result = pictures.contour(image, mask, RED)
    red = (result == RED).all(-1)
    assert red[2:4, 6].all() and not red[1, 6] and not red[4:8, 6].any() and red[8:10, 6].all()
    np.testing.assert_array_equal(result[~red], image[~red])


def test_the_contour_of_a_full_mask_is_the_border_and_an_empty_mask_has_none(image):
    red = (pictures.contour(image, np.ones((12, 16), bool), RED) == RED).all(-1)
    assert red[0].all() and red[-1].all() and red[:, 0].all() and red[:, -1].all() and not red[1:-1, 1:-1].any()
    np.testing.assert_array_equal(pictures.contour(image, np.zeros((12, 16), bool), RED), image)
    with pytest.raises(ValueError, match="size of the image"):
        pictures.contour(image, np.zeros((3, 3), bool), RED)


def test_what_is_ignored_is_dimmed_and_striped_and_the_rest_is_not_touched(image):
    mask = np.zeros((12, 16), bool)
    mask[:6] = True
    result = pictures.hatch(image, mask)
    np.testing.assert_array_equal(result[6:], image[6:])
    stripes = (result[:6] != image[:6] // 2).any(-1)
    assert result.dtype == np.uint8 and 0.1 < stripes.mean() < 0.5
    assert pictures.hatch(image, None) is image


def test_files_store_pixels_exactly(tmp_path, image):
    heat = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32) * 1e4
    pictures.save_png(tmp_path / "a" / "b.png", image)
    pictures.save_tiff(tmp_path / "a" / "b.tiff", heat)
    with Image.open(tmp_path / "a" / "b.png") as png, Image.open(tmp_path / "a" / "b.tiff") as tiff:
        assert tiff.mode == "F"
        np.testing.assert_array_equal(np.asarray(png), image)
        np.testing.assert_array_equal(np.asarray(tiff), heat)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.png", "b.tiff"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    target = tmp_path / "kept.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), pictures.replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert target.read_text() == "old"
