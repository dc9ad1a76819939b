"""Every layout and every kind of invalid source."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxad.data import Arrays, ImageError, Preprocess, open_data
from jaxad.data.dataset import check_normals, unite
from jaxad.data.depth import usual_bits

RED = np.full((12, 16, 3), (200, 30, 30), np.uint8)
SPOT = np.zeros((12, 16), np.uint8)
SPOT[2:5, 3:9] = 255


def save(path, pixels=RED):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def category(root, mask_name="{}_mask.png", good="good"):
    for i in range(3):
        save(root / f"train/{good}/{i:03d}.png")
    for defect in (good, "crack", "dent"):
        for i in range(2):
            save(root / f"test/{defect}/{i:03d}.png")
            if defect != good and mask_name:
                save(root / "ground_truth" / defect / mask_name.format(f"{i:03d}"), SPOT)
    return root


@pytest.mark.parametrize("mask_name", ["{}_mask.png", "{}.png", "{}.bmp"])
def test_mvtec_layout_with_one_category(tmp_path, mask_name):
    data = open_data(category(tmp_path / "screw", mask_name), preprocess=Preprocess((12, 16)))
    assert list(data) == ["screw"]
    train, test = data["screw"]
    assert (train.name, train.category, train.split, len(train)) == ("screw", "screw", "train", 3)
    assert test.defects == ("crack", "crack", "dent", "dent", "good", "good")
    assert test.labels.tolist() == [1, 1, 1, 1, 0, 0] and train.labels.tolist() == [0, 0, 0]
    assert test.has_masks and test.image_size == (12, 16)
    assert np.array_equal(test.images([0, 5]), np.stack([RED, RED]))
    assert np.array_equal(test.masks([0, 5]), np.stack([SPOT > 0, SPOT > 255]))
    assert test.paths[0] == str(tmp_path / "screw/test/crack/000.png")
    assert np.array_equal(test.original(1), RED) and test.original_size(1) == (12, 16)


def test_mvtec_layout_with_several_categories(tmp_path):
    category(tmp_path / "set/nut")
    category(tmp_path / "set/bolt", mask_name=None, good="ok")
    save(tmp_path / "set/about/cover.png")
    with pytest.warns(UserWarning, match=r"1 file not read in .*set: 1 not used by the layout \(about/cover.png\)"):
        data = open_data(str(tmp_path / "set"))
    assert list(data) == ["bolt", "nut"] and {split.train.name for split in data.values()} == {"set"}
    assert not data["bolt"].test.has_masks and data["bolt"].test.masks([0]) is None
    assert data["bolt"].test.defects[-1] == "good"
    (tmp_path / "set/about/cover.png").unlink()
    assert list(open_data(tmp_path / "set", category="nut")) == ["nut"]
    assert list(open_data(tmp_path / "set", category="all")) == ["bolt", "nut"]


def test_training_images_may_lie_directly_in_train(tmp_path):
    save(tmp_path / "train/a.png")
    save(tmp_path / "test/good/b.png")
    save(tmp_path / "test/hole/c.png")
    train, test = open_data(tmp_path, layout="mvtec")[tmp_path.name]
    assert len(train) == 1 and test.labels.tolist() == [0, 1]


def test_training_anomalies_are_dropped_by_default(tmp_path):
    category(tmp_path)
    save(tmp_path / "train/crack/9.png")
    save(tmp_path / "ground_truth/crack/9_mask.png", SPOT)
    with pytest.warns(UserWarning, match=r"2 not used by the layout \(ground_truth/crack/9_mask.png"):
        assert len(open_data(tmp_path)[tmp_path.name].train) == 3
    train = open_data(tmp_path, train_anomalies=True)[tmp_path.name].train
    assert train.labels.tolist().count(1) == 1 and train.masks(range(4)).any((1, 2)).tolist().count(True) == 1


def test_a_flat_folder_includes_its_subfolders(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/er/c.tif", ".hidden.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RED).save(path, "png")
    with pytest.warns(UserWarning, match=r"2 files not read in .*: 1 hidden .*, 1 of no known image format .txt"):
        train, test = open_data(tmp_path)[tmp_path.name]
    assert test is None and not train.has_masks
    assert [path.removeprefix(f"{tmp_path}/") for path in train.paths] == ["a.jpg", "b.PNG", "deep/er/c.tif"]
    assert train.images(range(3)).shape == (3, 224, 224, 3)
    assert len(open_data(category(tmp_path / "x"), layout="flat")["x"].train) == 13  # including the masks


def test_a_flat_folder_excludes_output_of_jaxad(tmp_path):
    for name in ("a.png", "runs/patchcore/a/a/scores/new/overlays/a.png", "heat/overlays/a.png", "mine/b.png"):
        save(tmp_path / name)
    (tmp_path / "runs/patchcore/a/a/model.safetensors").touch()
    (tmp_path / "heat/scores.jsonl").touch()
    (tmp_path / "scores.jsonl").touch()  # in the folder itself, whose images are read
    with pytest.warns(UserWarning, match=r"1 file not read in .*\(scores.jsonl\)"):
        train = open_data(tmp_path)[tmp_path.name].train
    assert [path.removeprefix(f"{tmp_path}/") for path in train.paths] == ["a.png", "mine/b.png"]


def test_lists_of_files_and_single_files(tmp_path):
    paths = [save(tmp_path / f"{i}.png", np.full((4, 4, 3), i, np.uint8)) for i in (3, 1, 2)]
    train = open_data(paths, preprocess=Preprocess(None))["files"].train
    assert train.images([2, 0])[:, 0, 0, 0].tolist() == [2, 3]
    assert open_data(str(paths[0]))["files"].train.paths == (str(paths[0]),)


def test_visa_layout(tmp_path):
    lines = ["object,split,label,image,mask"]
    for name in ("candle", "pcb1"):
        for i, (split, label) in enumerate([("train", "normal"), ("test", "normal"), ("test", "anomaly")]):
            save(tmp_path / f"{name}/Data/Images/{i}.JPG")
            mask = f"{name}/Data/Masks/{i}.png" if label == "anomaly" else ""
            if mask:
                save(tmp_path / mask, SPOT // 255)
            lines.append(f"{name},{split},{label},{name}/Data/Images/{i}.JPG,{mask}")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text("\n".join(lines))
    data = open_data(tmp_path, preprocess=Preprocess(None))
    assert list(data) == ["candle", "pcb1"]
    test = data["pcb1"].test
    assert test.defects == ("good", "anomaly") and np.array_equal(test.masks([1])[0], SPOT > 0)


def test_csv_files(tmp_path):
    for name in ("a", "b", "c", "d"):
        save(tmp_path / f"images/{name}.png")
    save(tmp_path / "masks/c.png", SPOT)
    table = tmp_path / "parts.csv"
    table.write_text(
        "\ufeffimage_path, label, mask_path, split\n"
        "images/a.png,0,,train\nimages/b.png,good,,test\nimages/c.png,scratch,masks/c.png,test\nimages/d.png,,,test\n",
        encoding="utf-8",
    )
    train, test = open_data(table)["parts"]
    assert train.paths == (str(tmp_path / "images/a.png"),)
    assert test.labels.tolist() == [0, 1, -1] and test.defects == ("good", "scratch", "") and test.has_masks
    rows = "category,image_path,label,split\nx,images/a.png,normal,train\ny,images/b.png,Good,train\n"
    for separator in ",;\t":
        table.write_text(rows.replace(",", separator))
        assert list(open_data(table)) == ["x", "y"]
    assert list(open_data(table.rename(tmp_path / "parts.tsv"))) == ["x", "y"]


def test_kolektor_layout(tmp_path):
    for split, anomalous in (("train", (1,)), ("test", (0,))):
        for i in range(3):
            save(tmp_path / f"{split}/{i}.png")
            save(tmp_path / f"{split}/{i}_GT.png", SPOT * (i in anomalous))
    train, test = open_data(tmp_path)["ksdd2"]
    assert len(train) == 2 and test.labels.tolist() == [1, 0, 0] and test.masks(range(3)).any((1, 2)).tolist()[0]


def test_real_iad_layout(tmp_path):
    entries = {"OK": "OK/S1/a.jpg", "AK": "NG/AK/S2/b.jpg"}
    for name in entries.values():
        save(tmp_path / "realiad_256/toy" / name)
    save(tmp_path / "realiad_256/toy/NG/AK/S2/b.png", SPOT)
    keys = ("anomaly_class", "image_path", "mask_path")
    good, bad = (dict(zip(keys, (*entry, None), strict=True)) for entry in entries.items())
    jsons = tmp_path / "realiad_jsons/realiad_jsons"
    jsons.mkdir(parents=True)
    (jsons / "toy.json").write_text(
        json.dumps({"train": [good], "test": [good, bad | {"mask_path": "NG/AK/S2/b.png"}]})
    )
    (jsons / "usb.json").write_text("{}")  # without images
    for root in (tmp_path, tmp_path / "realiad_256"):
        train, test = open_data(root, preprocess=Preprocess(None))["toy"]
        assert len(train) == 1 and test.defects == ("good", "AK")
        assert np.array_equal(test.masks([0, 1]), np.stack([SPOT > 255, SPOT > 0]))
    (jsons / "toy.json").write_text('{"train": [{}]}')
    with pytest.raises(ValueError, match=r"toy.json is no split of Real-IAD \(KeyError\('image_path'\)\): restore"):
        open_data(tmp_path)
    save(tmp_path / "realiad_512/toy/OK/S1/a.jpg")
    with pytest.raises(
        ValueError, match=r"images of one size are expected, got .*realiad_256, .*realiad_512: pass one"
    ):
        open_data(tmp_path)


def test_magnetic_tile_layout(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"MT_Free/Imgs/{name}.jpg")
        save(tmp_path / f"MT_Free/Imgs/{name}.png", SPOT * 0)
    save(tmp_path / "MT_Fray/Imgs/c.jpg")
    save(tmp_path / "MT_Fray/Imgs/c.png", np.where(SPOT, 255, 9).astype(np.uint8))
    with pytest.raises(FileNotFoundError, match=r"put mtd_train_filenames\.txt into"):
        open_data(tmp_path)
    (tmp_path / "mtd_train_filenames.txt").write_text("b.jpg\n")
    train, test = open_data(tmp_path, mask_threshold=127, preprocess=Preprocess(None))["mtd"]
    assert [path[-5:] for path in train.paths] == ["b.jpg"] and test.defects == ("fray", "good")
    assert np.array_equal(test.masks([0])[0], SPOT > 0)


@pytest.mark.parametrize(
    ("train", "test", "mask"),
    [
        ("training/good", "testing", "ground_truth/crack/000.png"),
        ("Train/Good", "Test", "Ground Truth/CRACK/000_Mask.PNG"),
        ("train/ok", "val", "masks/crack/mask_000.png"),
        ("train/images", "test", "labels/crack/000.png"),
        ("train/good", "test", "gt/crack/000_GT.bmp"),
        ("train", "test", "ground_truth/000_gt.png"),
        ("train", "test", "mask/crack_000.png"),
        ("train/good", "test", "ground_truth/crack/000.png.png"),
        ("train/good", "test_public", "test_public/ground_truth/crack/000_mask.png"),
        ("train/good", "test", "test/crack/000_mask.png"),
    ],
)
def test_folders_and_masks_as_people_name_them(tmp_path, train, test, mask):
    root = tmp_path / "nut"
    for name in (f"{train}/000.png", f"{test}/good/000.png", f"{test}/crack/000.png"):
        save(root / name)
    save(root / mask, SPOT)
    split = open_data(root, preprocess=Preprocess(None))["nut"]
    assert len(split.train) == 1 and split.test.defects == ("crack", "good")
    assert np.array_equal(split.test.masks([0, 1]), np.stack([SPOT > 0, SPOT > 255]))


def test_all_masks_in_the_folder_of_an_image_count(tmp_path):
    root = tmp_path / "box"
    for name in ("train/good/000.png", "test/logical/000.png", "test/logical/001.png"):
        save(root / name)
    save(root / "ground_truth/logical/000/000.png", SPOT)
    save(root / "ground_truth/logical/000/001.png", SPOT[::-1])
    save(root / "ground_truth/logical/001/000.png", SPOT)
    test = open_data(root, preprocess=Preprocess(None))["box"].test
    assert np.array_equal(test.masks([0, 1]), np.stack([(SPOT + SPOT[::-1]) > 0, SPOT > 0]))


def test_links_are_followed_and_categories_have_the_names_of_the_links(tmp_path):
    for product in ("nut", "bolt"):
        category(tmp_path / "store" / product / "v1")
        (tmp_path / "set" / product).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / product).symlink_to(tmp_path / "store" / product / "v1")
    lot = tmp_path / "lot"
    save(lot / "deep/z.png")
    (tmp_path / "store/nut/v1/train/good/lot").symlink_to(lot)
    (tmp_path / "set/.ipynb_checkpoints").symlink_to(tmp_path / "store/nut/v1")
    data = open_data(tmp_path / "set")
    assert list(data) == ["bolt", "nut"] and (len(data["bolt"].train), len(data["nut"].train)) == (3, 4)


def test_what_is_not_read_of_a_folder_is_counted_with_its_reason(tmp_path):
    root = tmp_path / "photos"
    for name in ("a.png", "b.JFIF", "c.tga", "__MACOSX/a.png"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(RED).save(root / name, {".JFIF": "jpeg"}.get((root / name).suffix))
    for name in ("d.heic", "e.heic", "Thumbs.db"):
        (root / name).touch()
    (root / "gone.png").symlink_to(tmp_path / "nothing")
    (root / "self").symlink_to(root / "self")
    (root / "loop").symlink_to(root)
    with pytest.warns(UserWarning) as warned:
        train = open_data(root)["photos"].train
    assert len(train) == 3 and train.images(range(3)).shape == (3, 224, 224, 3)
    [line] = [str(warning.message) for warning in warned]
    linked = "2 behind dangling links (gone.png ...), 1 behind links to folders that are read already (loop)"
    others = "1 hidden (__MACOSX), 2 of no known image format .heic (d.heic ...)"
    assert line == f"6 files not read in {root}: {linked}, {others}"


@pytest.mark.parametrize("kind", ["folder", "folder without masks", "csv", "paths", "arrays"])
def test_sources_without_training_images_can_be_evaluated_but_not_fitted(tmp_path, kind):
    root, expected = tmp_path / "nut", [1, 0]
    for name in ("test/crack/0.png", "test/good/0.png"):
        save(root / name)
    source = root
    if kind == "folder":
        save(root / "ground_truth/crack/0_mask.png", SPOT)
    elif kind == "arrays":
        source = Arrays(test=[RED, RED], labels=[1, 0])
    elif kind != "folder without masks":
        rows = ["image_path,label", "test/crack/0.png,crack", "test/good/0.png,0"]
        expected = expected if kind == "csv" else [-1, -1]
        source = csv_file(root, "\n".join(row if kind == "csv" else row.partition(",")[0] for row in rows))
    [(train, test)] = open_data(source).values()
    assert len(train) == 0 and test.labels.tolist() == expected and test.images([0]).any()
    with pytest.raises(ValueError, match="has no normal training images: expected train/good"):
        check_normals(train)


@pytest.mark.parametrize("source", ["arrays", "ksdd2"])
def test_the_mask_threshold_decides_labels_too(tmp_path, source):
    for name, level in (("0", 9), ("1", 200)):
        save(tmp_path / f"a/test/{name}.png")
        save(tmp_path / f"a/test/{name}_GT.png", SPOT // 255 * level)
    masks = np.stack([SPOT // 255 * 9, SPOT // 255 * 200])
    data = tmp_path / "a" if source == "ksdd2" else Arrays([RED], [RED, RED], masks=masks)
    for threshold, labels in ((None, [1, 1]), (8, [1, 1]), (127, [0, 1])):
        [split] = open_data(data, mask_threshold=threshold).values()
        assert split.test.labels.tolist() == labels


def test_masks_with_gray_levels_are_said_to_have_them(tmp_path):
    root = category(tmp_path / "a")
    Image.fromarray(SPOT).save(root / "ground_truth/dent/001_mask.jpg")
    (root / "ground_truth/dent/001_mask.png").unlink()
    test = open_data(root, preprocess=Preprocess(None))["a"].test
    with pytest.warns(UserWarning, match=r"1 of 6 masks of a have gray levels, most that of .*dent/001.png: \d+ pix"):
        masks = test.masks(range(len(test)))
    assert np.array_equal(masks[3], SPOT > 0)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 4),
    h=st.integers(5, 20),
    w=st.integers(5, 20),
    channels=st.sampled_from([None, 1, 3]),
    dtype=st.sampled_from(["uint8", "uint16", "float32", "float64"]),
)
def test_arrays_of_every_type(n, h, w, channels, dtype):
    n = min(n, 2) if channels is None else n  # of (3, h, w) and (4, h, w) nobody knows what they are
    random = np.random.default_rng(0)
    bytes_ = random.integers(0, 256, (n, h, w) if channels is None else (n, h, w, channels), np.uint8)
    scale = {"uint8": 1, "uint16": 257, "float32": 1 / 255, "float64": 1 / 255}[dtype]
    data = open_data((bytes_ * np.float64(scale)).astype(dtype), preprocess=Preprocess(None))
    train = data["arrays"].train
    assert train.paths == tuple(f"array[{i}]" for i in range(n)) and train.image_size == (h, w)
    expected = bytes_ if channels is not None else bytes_[..., None]
    assert np.array_equal(train.images(range(n)), np.broadcast_to(expected, (n, h, w, 3)))


def test_arrays_with_labels_masks_and_categories():
    normal, masks = np.stack([RED] * 2), np.stack([SPOT, SPOT * 0])
    test = open_data(Arrays(normal, normal, masks=masks), preprocess=Preprocess(None))["arrays"].test
    assert test.labels.tolist() == [1, 0] and np.array_equal(test.masks([0, 1]), masks > 0)
    assert open_data(Arrays(normal, normal))["arrays"].test.labels.tolist() == [-1, -1]
    assert open_data(Arrays(normal, normal, [0, 1]))["arrays"].test.labels.tolist() == [0, 1]
    assert list(open_data({"b": normal, "a": Arrays(normal, normal, [0, 1])})) == ["a", "b"]
    mixed = open_data([RED, RED[:5, :6, 0]])["arrays"].train
    assert mixed.images([1, 0]).shape == (2, 224, 224, 3) and mixed.original_size(1) == (5, 6)


def test_masks_in_memory_may_be_what_images_may_be(tmp_path):
    path = save(tmp_path / "m.png", SPOT)
    palette = Image.fromarray(np.uint8(SPOT == 0))
    palette.putpalette([255, 255, 255, 0, 0, 0])  # the first color is the defect
    masks = [path, str(path), path.read_bytes(), palette, SPOT, None]
    test = open_data(Arrays([RED], [RED] * 6, masks=masks), preprocess=Preprocess(None))["arrays"].test
    assert np.array_equal(test.masks(range(6)), np.stack([SPOT > 0] * 5 + [SPOT > 255]))
    assert test.labels.tolist() == [1, 1, 1, 1, 1, 0]


def test_defects_without_a_marked_pixel_are_said_to_be_so():
    test = open_data(Arrays([RED], [RED] * 2, [1, 1], [SPOT, SPOT * 0]))["arrays"].test
    with pytest.warns(UserWarning, match=r"1 of 2 test images .* mark no pixel at 224 x 224, .* that of array\[1\]"):
        test.masks([0, 1])


def test_subsets(tmp_path):
    test = open_data(category(tmp_path / "a"))["a"].test
    assert test.subset(test.labels == 0).defects == ("good", "good")
    assert test.subset([3, -1, 0]).defects == ("dent", "good", "crack")
    assert test.subset(slice(1, 3)).paths == test.paths[1:3]
    assert len(test.subset(np.array([], int))) == 0


def test_groups_of_a_csv_file(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.png")
    rows = ["a.png,good,train,t1", "b.png,good,train,", "c.png,good,train,t1", "d.png,good,test,t2"]
    (tmp_path / "t.csv").write_text("\n".join(["image_path,label,split,group", *rows]))
    train, test = open_data(tmp_path / "t.csv")["t"]
    assert [train.groups[i] for i in (0, 2)] == ["t1", "t1"] and test.groups == ("t2",)
    assert train.groups[1] not in ("t1", "")


@pytest.mark.parametrize("of", ["folder", "csv"])
def test_groups_from_paths(tmp_path, of):
    names = ["day1/tile3_a.png", "day1/tile3_b.png", "day2/tile3_a.png", "day2/tile12_a.png"]
    for name in names:
        save(tmp_path / "tile9" / name)
    (tmp_path / "tile9/t.csv").write_text("\n".join(["image_path,label,split", *(f"{n},good,train" for n in names)]))
    table = (tmp_path / "tile9/t.csv").rename(tmp_path / "tile9/t.csv" if of == "csv" else tmp_path / "t.csv")
    source = table if of == "csv" else table.parent / "tile9"
    for pattern, expected in (
        (r"(tile\d+)", ["tile3", "tile3", "tile3", "tile12"]),  # the folder of the data set does not count
        (r"day(\d).*tile(\d+)", ["1 3", "1 3", "2 3", "2 12"]),
        (r"^([^/]+)/", ["day1", "day1", "day2", "day2"]),
    ):
        (split,) = open_data(source, group_by=pattern).values()
        assert sorted(split.train.groups) == sorted(expected)
        assert split.train.subset([0, 2]).groups == (split.train.groups[0], split.train.groups[2])


def test_only_training_images_need_a_group(tmp_path):
    for name in ("train/good/p1_a.png", "train/good/p1_b.png", "test/good/p2_a.png", "test/dent/unknown.png"):
        save(tmp_path / "a" / name)
    train, test = open_data(tmp_path / "a", group_by=r"(p\d)_")["a"]
    assert train.groups == ("p1", "p1") and test.groups[1] == "p2" and len(set(test.groups)) == 2


def test_folders_of_the_mvtec_layout_are_groups_and_lose_no_image(tmp_path):
    root = category(tmp_path / "tile")
    for name in ("train/good/t1/000.png", "train/good/t1/001.png", "train/good/t2/000.png", "test/dent/t3/000.png"):
        save(root / name)
    save(root / "train/good/.ipynb_checkpoints/000.png")
    save(root / "ground_truth/dent/t3/000_mask.png", 255 - SPOT)
    with pytest.warns(UserWarning, match=r"1 hidden \(train/good/.ipynb_checkpoints\)"):
        train, test = open_data(root, preprocess=Preprocess((12, 16)))["tile"]
    assert len(train) == 6 and train.groups[3:] == ("t1", "t1", "t2") and len(set(train.groups)) == 5
    grouped = test.groups.index("t3")
    assert len(test) == 7 and test.defects[grouped] == "dent"
    assert np.array_equal(test.masks([grouped])[0], SPOT == 0) and np.array_equal(test.masks([0])[0], SPOT > 0)


def test_groups_of_arrays_and_of_united_categories():
    normal = np.stack([RED] * 3)
    data = open_data({"nut": Arrays(normal, groups=[7, 7, 8]), "bolt": Arrays(normal, groups=["7", "", "7"])})
    assert data["nut"].train.groups == ("7", "7", "8")
    united = unite([data["nut"].train, data["bolt"].train, open_data(normal)["arrays"].train], "all")
    sizes = sorted(united.groups.count(group) for group in set(united.groups))
    assert sizes == [1] * 5 + [2, 2]  # a part of one category is none of another


def test_images_are_decoded_on_request(tmp_path):
    category(tmp_path / "a")
    (tmp_path / "a/train/good/001.png").write_bytes(b"broken")
    train = open_data(tmp_path / "a")["a"].train
    assert train.images([0, 2]).shape == (2, 224, 224, 3)
    with pytest.raises(ValueError, match=r"cannot decode .*good/001.png"):
        train.images([0, 1])


def test_reading_folders_does_not_import_tfds():
    code = "import sys, jaxad.data; print([m for m in ('tensorflow_datasets', 'tensorflow') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def csv_file(tmp_path, text):
    save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(text)
    return tmp_path / "t.csv"


def normal_with_a_mask(tmp_path):
    save(tmp_path / "m.png", SPOT)
    return csv_file(tmp_path, "image_path,label,mask_path\na.png,0.0,m.png\n")


def defects_only(tmp_path):
    for name in ("scratches/0.png", "dents/0.png"):
        save(tmp_path / name)
    return tmp_path


def latin1_csv(tmp_path):
    (tmp_path / "t.csv").write_bytes("image_path,label,split\ncafé.png,good,train\n".encode("latin-1"))
    return tmp_path / "t.csv"


def mask_of_another_size(tmp_path):
    save(category(tmp_path / "a") / "ground_truth/dent/001_mask.png", SPOT[:7])
    return tmp_path / "a"


def missing_mask(tmp_path):
    (category(tmp_path / "a") / "ground_truth/dent/001_mask.png").unlink()
    return tmp_path / "a"


def no_normal_images(tmp_path):
    save(tmp_path / "a/train/crack/1.png")
    return tmp_path / "a"


def folder_of(*names):
    def make(tmp_path):
        for name in names:
            save(tmp_path / "a" / name)
        return tmp_path / "a"

    return make


def mask_array(tmp_path):
    root = folder_of("train/1.png", "test/crack/1.png")(tmp_path)
    (root / "masks/crack").mkdir(parents=True)
    np.save(root / "masks/crack/1.npy", SPOT)
    return root


def empty_category(tmp_path):
    (tmp_path / "a/bolt/train").mkdir(parents=True)
    return category(tmp_path / "a/nut").parent


def good_next_to_bad(tmp_path):
    save(tmp_path / "good/1.png")
    save(tmp_path / "bad/1.png")
    return tmp_path


def mixed_sizes(tmp_path):
    save(tmp_path / "1.png")
    save(tmp_path / "2.png", RED[:9])
    return tmp_path


FAULTS = {
    "missing folder": (lambda t: t / "gone", {}, "no such file or folder: .*gone"),
    "no images": (lambda t: t, {}, r"no images found in .*: give a folder of images such as \.png"),
    "no normals": (no_normal_images, {}, "category 'a' of a has no normal training images: expected train/good"),
    "unknown category": (lambda t: category(t / "a"), {"category": "b"}, "no category 'b' in a: choose one of a"),
    "unknown layout": (lambda t: t, {"layout": "coco"}, "no layout 'coco': choose auto or one of visa, mtd"),
    "good next to bad": (good_next_to_bad, {}, "normal images only, got good next to bad in .*: pass .*good, or move"),
    "test beside images": (folder_of("1.png", "test/2.png"), {}, "no known layout, but has the subfolder test: .*mv"),
    "defects beside images": (folder_of("1.png", "x/Defects/2.png"), {}, "has the subfolder x/Defects: the nearest"),
    "masks to score": (folder_of("images/1.png", "Masks/1.png"), {"layout": "any"}, "has the subfolder Masks: the"),
    "a level too high": (folder_of("x/b/train/good/1.png", "x/b/test/good/1.png"), {}, "a/x has the layout mvtec"),
    "VisA without its split": (
        folder_of("pcb1/Data/Images/Normal/1.png", "pcb1/Data/Masks/Anomaly/1.png"),
        {},
        "nearest layout is visa, split_csv/1cls.csv",
    ),
    "mask beside an image": (folder_of("1.png", "1_GT.png"), {}, "got .*1_GT.png that looks like the mask of 1.png"),
    "masks among images": (folder_of("train/good/rgb/1.png", "train/good/gt/1.png"), {}, "masks must lie in ground_tr"),
    "labels among images": (
        folder_of("train/1.png", "test/b/img/1.png", "test/b/label/1.png"),
        {},
        "label/1.png among",
    ),
    "two training folders": (folder_of("train/1.png", "Training/1.png"), {}, "one folder of train images is expected"),
    "mask for nothing": (
        folder_of("train/1.png", "test/crack/1.png", "ground_truth/crack/2_mask.png"),
        {},
        "1 masks fit no image, the first is .*2_mask.png, and 1 test images have no mask, the first .*crack/1",
    ),
    "mask that is no image": (mask_array, {}, "1 masks fit no image, the first is .*1.npy, and 1 test im"),
    "mask for two": (
        folder_of("train/1.png", "test/crack/1.png", "test/dent/1.png", "ground_truth/1.png"),
        {},
        "truth/1.png fits several images, .*crack/1.png and .*dent/1.png: name it",
    ),
    "two masks": (
        folder_of("train/1.png", "test/crack/1.png", "ground_truth/crack/1.png", "ground_truth/crack/1_mask.png"),
        {},
        "crack/1.png has two masks, .*/1.png and .*1_mask.png: remove",
    ),
    "a mask beside and one apart": (
        folder_of("train/1.png", "test/crack/1.png", "test/crack/1_gt.png", "ground_truth/crack/1.png"),
        {},
        "crack/1.png has two masks, .*test/crack/1_gt.png and .*ground_truth/crack/1.png",
    ),
    "mask without label": (folder_of("train/1.png", "test/1.png", "masks/1.png"), {}, "with a mask needs a label, got"),
    "empty category": (empty_category, {}, "a category needs images, got none in .*bolt"),
    "mask of another size": (mask_of_another_size, {}, "got 7 x 16 for the 12 x 16 image .*dent/001.png"),
    "mask missing": (missing_mask, {}, "but 1 of them have none, the first is .*dent/001.png"),
    "mixed sizes": (
        mixed_sizes,
        {"preprocess": Preprocess(None)},
        r"got 9 x 16 in .*2.png but 12 x 16 in .*1.png: set",
    ),
    "crop too large": (
        mixed_sizes,
        {"preprocess": Preprocess(None, (10, 10))},
        r"got \(10, 10\) for 9 x 16 \(.*2.png\)",
    ),
    "crop above resize": (mixed_sizes, {"preprocess": Preprocess((8, 8), (9, 8))}, "crop must fit .* 8 x 8 .*: shrink"),
    "mask threshold": (
        lambda t: RED[None],
        {"mask_threshold": -1},
        "mask_threshold must be 0 or more, or None, got -1",
    ),
    "bad resize": (mixed_sizes, {"preprocess": Preprocess((0, 8))}, r"resize must be two positive numbers .*\(0, 8\)"),
    "csv columns": (lambda t: csv_file(t, "path,label\n"), {}, "lacks the column image_path: its first line"),
    "csv near miss": (lambda t: csv_file(t, "image_path,labels\n"), {}, "has the column labels but not label"),
    "csv encoding": (
        latin1_csv,
        {},
        "t.csv must be UTF-8 text, but .*: save it again as CSV UTF-8",
    ),
    "csv empty": (lambda t: csv_file(t, ""), {}, "lacks the column image_path"),
    "csv quotes": (
        lambda t: csv_file(t, 'image_path,label,split\na.png,"good,train\nb.png,good,train\n'),
        {},
        "t.csv is no valid CSV .unexpected end of data",
    ),
    "csv cell": (
        lambda t: csv_file(t, f"image_path,label,split\n{200_000 * 'x'},good,train\n"),
        {},
        "t.csv is no valid CSV .field larger",
    ),
    "csv line": (
        lambda t: csv_file(t, "image_path,label,split\na,b.png,good,train\n"),
        {},
        "no more cells than the first one, in line 2 of .*t.csv",
    ),
    "csv doubled column": (
        lambda t: csv_file(t, "image_path,label,split,label\na.png,good,train,bad\n"),
        {},
        "has two columns of one name",
    ),
    "csv split": (
        lambda t: csv_file(t, "image_path,label,split\na.png,good,val\n"),
        {},
        "split must be train or test, got 'val' in line 2 of",
    ),
    "csv label": (
        lambda t: csv_file(t, "image_path,label,split\na.png,,train\n"),
        {},
        "training image needs a label, got none in line 2",
    ),
    "csv path": (
        lambda t: csv_file(t, "image_path,label,split\n,good,train\n"),
        {},
        "image_path must not be empty, in line 2",
    ),
    "csv file": (
        lambda t: csv_file(t, "image_path,label,split\nlost.png,good,train\n"),
        {},
        "image file not found: .*lost.png",
    ),
    "csv mask": (
        lambda t: csv_file(t, "image_path,label,split,mask_path\na.png,good,train,\na.png,bad,test,no.png\n"),
        {},
        "image file not found: the mask of .*a.png",
    ),
    "float range": (lambda t: np.full((2, 5, 5), 7.0), {}, r"float pixels must lie in \[0, 1\], got 7 to 7 in train"),
    "int array": (lambda t: np.zeros((2, 5, 5), int), {}, "must be uint8, uint16 or float .*, got int64 in train"),
    "one image": (lambda t: RED, {}, r"got one image of shape \(12, 16, 3\): pass image\[None\]"),
    "array shape": (lambda t: np.zeros((2, 4, 4, 2)), {}, r"train must have shape .*, got \(2, 4, 4, 2\)"),
    "no array": (lambda t: np.zeros((0, 5, 5)), {}, r"got \(0, 5, 5\)"),
    "group count": (lambda t: Arrays([RED], groups=[1, 2]), {}, r"one entry per training image \(1\), got 2"),
    "no group": (mixed_sizes, {"group_by": "(1)"}, r"group_by '\(1\)' finds no group in 2.png: it must match every"),
    "group without parentheses": (mixed_sizes, {"group_by": "[12]"}, r"must have parentheses .*, got '\[12\]'"),
    "bad expression": (mixed_sizes, {"group_by": "("}, r"must be a regular expression, got '\(' \(missing \)"),
    "normal with a mask": (lambda t: Arrays([RED], [RED], [0], [SPOT]), {}, "must have an empty mask, but that at pos"),
    "column of masks": (
        lambda t: csv_file(t, "image_path,label,mask\na.png,bad,m.png\n"),
        {},
        "has the column mask but not mask_path: is it meant",
    ),
    "label nan": (
        lambda t: csv_file(t, "image_path,label\na.png,nan\n"),
        {},
        "or empty if unknown, got 'nan' in line 2",
    ),
    "normal row with a mask": (normal_with_a_mask, {}, "a normal image must have an empty mask, got .*m.png in line 2"),
    "defects only": (defects_only, {}, "is in no known layout, but has the subfolder dents"),
    "label count": (lambda t: Arrays([RED], [RED], [0, 1]), {}, r"one entry per test image \(1\), got 2"),
    "label value": (lambda t: Arrays([RED], [RED], [7]), {}, "must be 0 .* or 1 .*, got 7 at position 0"),
    "labels without images": (lambda t: Arrays([RED], None, [0]), {}, "labels and masks belong to test images"),
    "array mask": (lambda t: Arrays([RED], [RED], [1], [SPOT[:7]]), {}, r"got 7 x 16 for the 12 x 16 image array\[0\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_source_gives_one_clear_line(tmp_path, fault):
    make_source, options, message = FAULTS[fault]
    source = make_source(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_data(source, **options)
    assert "\n" not in str(error.value)


def test_mixed_sizes_are_reported_on_reading_at_the_latest():
    train = open_data([RED, RED], preprocess=Preprocess(None))["arrays"].train
    smaller = train.records[1]._replace(image=lambda: RED[:5])
    with pytest.raises(ValueError, match=r"got 5 x 16 in array\[1\] but 12 x 16 in array\[0\]"):
        dataclasses.replace(train, records=(train.records[0], smaller)).images([0, 1])


def test_real_folders(shared):
    mtd = open_data(shared / "data/mtd", mask_threshold=127)["mtd"]
    assert (len(mtd.train), len(mtd.test), int(mtd.test.labels.sum())) == (761, 583, 392) and mtd.test.has_masks
    assert set(mtd.test.defects) == {"good", "blowhole", "break", "crack", "fray", "uneven"}
    bottle = open_data(shared / "data/mvtec_bottle", category="bottle")["bottle"]
    assert (len(bottle.train), len(bottle.test), int(bottle.test.labels.sum())) == (209, 83, 63)
    indices = [0, 30, 80]
    assert np.array_equal(bottle.test.masks(indices).any((1, 2)), bottle.test.labels[indices] == 1)
    pills = open_data(shared / "data/pillqc")["pillqc"]
    assert (len(pills.train), len(pills.test), pills.test.has_masks) == (100, 230, False)


def test_one_image_with_its_channels_first_is_no_batch():
    for shape in ((3, 8, 8), (4, 8, 8), (2, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"channels first.*np\.moveaxis"):
            open_data(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"train\[1\] must have shape .* 3 channels first"):
        open_data([RED, RED.transpose(2, 0, 1)])


def test_images_of_pillow_and_encoded_files_are_images(tmp_path):
    path = save(tmp_path / "a.png")
    with Image.open(path) as image:
        sources = [path, path.read_bytes(), image, RED, jnp.asarray(RED)]
        for source in (sources, *sources[1:3]):
            train = open_data(source, preprocess=Preprocess(None))["arrays"].train
            assert (train.images(range(len(train))) == RED).all() and train.original_size(0) == (12, 16)


@pytest.fixture
def broken_folder(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        save(tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:50])
    return tmp_path


@pytest.mark.parametrize("preprocess", [Preprocess((8, 8)), Preprocess(None)])
def test_broken_images_are_refused_left_out_or_kept_with_their_errors(broken_folder, preprocess):
    with pytest.raises(ImageError, match=r"a\.png \(not a known image format\)"):
        [split] = open_data(broken_folder, preprocess=preprocess).values()
        split.train.images(range(4))
    with pytest.warns(UserWarning, match=r"2 of 4 images cannot be read and are left out: .*a\.png .*; .*c\.png"):
        [split] = open_data(broken_folder, preprocess=preprocess, broken="skip").values()
    assert split.train.paths == (str(broken_folder / "b.png"), str(broken_folder / "d.png"))
    assert split.train.left_out == (str(broken_folder / "a.png"), str(broken_folder / "c.png"))
    [split] = open_data(broken_folder, preprocess=preprocess, broken="keep").values()
    read = split.train.images(range(4))
    assert not read[[0, 2]].any() and (read[[1, 3]] == RED[0, 0]).all()
    assert {i: "cannot decode" in error for i, error in split.train.errors.items()} == {0: True, 2: True}


def test_images_whose_ignore_masks_cannot_be_used_are_broken(broken_folder):
    save(broken_folder / "all.png", SPOT * 0 + 255)
    csv_file(broken_folder, "image_path,ignore_path\nb.png,c.png\nd.png,all.png\nb.png,\n")
    with pytest.warns(UserWarning, match=r"2 of 3 images .*the ignore mask of .*b\.png .*must leave pixels that count"):
        [split] = open_data(broken_folder / "t.csv", broken="skip").values()
    assert len(split.test) == 1


def test_a_missing_file_is_kept_with_its_error(tmp_path):
    paths = [save(tmp_path / "a.png"), tmp_path / "gone.png"]
    train = open_data(paths, broken="keep")["files"].train
    train.images(range(2))
    assert train.errors == {1: f"image file not found: {paths[1]}"}


@pytest.mark.parametrize("name", ["scan.tif", "film.gif", "film.png", "film.webp"])
def test_pages_are_read_on_request_and_otherwise_mentioned(tmp_path, name):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 120, 240)]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    save(tmp_path / "zero.png")
    [split] = open_data(tmp_path, preprocess=Preprocess((8, 8)), pages=True).values()
    assert split.train.paths == (*(f"{tmp_path / name}[{i}]" for i in range(3)), str(tmp_path / "zero.png"))
    assert np.abs(split.train.images(range(3))[:, 4, 4, 0] - [0.0, 120, 240]).max() <= 4
    with pytest.warns(UserWarning, match=rf"1 of 2 files have several pages .*{name} with 3: only the first is read"):
        [split] = open_data(tmp_path, preprocess=Preprocess((8, 8))).values()
    assert len(split.train) == 2 and split.train.images([0]).max() <= 4
    encoded = [(tmp_path / name).read_bytes()]
    assert len(open_data(encoded, pages=True)["arrays"].train) == 3


@pytest.mark.parametrize(("highest", "bits"), [(200, 8), (1000, 10), (1024, 12), (4095, 12), (4096, None)])
def test_the_bits_that_16_bit_images_use(tmp_path, highest, bits):
    pixels = np.full((2, 5, 5), highest, np.uint16)
    for i, image in enumerate(pixels):
        save(tmp_path / f"{i}.png", image)
    for source in (pixels, tmp_path):
        [split] = open_data(source).values()
        found, warning = usual_bits([split.train])
        assert found == bits and (f"up to {highest}, a sixteenth" in warning) == (bits is not None)


def test_bits_that_are_stated_or_of_no_interest_are_not_looked_for():
    eight, ten = np.zeros((2, 5, 5), np.uint8), np.full((2, 5, 5), 900, np.uint16)
    [small], [stated] = (open_data(a, preprocess=Preprocess(bits=b)).values() for a, b in ((eight, None), (ten, 14)))
    assert usual_bits([small.train]) == (None, "") and usual_bits([stated.train]) == (14, "")
    [deep] = open_data({"x": ten, "y": ten * 60}, category="x").values()
    [full] = open_data({"x": ten, "y": ten * 60}, category="y").values()
    bits, warning = usual_bits([deep.train, full.train])
    assert bits is None and "images of x use values up to 900" in warning and "bits=10" in warning
    with pytest.raises(ValueError, match="bits of the model, 10, got 14"):
        stated.train.with_bits(10)
