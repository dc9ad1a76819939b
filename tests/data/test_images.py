"""Decoding, resizing, cropping and mapping back, compared with numpy formulas and plain PIL."""

import io
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

import jaxad
from jaxad import host_memory
from jaxad.data import PAPER, ImageError, Preprocess, to_original
from jaxad.data.images import in_threads, mask_and_gray, read, read_mask, size_of

SIDES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32 - 1)


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def save_bytes(path, content):
    path.write_bytes(content)
    return path


def gray(pixels):
    return np.repeat(pixels[..., None], 3, 2)


@settings(max_examples=25, deadline=None)
@given(h=SIDES, w=SIDES, seed=SEEDS)
@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "I;16 tiff", "F", "bmp", "16-bit RGB"])
def test_every_image_format_is_decoded_exactly(tmp_path_factory, kind, h, w, seed):
    random = np.random.default_rng(seed)
    path = tmp_path_factory.getbasetemp() / f"{kind.replace(' ', '')}.png"
    rgb = random.integers(0, 256, (h, w, 3), np.uint8)
    alpha = random.integers(0, 256, (h, w), np.uint8)
    tolerance = 0
    if kind == "L":
        save(path, rgb[..., 0])
        expected = gray(rgb[..., 0])
    elif kind == "RGB":
        save(path, rgb)
        expected = rgb
    elif kind == "RGBA":
        save(path, np.dstack([rgb, alpha]))
        expected, tolerance = rgb * (alpha[..., None] / 255), 1
    elif kind == "LA":
        Image.merge("LA", [Image.fromarray(rgb[..., 0]), Image.fromarray(alpha)]).save(path)
        expected, tolerance = gray(rgb[..., 0] * (alpha / 255)), 1
    elif kind == "P":
        image = Image.fromarray(rgb[..., 0] % 4)
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 10, 20, 30])
        image.save(path)
        expected = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (10, 20, 30)])[rgb[..., 0] % 4]
    elif kind == "1":
        save(path, alpha > 127)
        expected = gray(np.where(alpha > 127, 255, 0))
    elif kind.startswith("I;16"):
        deep = random.integers(0, 65536, (h, w)).astype(np.uint16)
        path = path.with_suffix(".tif" if "tiff" in kind else ".png")
        save(path, deep)
        expected = gray(np.round(deep / 65535 * 255))
    elif kind == "F":
        path = path.with_suffix(".tif")
        real = random.random((h, w), np.float32)
        save(path, real)
        expected = gray(np.round(real * 255))
    elif kind == "bmp":
        path = path.with_suffix(".bmp")
        save(path, rgb)
        expected = rgb
    else:
        path = path.with_suffix(".ppm")
        deep = random.integers(0, 65536, (h, w, 3)).astype(">u2")
        path.write_bytes(b"P6 %d %d 65535\n" % (w, h) + deep.tobytes())
        expected, tolerance = deep / 257, 1
    image = read(path, str(path))
    assert image.shape == (h, w, 3) and image.dtype == np.uint8
    assert size_of(path, str(path)) == (h, w)
    assert np.abs(image.astype(int) - np.asarray(expected, float)).max() <= tolerance


def test_cmyk_and_transparent_palettes_become_rgb(tmp_path):
    cyan = Image.new("CMYK", (8, 6), (255, 0, 0, 0))
    cyan.save(tmp_path / "cmyk.tif")
    assert (read(tmp_path / "cmyk.tif", "cmyk") == (0, 255, 255)).all()
    clear = Image.new("P", (8, 6), 1)
    clear.putpalette([0, 0, 0, 200, 100, 50])
    clear.save(tmp_path / "clear.png", transparency=1)
    assert (read(tmp_path / "clear.png", "clear") == 0).all()


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_to_images_and_masks(tmp_path, orientation, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    path = tmp_path / f"turned{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    expected = UPRIGHT[orientation](pixels)
    assert np.array_equal(read(path, "turned"), expected)
    assert size_of(path, "turned") == expected.shape[:2]
    assert np.array_equal(read_mask(path, "turned", threshold=200), (expected > 200).any(2))


def test_resize_and_crop_equal_pil(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    path = save(tmp_path / "a.png", pixels)
    expected = Image.fromarray(pixels).resize((48, 40), Image.Resampling.BILINEAR).crop((9, 5, 39, 35))
    assert np.array_equal(read(path, "a", Preprocess((40, 48), (30, 30))), np.asarray(expected))
    assert read(path, "a", PAPER).shape == (224, 224, 3)
    assert np.array_equal(read(path, "a", Preprocess(None, (11, 13))), pixels[25:36, 35:48])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(150, 200), None])
def test_a_large_jpeg_is_the_same_however_it_comes(tmp_path, size, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "big.jpg", pixels, exif=exif)
    preprocess = Preprocess(size)
    with Image.open(path) as image:
        decoded = np.asarray(image)
        expected = read(UPRIGHT[orientation](decoded), "array", preprocess)
        sources = [path, path.read_bytes(), path.read_bytes, image, decoded] if orientation == 1 else [path, image]
        for source in sources:
            assert np.array_equal(read(source, "big", preprocess), expected)
            assert size is not None or size_of(source, "big") == expected.shape[:2]


def encoded(pixels, kind="tiff", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def color_of_16_bits(pixels):
    """A PNG, which Pillow does not write."""
    h, w, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_bits_are_the_depth_of_integers_in_files_and_arrays(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 1024, (9, 7, 3)).astype(np.uint16)
    gray_pixels = pixels[..., 0]
    expected, ten = np.round(pixels / 1023 * 255), Preprocess(None, bits=10)
    for source in (gray_pixels, encoded(gray_pixels), encoded(gray_pixels, "png"), Image.fromarray(gray_pixels)):
        assert np.array_equal(read(source, "gray", ten), gray(expected[..., 0]))
    for source in (pixels, color_of_16_bits(pixels), save_bytes(tmp_path / "color.png", color_of_16_bits(pixels))):
        assert np.array_equal(read(source, "color", ten), expected)
    eight = encoded(expected[..., 0].astype(np.uint8))
    assert np.array_equal(read(eight, "8 bits", ten), gray(expected[..., 0]))
    graymap = b"P5 7 9 1023\n" + gray_pixels.astype(">u2").tobytes()  # states its depth itself
    assert np.abs(read(graymap, "pgm", Preprocess(None, bits=12)) - gray(expected[..., 0])).max() <= 1
    decoded = Image.open(io.BytesIO(color_of_16_bits(pixels)))
    with pytest.raises(ImageError, match="Pillow has decoded the upper 8 bits of color only"):
        read(decoded, "color", ten)
    with pytest.raises(ImageError, match=r"pixels of 10 bits must lie in 0..1023, got 1024 in bright: set bits"):
        read(np.full((2, 2), 1024, np.uint16), "bright", ten)
    with pytest.raises(ValueError, match="bits must be an integer from 8 to 16, got 17"):
        Preprocess(bits=17).check()


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_zero_may_be_white_in_a_tiff(dtype, compression):
    values = np.linspace(0, 1, 35).reshape(5, 7) * {"uint16": 65535, "float32": 1}[dtype]
    black_is_zero, white_is_zero = (
        encoded(values.astype(dtype), tiffinfo={262: number}, compression=compression) for number in (1, 0)
    )
    assert np.array_equal(read(white_is_zero, "white"), 255 - read(black_is_zero, "black"))


def test_a_tiff_of_12_bits_says_so():
    packed = np.zeros((4, 6), np.uint8)
    packed[:, :3] = (0xFF, 0xF8, 0x00)  # 4095 and 2048
    file = bytearray(encoded(packed, tiffinfo={259: 1}))
    for place, tag, *_ in tags_of(file):
        if tag in (256, 258):
            file[place : place + 12] = struct.pack("<HHIHH", tag, 3, 1, 4 if tag == 256 else 12, 0)
    assert read(bytes(file), "12 bits")[0, :, 0].tolist() == [255, 128, 0, 0]


def tags_of(file):
    (first,) = struct.unpack_from("<I", file, 4)
    (n,) = struct.unpack_from("<H", file, first)
    return [(place, *struct.unpack_from("<HHII", file, place)) for place in range(first + 2, first + 2 + 12 * n, 12)]


@pytest.mark.parametrize("compression", [None, "jpeg", "tiff_adobe_deflate"])
@pytest.mark.parametrize("fault", ["fewer strips", "lower strips", "no offset", "short strip", "signed"])
def test_a_tiff_that_lacks_rows_or_has_signed_samples_is_refused(fault, compression, monkeypatch):
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 1024)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    rows = {} if compression else {278: 16}
    file = bytearray(encoded(pixels, tiffinfo={339: 1} | rows, compression=compression))
    assert np.abs(read(bytes(file), "whole").astype(int)[..., 0] - pixels).max() <= (
        255 if compression == "jpeg" else 0
    )
    for place, tag, kind, count, value in tags_of(file):
        width = {3: 2, 4: 4}.get(kind, 1)
        if fault == "fewer strips" and tag in (273, 279):
            struct.pack_into("<I", file, place + 4, count - 1)
        elif fault == "lower strips" and tag == 278:
            struct.pack_into("<H" if kind == 3 else "<I", file, place + 8, 8)
        elif fault == "no offset" and tag == 273:
            file[value + width : value + 2 * width] = bytes(width)
        elif fault == "short strip" and tag == 279:
            file[value + width : value + 2 * width] = (100).to_bytes(width, "little")
        elif fault == "signed" and tag == 339:
            struct.pack_into("<H", file, place + 8, 2)
    with pytest.raises(ImageError, match=r"cannot decode a.tif \(.*(strip|signed|decoder error).*\): repair or remove"):
        read(bytes(file), "a.tif")


@settings(max_examples=40, deadline=None)
@given(h=SIDES, w=SIDES, new_h=SIDES, new_w=SIDES, seed=SEEDS)
def test_masks_are_resized_by_nearest_neighbor_like_in_pil(h, w, new_h, new_w, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w), np.uint8)
    expected = Image.fromarray(pixels).resize((new_w, new_h), Image.Resampling.NEAREST)
    mask = read_mask(pixels, "m", Preprocess((new_h, new_w)), 127)
    # A center on the border between two pixels has no unique nearest pixel.
    rows, columns = ((2 * np.arange(new) + 1) * old % (2 * new) > 0 for old, new in ((h, new_h), (w, new_w)))
    assert np.array_equal(mask[rows][:, columns], np.asarray(expected)[rows][:, columns] > 127)


def test_mask_pixels_above_the_threshold_are_anomalous(tmp_path):
    values = np.array([[0, 1, 127, 128, 255]], np.uint8)
    assert read_mask(values, "m", threshold=0).tolist() == [[False, True, True, True, True]]
    assert read_mask(values, "m", threshold=127).tolist() == [[False, False, False, True, True]]
    assert read_mask(values > 0, "m", threshold=127).tolist() == [[False, True, True, True, True]]
    deep = save(tmp_path / "deep.png", np.array([[0, 1, 65535]], np.uint16))
    assert read_mask(deep, "m", threshold=0).tolist() == [[False, True, True]]
    colored = save(tmp_path / "rgb.png", np.array([[[0, 0, 0], [0, 0, 9]]], np.uint8))
    assert read_mask(colored, "m").tolist() == [[False, True]]
    resized = read_mask(np.eye(8, dtype=np.uint8), "m", Preprocess((16, 16), (8, 8)))
    assert np.array_equal(resized, np.kron(np.eye(8), np.ones((2, 2)))[4:12, 4:12] > 0)


def drawn(kind):
    """A mask of a disk, drawn or saved in one of the ways of annotation tools."""
    y, x = np.mgrid[:64, :64]
    disk = np.hypot(y - 30, x - 33) < 13
    level = Image.fromarray(np.where(disk, np.uint8(255), np.uint8(0)))
    black, white = Image.new("L", level.size), Image.new("L", level.size, 255)
    if kind == "palette":
        image = Image.fromarray(disk.astype(np.uint8) * 9)
        image.putpalette([0, 0, 0] * 9 + [64, 0, 0])
    elif kind == "palette without colors":
        image = Image.fromarray(disk.astype(np.uint8))
        image.putpalette([0, 0, 0, 0, 0, 0])
    else:
        image = {
            "two levels": level,
            "0 and 1": Image.fromarray(disk.astype(np.uint8)),
            "numbers of classes": Image.fromarray(disk * np.where(x > 30, 1, 5).astype(np.uint8)),
            "one bit": Image.fromarray(disk),
            "12 bits": Image.fromarray(disk.astype(np.uint16) * 4095),
            "black on transparent": Image.merge("RGBA", [black, black, black, level]),
            "red on white that is transparent": Image.merge("RGBA", [white, black, black, level]),
            "half transparent": Image.merge("LA", [white, level.point(lambda value: value // 2)]),
            "opaque": Image.merge("RGBA", [level, level, level, white]),
            "jpeg": level,
        }[kind]
    encoded = io.BytesIO()
    image.save(encoded, "jpeg" if kind == "jpeg" else "png")
    return encoded.getvalue(), disk


KINDS = ["two levels", "0 and 1", "numbers of classes", "one bit", "12 bits", "black on transparent", "opaque", "jpeg"]
KINDS += ["red on white that is transparent", "half transparent", "palette", "palette without colors"]


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_a_mask_has_the_pixels_that_were_drawn(kind):
    encoded, disk = drawn(kind)
    mask, gray = mask_and_gray(lambda: encoded, kind)
    assert np.array_equal(mask, disk) and (gray > 0) == (kind == "jpeg")


def test_masks_in_memory_may_have_any_type_of_numbers():
    disk = drawn("two levels")[1]
    for array in (disk, disk * 1, disk * 255.0, disk.astype(np.float32), np.repeat(disk[..., None] * 255, 3, 2)):
        assert np.array_equal(read_mask(array, "m"), disk)
    opaque = np.dstack([np.repeat(disk[..., None] * np.uint8(255), 3, 2), np.full(disk.shape, 255, np.uint8)])
    assert np.array_equal(read_mask(opaque, "m"), disk)
    for array, got in ((disk[0], r"got \(64,\)"), (disk[None], r"got \(1, 64, 64\)")):
        with pytest.raises(ImageError, match=rf"a mask must have shape \(h, w\) .*, {got}"):
            read_mask(array, "m")
    for array in (-1 * disk, np.where(disk, np.inf, 0)):
        with pytest.raises(ImageError, match="values of a mask must be 0 or more and finite"):
            read_mask(array, "m")


def test_black_beside_colors_on_transparent_is_no_mask():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3], pixels[0, :, 0] = 255, 255
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "png")
    with pytest.raises(ImageError, match="black and other colors on transparent"):
        read_mask(image.getvalue, "m")


@settings(max_examples=25, deadline=None)
@given(h=st.integers(8, 90), w=st.integers(8, 90), crop=st.booleans(), seed=SEEDS)
def test_a_heat_map_returns_to_its_place_in_the_original(h, w, crop, seed):
    preprocess = Preprocess((32, 40), (24, 32) if crop else None)
    size = preprocess.output_size((h, w))
    assert np.allclose(to_original(np.full(size, 3.5, np.float32), (h, w), preprocess), 3.5)
    random = np.random.default_rng(seed)
    row, column = random.integers(4, size[0] - 4), random.integers(4, size[1] - 4)
    heat = np.zeros(size, np.float32)
    heat[row - 2 : row + 3, column - 2 : column + 3] = 1
    restored = to_original(heat, (h, w), preprocess)
    assert restored.shape == (h, w) and restored.dtype == np.float32
    assert restored.min() >= 0 and restored.max() <= 1 + 1e-5
    top, left = ((32 - 24) / 2, (40 - 32) / 2) if crop else (0, 0)
    y, x = np.mgrid[:h, :w] + 0.5
    center = (restored * y).sum() / restored.sum(), (restored * x).sum() / restored.sum()
    expected = (row + 0.5 + top) * h / 32, (column + 0.5 + left) * w / 40
    assert np.allclose(center, expected, atol=0.6 * max(h / 32, w / 40, 1))


def test_the_cropped_border_gets_the_minimum():
    heat = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    restored = to_original(heat, (12, 12), Preprocess(None, (8, 8)))
    assert np.array_equal(restored[2:10, 2:10], heat)
    restored[2:10, 2:10] = heat.min()
    assert (restored == heat.min()).all()
    with pytest.raises(ValueError, match=r"preprocessed image \(8, 8\), got \(4, 4\)"):
        to_original(np.zeros((4, 4), np.float32), (12, 12), Preprocess(None, (8, 8)))


def test_threads_keep_the_order_and_raise_errors():
    assert in_threads(lambda i: i * i, range(50)) == [i * i for i in range(50)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda i: 1 // i, range(3))


def broken_file(kind):
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(encoded, "png")
    data = bytearray(encoded.getvalue())
    if kind == "truncated":
        return bytes(data[: len(data) // 2])
    if kind == "damaged":
        data[2000:2100] = bytes(100)
        return bytes(data)
    return {"text": b"no image at all", "empty": b"", "header": b"P6 3x 4 255\n"}[kind]


@pytest.mark.parametrize("kind", ["truncated", "damaged", "text", "empty", "header"])
def test_the_error_names_a_corrupt_file(tmp_path, kind):
    path = tmp_path / "part_017.png"
    path.write_bytes(broken_file(kind))
    with pytest.raises(ImageError, match=r"cannot decode .*part_017.png \(.+\): repair or remove it$"):
        read(path, str(path))


def test_other_invalid_images_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image file not found: gone\.png"):
        read(tmp_path / "gone.png", "gone.png")
    hot = save(tmp_path / "hot.tif", np.full((4, 4), 1.5, np.float32))
    with pytest.raises(ImageError, match=r"\[0, 1\], got 1.5 to 1.5 in hot: scale"):
        read(hot, "hot")
    with pytest.raises(ImageError, match="got nan"):
        read(np.full((4, 4), np.nan, np.float32), "nan")
    wide = save(tmp_path / "wide.tif", np.full((4, 4), 70000, np.int32))
    with pytest.raises(ImageError, match=r"0..65535, got 70000"):
        read(wide, "wide")
    with pytest.raises(ImageError, match="uint8, uint16 or float"):
        read(np.zeros((4, 4), np.int64), "long")
    with pytest.raises(ImageError, match=r"got \(4, 4, 2\)"):
        read(np.zeros((4, 4, 2), np.uint8), "two")
    with pytest.raises(ValueError, match=r"fit into the image, got \(9, 9\) for 4 x 4 \(small\)"):
        read(np.zeros((4, 4), np.uint8), "small", Preprocess(None, (9, 9)))


def test_the_error_names_a_file_that_is_too_large(tmp_path, monkeypatch):
    path = save(tmp_path / "huge.png", np.zeros((30, 30), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"huge.png is too large to decode \(.*\): cut it into tiles"):
        read(path, "huge.png")


@pytest.mark.parametrize(("compression", "mode"), [("tiff_adobe_deflate", "RGB"), ("group4", "1")])
def test_damage_that_libtiff_finds_is_an_error_with_the_name_of_the_file(tmp_path, capfd, compression, mode):
    """Pillow reads on behind some of it, and libtiff would write to stderr without the name."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = tmp_path / "photo.tif"
    Image.fromarray(pixels).convert(mode).save(path, compression=compression)
    content = bytearray(path.read_bytes())
    content[300:-300:97] = bytes(255 - value for value in content[300:-300:97])
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"photo\.tif"):
        read(path, "photo.tif")
    assert capfd.readouterr().err == ""


def test_warnings_of_pillow_do_not_show(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (20, 20)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\0\0damaged")
    program = "import sys; from jaxad.data.images import read; print(read(sys.argv[1], 'photo.jpg').shape)"
    command = [sys.executable, "-W", "always", "-c", program, str(path)]
    done = subprocess.run(command, cwd=Path(jaxad.__file__).parents[1], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(20, 20, 3)\n", "")


@pytest.mark.parametrize("kind", ["png", "tiff", "jpeg2000"])
def test_an_image_that_takes_more_memory_than_there_is_is_not_decoded(kind, monkeypatch):
    bomb = encoded(np.zeros((3000, 3000), np.uint8), kind)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 200_000_000)
    with pytest.raises(ImageError, match=r"bomb is too large for the memory .*half of the free 0.2 GB\): cut"):
        read(bomb, "bomb")


def test_tiles_larger_than_their_image_count_as_memory(monkeypatch):
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30000, 323: 30000, 324: 128, 325: 9}
    entries = b"".join(struct.pack("<HHII", key, 4, 1, value) for key, value in tags.items())
    tiled = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + zlib.compress(bytes(999))
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 200_000_000)
    with pytest.raises(ImageError, match="bomb is too large for the memory at hand"):
        read(tiled, "bomb")


def test_threads_wait_for_memory_that_others_have_reserved(monkeypatch):
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 4 * host_memory.FREE)
    needed, entered = host_memory.FREE + 1, threading.Event()

    def reserve():
        with host_memory.reserved(needed):
            entered.set()

    with host_memory.reserved(needed):
        thread = threading.Thread(target=reserve)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(10)
    thread.join()
