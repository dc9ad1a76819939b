"""TFDS builders and the TFDS reader, without TensorFlow, on small synthetic data in each published layout."""

import sys

import numpy as np
import pytest
from PIL import Image

from jaxad.data import Preprocess, open_data
from jaxad.data.builders import InspectionBuilder, prepare

RANDOM = np.random.default_rng(0)
SPOT = np.zeros((10, 14), np.uint8)
SPOT[2:5, 3:9] = 255


def save_image(path, gray=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (10, 14) if gray else (10, 14, 3), np.uint8)).save(path)


def save_mask(path, pixels=SPOT):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mvtec_folders(root, names, good, defects, pattern):
    for name in names:
        for i in range(3):
            save_image(root / name / f"train/{good}/{i}.png")
        save_image(root / name / f"test/{good}/9.png")
        for defect in defects:
            save_image(root / name / f"test/{defect}/0.bmp")
            save_mask(root / name / "ground_truth" / defect / pattern.format(0))


def mvtec_ad(root):
    mvtec_folders(root, ["bottle", "grid"], "good", ["broken", "dirty"], "{}_mask.png")


def mpdd(root):
    mvtec_folders(root, ["tubes"], "good", ["rust"], "{}_mask.png")


def btad(root):
    mvtec_folders(root, ["01", "02"], "ok", ["ko"], "{}.bmp")


def visa(root):
    lines = ["object,split,label,image,mask"]
    for i, (split, label) in enumerate([("train", "normal")] * 2 + [("test", "normal"), ("test", "anomaly")]):
        save_image(root / f"pcb1/Data/Images/{i}.JPG")
        lines.append(f"pcb1,{split},{label},pcb1/Data/Images/{i}.JPG,{'pcb1/m.png' if label == 'anomaly' else ''}")
    save_mask(root / "pcb1/m.png", SPOT // 255)
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines))


def ksdd2(root):
    for split in ("train", "test"):
        for i in range(3):
            save_image(root / f"{split}/1000{i}.png")
            save_mask(root / f"{split}/1000{i}_GT.png", SPOT if i == 2 else SPOT * 0)


def mtd(root):
    for kind in ("Free", "Crack"):
        for i in range(2):
            save_image(root / f"MT_{kind}/Imgs/exp{i}.jpg", gray=True)
            save_mask(root / f"MT_{kind}/Imgs/exp{i}.png", np.where(SPOT * (kind == "Crack"), 255, 9).astype(np.uint8))
    (root / "mtd_train_filenames.txt").write_text("exp1.jpg\n")


LAYOUTS = {"mvtec_ad": mvtec_ad, "visa": visa, "btad": btad, "mpdd": mpdd, "ksdd2": ksdd2, "mtd": mtd}


@pytest.mark.parametrize("name", LAYOUTS)
def test_prepared_data_equal_the_folder(tmp_path, name):
    root = tmp_path / "manual"
    root.mkdir()
    LAYOUTS[name](root)
    data_dir = prepare(name, root, tmp_path / "tfds")
    assert any(data_dir.glob("*.array_record*")) and "tensorflow" not in sys.modules
    options = {"preprocess": Preprocess(None), "mask_threshold": 127 if name == "mtd" else None}
    from_folder = open_data(root, **options)
    prepared = open_data(f"tfds:{name}:{tmp_path / 'tfds'}", preprocess=Preprocess(None))
    assert list(prepared) == list(from_folder)
    for category, (train, test) in from_folder.items():
        for data, expected in ((prepared[category].train, train), (prepared[category].test, test)):
            assert len(data) == len(expected) and data.has_masks
            order = [expected.paths.index(str(root / path.removeprefix(f"{name}/"))) for path in data.paths]
            assert data.defects == tuple(expected.defects[i] for i in order)
            indices = range(len(data))
            assert np.array_equal(data.images(indices), expected.images(order))
            assert np.array_equal(data.masks(indices), expected.masks(order))
            assert np.array_equal(data.masks(indices).any((1, 2)), data.labels == 1)


def test_the_data_set_may_be_a_subfolder_of_the_manual_directory(tmp_path):
    mpdd(tmp_path / "MPDD")
    prepare("mpdd", tmp_path, tmp_path / "tfds")
    assert len(open_data(f"tfds:mpdd:1.0.0:{tmp_path / 'tfds'}")["tubes"].train) == 3


def test_a_defect_without_its_mask_is_not_stored(tmp_path):
    mvtec_ad(tmp_path)
    (tmp_path / "grid/ground_truth/dirty/0_mask.png").unlink()
    with pytest.raises(ValueError, match=r"needs a mask, but 1 have none, the first is .*grid/test/dirty/0.bmp"):
        prepare("mvtec_ad", tmp_path, tmp_path.parent / "tfds")


def test_every_builder_is_tested_and_has_a_card(request):
    names = {builder.name for builder in InspectionBuilder.__subclasses__()}
    assert names == set(LAYOUTS)
    cards = {path.stem for path in (request.config.rootpath / "data").glob("*.md")}
    assert names | {"README", "demo"} <= cards


@pytest.mark.slow
def test_classes_without_a_normal_class_are_read_one_vs_rest(shared):
    data = open_data(f"tfds:cifar10:{shared / 'data/tfds'}", category="cat", preprocess=Preprocess((32, 32)))
    train, test = data["cat"]
    assert (len(train), len(test), int((test.labels == 0).sum()), test.has_masks) == (5000, 10000, 1000, False)
    assert train.images([0, 4999]).shape == (2, 32, 32, 3) and train.original_size(7) == (32, 32)
    assert len(set(test.defects)) == 10 and {"good", "dog", "truck"} < set(test.defects)
    assert "tensorflow" not in sys.modules


def test_invalid_sources_are_reported(tmp_path):
    with pytest.raises(ValueError, match="must have the form tfds:NAME or tfds:NAME:DATA_DIR, got 'tfds:'"):
        open_data("tfds:")
    with pytest.raises(FileNotFoundError, match="TFDS has no data set 'no_such_set' in"):
        open_data(f"tfds:no_such_set:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"tfds:mpdd:.* is not prepared in .*: run .*download_and_prepare"):
        open_data(f"tfds:mpdd:{tmp_path}")
    with pytest.raises(ValueError, match=r"no builder 'coco': choose one of mvtec_ad, visa, btad, mpdd, ksdd2, mtd"):
        prepare("coco", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*gone"):
        prepare("mpdd", tmp_path / "gone")
    with pytest.raises(ValueError, match=r"no images of mpdd in .*: expected the mvtec layout"):
        prepare("mpdd", tmp_path, tmp_path / "tfds")
    assert not (tmp_path / "tfds/mpdd/1.0.0").exists()
