"""The facade, from folders and arrays to predictions, on a backbone with random weights."""

import copy
import multiprocessing
import pickle
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import jaxad
from jaxad import Detector
from jaxad.backbones import backbone
from jaxad.data import Arrays, Preprocess, open_data
from jaxad.driver.execution import Execution
from jaxad.driver.program import compile_count
from jaxad.driver.scoring import programs
from jaxad.learning import folds, leakage, learn, load_frozen, split
from jaxad.metrics import conformal_threshold, cross_threshold, tail_threshold
from jaxad.runs.directory import set_thresholds
from jaxad.settings import Settings
from tests.examples import slow_after

SIZE = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two sets of random weights of the small backbone, as the files that a user would have."""
    files = []
    for seed in range(2):
        params = backbone("pdn_small").init(jax.random.key(seed))["params"]
        tensors = {f"{module}.{leaf}": np.asarray(v) for module, leaves in params.items() for leaf, v in leaves.items()}
        files.append(tmp_path_factory.mktemp("weights") / "pdn_small.safetensors")
        safetensors.numpy.save_file(tensors, files[-1])
    return files


def photographs(n, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.indices((40, 48))
    clean = 128 + 60 * np.sin((x + 2 * y) / 4)[..., None] * np.array([1.0, 0.8, 0.6])
    return np.clip(clean + rng.normal(0, 8, (n, 40, 48, 3)), 0, 255).astype(np.uint8)


NORMAL = photographs(14)
UNSEEN = photographs(4, seed=1)
DEFECTIVE = UNSEEN.copy()
DEFECTIVE[:, 14:26, 16:32] = 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The layout of MVTec AD."""
    root = tmp_path_factory.mktemp("product")
    for part, images in (("train/good", NORMAL), ("test/good", UNSEEN), ("test/spot", DEFECTIVE)):
        (root / part).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / part / f"{i:02}.png")
    return root


OPEN = Preprocess((SIZE, SIZE))
OPTIONS = dict(image_size=SIZE, coreset_sampling_ratio=0.1, num_neighbors=2, batch_size=4)


@pytest.fixture(scope="module")
def detector(weights, folder):
    detector = Detector("patchcore", backbone="pdn_small", weights=weights[0], fpr=0.3, **OPTIONS)
    return detector.fit(folder / "train" / "good")


def mahalanobis(weights, **options):
    """Without heat maps, and quick to compile."""
    return Detector(
        "mahalanobis_ad", backbone="pdn_small", weights=weights[0], **{"image_size": SIZE, "batch_size": 4} | options
    )


def test_fit_and_predict_a_folder(detector, folder):
    result = detector.predict(folder)
    assert len(result.paths) == 8 and all(str(folder / "test") in path for path in result.paths)
    assert result.pred_score.shape == (8,) and result.pred_score.dtype == np.float32
    assert result.anomaly_map.shape == result.pred_mask.shape == (8, SIZE, SIZE)
    bad = np.array(["spot" in path for path in result.paths])
    assert result.pred_score[bad].min() > result.pred_score[~bad].max()
    assert result.pred_label[bad].all()
    np.testing.assert_array_equal(result.pred_label, result.pred_score > detector.image_threshold.value)
    np.testing.assert_array_equal(result.pred_mask, result.anomaly_map > detector.pixel_threshold.value)
    inside = result.anomaly_map[bad][:, 11:21, 11:21].mean((1, 2))
    assert (inside > result.anomaly_map[bad].mean((1, 2))).all()


def test_all_kinds_of_sources(detector, folder):
    """A file, a list of files, a flat folder, arrays and single arrays give the same scores."""
    expected = detector.predict(DEFECTIVE).pred_score
    files = sorted((folder / "test" / "spot").iterdir())
    for source, part in (
        (files[1], slice(1, 2)),
        (str(files[1]), slice(1, 2)),
        (files[1:3], slice(1, 3)),
        (folder / "test" / "spot", slice(None)),
        (DEFECTIVE[2], slice(2, 3)),
        (jax.numpy.asarray(DEFECTIVE[2]), slice(2, 3)),
        (Image.fromarray(DEFECTIVE[2]), slice(2, 3)),
        (files[2].read_bytes(), slice(2, 3)),
        ([Image.fromarray(image) for image in DEFECTIVE], slice(None)),
        (list(DEFECTIVE), slice(None)),
        (open_data(DEFECTIVE, preprocess=detector.settings.preprocess)["arrays"].train, slice(None)),
    ):
        np.testing.assert_allclose(detector.predict(source).pred_score, expected[part], rtol=1e-5)


def test_a_gray_image(detector):
    assert detector.predict(DEFECTIVE[0, ..., 0]).pred_score.shape == (1,)


def test_ten_bits_in_16_are_seen_and_remembered(weights, tmp_path):
    ten = NORMAL[..., 0].astype(np.uint16) * 4
    detector = mahalanobis(weights)
    with pytest.warns(UserWarning, match="read as 10 bits"):
        detector.fit(ten)
    stated = mahalanobis(weights, bits=10).fit(ten)
    np.testing.assert_array_equal(detector.predict(ten).pred_score, stated.predict(ten).pred_score)
    detector.save(tmp_path)
    assert jaxad.load(tmp_path).settings.bits == 10
    np.testing.assert_array_equal(jaxad.load(tmp_path).predict(ten).pred_score, stated.predict(ten).pred_score)
    with pytest.raises(ValueError, match=r"pixels of 10 bits must lie in 0..1023"):
        detector.predict(ten * 2)
    assert detector.fit(NORMAL).settings.bits is None


def test_broken_images_are_left_out_on_request(weights, folder, tmp_path):
    files = sorted((folder / "train" / "good").iterdir())[:4]
    (tmp_path / "broken.png").write_bytes(files[0].read_bytes()[:200])
    mixed = [*files, tmp_path / "broken.png"]
    with pytest.raises(ValueError, match=r"broken\.png"):
        mahalanobis(weights).fit(mixed)
    with pytest.warns(UserWarning, match=r"1 of 5 images cannot be read and are left out: .*broken\.png"):
        detector = mahalanobis(weights, holdout=0).fit(mixed, skip_broken=True)
    assert detector.model.n_train == 4
    with pytest.warns(UserWarning, match=r"broken\.png"):
        assert detector.predict(mixed, skip_broken=True).paths == tuple(map(str, files))


def test_thresholds_come_from_held_out_normals(detector, folder):
    assert (detector.model.n_train, detector.model.n_heldout) == (11, 3)
    order = np.random.default_rng(0).permutation(14)
    result = detector.predict(NORMAL[np.sort(order[:3])])
    for threshold, scores in (
        (detector.image_threshold, result.pred_score),
        (detector.pixel_threshold, result.anomaly_map),
    ):
        expected = conformal_threshold(scores, 0.3)
        assert threshold == expected._replace(value=pytest.approx(expected.value, rel=1e-5))
    assert detector.image_threshold.source == "held-out normals"
    low, high = detector.color_limits()
    assert low < detector.pixel_threshold.value == pytest.approx((low + high) / 2, rel=1e-6)


@pytest.mark.parametrize(("n", "holdout", "count"), [(14, 0.2, 3), (2, 0.9, 1), (101, 0.5, 50), (3, 0.01, 1)])
def test_without_groups_single_images_are_held_out(n, holdout, count):
    data = open_data(np.zeros((n, 5, 5, 1), np.uint8))["arrays"].train
    for seed in range(3):
        train, held_out = split(Settings.of("padim", holdout=holdout, seed=seed), data)
        order = np.random.default_rng(seed).permutation(n)
        assert held_out.paths == tuple(data.paths[i] for i in np.sort(order[:count]))
        assert train.paths == tuple(data.paths[i] for i in np.sort(order[count:]))


def grouped(groups):
    return open_data(Arrays(np.zeros((len(groups), 5, 5, 1), np.uint8), groups=groups))["arrays"].train


def test_whole_groups_are_held_out():
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(20), np.arange(1, 21))).astype(str)
    data, shares = grouped([*groups, ""]), []
    for seed in range(50):
        train, held_out = split(Settings.of("padim", holdout=0.25, seed=seed), data)
        assert set(train.paths) | set(held_out.paths) == set(data.paths) and len(train) + len(held_out) == len(data)
        assert not {r.group for r in train.records if r.group} & {r.group for r in held_out.records if r.group}
        assert len(set(held_out.groups)) == 5
        shares.append(len(held_out) / len(data))
    assert np.mean(shares) == pytest.approx(0.25, abs=0.03)
    train, held_out = split(Settings.of("padim", holdout=0.9), grouped(["a"] * 9 + ["b"]))
    assert {*train.groups} != {*held_out.groups} and len(train) and len(held_out)


def test_one_group_cannot_be_held_out():
    data = grouped(["lot 7"] * 5)
    with pytest.raises(ValueError, match=r"needs two or more, got 'lot 7' for all 5 images of arrays: .* holdout to 0"):
        split(Settings.of("padim"), data)
    assert len(split(Settings.of("padim", holdout=0), data)[0]) == 5


def test_a_threshold_from_groups(weights, tmp_path):
    groups = ["a", "b", "c", "d", "a", "b", "c"] * 2
    data = open_data(Arrays(NORMAL, groups=groups), preprocess=OPEN)["arrays"].train
    detector = mahalanobis(weights, holdout=0.5, fpr=0.4).fit(data)
    _, held_out = split(detector.settings, data)
    scores = detector.predict(held_out).pred_score
    assert detector.image_threshold == conformal_threshold(scores, 0.4, held_out.groups)
    assert (detector.image_threshold.n_groups, detector.image_threshold.guaranteed_fpr) == (2, 0.4)
    for i, image in enumerate(NORMAL):
        Image.fromarray(image).save(tmp_path / f"{groups[i]}-{i}.png")
    again = mahalanobis(weights, holdout=0.5, fpr=0.4).fit(tmp_path, group_by="([a-d])-")
    assert again.image_threshold.n_groups == 2 and again.model.n_train + again.image_threshold.n == 14


def test_shots_without_groups_are_a_warning(weights):
    shots = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8).repeat(2, axis=0)
    with pytest.warns(UserWarning, match=r"100% of the images have near duplicates: .* --group-by REGEX \(group_by\)"):
        mahalanobis(weights).fit(shots)
    data = [open_data(images)["arrays"].train for images in (shots, Arrays(shots, groups=np.arange(40) // 2))]
    assert leakage(Settings.of("padim", holdout=0), data[0]) == ""  # there is no threshold
    assert leakage(Settings.of("padim"), data[1]) == ""


def test_the_seed_decides(detector, weights, folder):
    again = Detector("patchcore", backbone="pdn_small", weights=weights[0], fpr=0.3, **OPTIONS).fit(folder)
    np.testing.assert_array_equal(again.state.bank, detector.state.bank)
    assert again.image_threshold == detector.image_threshold


def test_without_holdout_there_are_no_labels(weights):
    detector = mahalanobis(weights, holdout=0).fit(NORMAL)
    result = detector.predict(np.concatenate([UNSEEN, DEFECTIVE]))
    assert detector.model.n_train == 14 and result.pred_label is None and result.pred_mask is None
    assert result.anomaly_map is None and detector.color_limits() is None
    assert result.pred_score[4:].min() > result.pred_score[:4].max()


def test_a_cross_holdout_scores_every_image_with_a_model_of_the_others(weights):
    """And loses none: the model is that of all images. As PatchCore keeps all patches, its scores only fall."""
    options = dict(backbone="pdn_small", weights=weights[0], image_size=SIZE, coreset_sampling_ratio=1.0)
    detector = Detector("patchcore", cross_holdout=2, fpr=0.2, **options).fit(NORMAL)
    assert (detector.model.n_train, detector.model.n_heldout) == (14, 14)
    data = open_data(NORMAL, preprocess=detector.settings.preprocess)["arrays"].train
    parts = folds(detector.settings, data)
    assert sorted(path for _, held_out in parts for path in held_out.paths) == sorted(data.paths)
    single = [Detector("patchcore", holdout=0, **options).fit(train) for train, _ in parts]
    own = [one.predict(held_out) for one, (_, held_out) in zip(single, parts, strict=True)]
    for threshold, scores in (
        (detector.image_threshold, np.concatenate([part.pred_score for part in own])),
        (detector.pixel_threshold, np.concatenate([part.anomaly_map for part in own])),
    ):
        expected = cross_threshold(scores, 0.2, np.repeat([0, 1], 7), monotone=True)
        assert threshold.value == pytest.approx(expected.value, rel=1e-5)
        assert threshold._replace(value=0.0) == expected._replace(value=0.0)
        assert threshold.guaranteed_fpr == pytest.approx(1 / 2)
    assert detector.color_limits() is not None
    result = detector.predict(UNSEEN)
    for one in single:
        fold = one.predict(UNSEEN)
        assert (result.pred_score <= fold.pred_score * (1 + 1e-5)).all()
        assert (result.anomaly_map <= fold.anomaly_map * (1 + 1e-5) + 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_a_cross_holdout_of_several_models_is_that_of_each(weights, mesh):
    options = dict(backbone="pdn_small", weights=weights[0], image_size=SIZE, fpr=0.2, cross_holdout=3)
    settings = [Settings.of("mahalanobis_ad", seed=seed, **options) for seed in (0, 1)]
    data = open_data(NORMAL, preprocess=settings[0].preprocess)["arrays"].train
    frozen = load_frozen(settings[0])
    execution = Execution(mesh=mesh and jaxad.make_mesh(shape=mesh))
    learned = learn(settings, [data.subset(range(9)), data], execution, frozen=frozen)
    for one, part, model in zip(settings, (NORMAL[:9], NORMAL), learned.models, strict=True):
        detector = Detector("mahalanobis_ad", seed=one.seed, **options).fit(part)
        assert model.n_train == len(part) == model.image_threshold.n
        assert model.image_threshold.value == pytest.approx(detector.image_threshold.value, rel=1e-3)
        assert model.image_threshold._replace(value=0.0) == detector.image_threshold._replace(value=0.0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), model.state, detector.state)


def test_groups_are_held_out_whole_also_in_turn():
    groups = [f"part {i // 3}" for i in range(21)]
    data = open_data(Arrays(np.zeros((21, 40, 48), np.uint8), groups=groups))["arrays"].train
    for count in (2, 7, 99):
        parts = folds(Settings.of("padim", cross_holdout=count), data)
        assert len(parts) == min(count, 7)
        for train, held_out in parts:
            assert not {*train.groups} & {*held_out.groups} and len(train) + len(held_out) == 21
        assert sorted(path for _, held_out in parts for path in held_out.paths) == sorted(data.paths)
    assert folds(Settings.of("padim"), data) == []


@pytest.mark.slow
def test_the_tail_sets_the_threshold_where_images_are_too_few(weights):
    many = photographs(60, seed=2)
    detector = mahalanobis(weights, holdout=0.4, fpr=0.01, tail="gpd").fit(many)
    scores = detector.predict(many).pred_score[split_positions(detector, many)]
    assert detector.image_threshold.value == pytest.approx(tail_threshold(scores, 0.01).value, rel=1e-3)
    assert detector.image_threshold.guaranteed_fpr == 1.0
    enough = mahalanobis(weights, holdout=0.4, fpr=0.1, tail="gpd").fit(many)
    assert enough.image_threshold.source == "held-out normals"
    assert enough.image_threshold.value < detector.image_threshold.value


def split_positions(detector, images):
    data = open_data(images, preprocess=detector.settings.preprocess)["arrays"].train
    return [data.paths.index(path) for path in split(detector.settings, data)[1].paths]


def test_a_single_training_image(weights):
    detector = mahalanobis(weights).fit(NORMAL[:1])
    assert (detector.model.n_train, detector.model.n_heldout, detector.image_threshold) == (1, 0, None)


def test_images_as_they_are(weights):
    detector = mahalanobis(weights, image_size=None, holdout=0).fit(NORMAL)
    assert np.isfinite(detector.predict(UNSEEN).pred_score).all()
    with pytest.raises(ValueError, match=r"images must be \(40, 48\) \(height, width\) as in fit, got \(48, 40\)"):
        detector.predict(UNSEEN.swapaxes(1, 2))


def test_saved_and_loaded(detector, tmp_path):
    detector.save(tmp_path / "model")
    files = ("model.json", "model.safetensors", "threshold.json")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == list(files)
    loaded = jaxad.load(tmp_path / "model")
    expected, result = detector.predict(DEFECTIVE), loaded.predict(DEFECTIVE)
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.settings == detector.settings and loaded.color_limits() == detector.color_limits()
    assert loaded.image_threshold == detector.image_threshold and loaded.pixel_threshold == detector.pixel_threshold
    loaded.save(tmp_path / "again")
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    for name in ("recipe.json", "metrics.json", "mine.txt"):
        (tmp_path / "again" / name).touch()
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "recipe.json").exists() and (tmp_path / "again" / "metrics.json").exists()
    loaded.save(tmp_path / "again", jax.tree.map(lambda leaf: 0 * leaf, loaded.state))  # whose recipe that is not
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["mine.txt", *files]


def test_warm_nothing_compiles_for_any_number_of_images(detector):
    assert detector.warm_up() is detector
    compiled, expected = compile_count(), detector.predict(NORMAL)
    for n in (1, 2, 3, 4, 5, 9):
        result = detector.predict(NORMAL[:n])
        np.testing.assert_allclose(result.pred_score, expected.pred_score[:n], rtol=1e-5)
        np.testing.assert_allclose(result.anomaly_map, expected.anomaly_map[:n], rtol=1e-4, atol=1e-5)
    assert compile_count() == compiled


def test_a_second_model_of_the_same_settings_compiles_nothing(detector, weights, tmp_path):
    options = {"seed": 3, "projection_dim": 128} | dict(reversed(OPTIONS.items()))
    again = Detector("patchcore", weights=weights[0], **options)
    assert again.settings.build((SIZE, SIZE)) is detector.method
    detector.predict(DEFECTIVE)
    detector.save(tmp_path)
    compiled = compile_count()
    jaxad.load(tmp_path).predict(DEFECTIVE)
    assert compile_count() == compiled


def test_a_detector_keeps_its_programs_among_many_others(detector):
    detector.predict(DEFECTIVE)
    compiled = compile_count()
    for i in range(100):
        other = detector.method._replace(embed=lambda frozen, image: image, vary=((str(i), min),))
        programs(other, Execution())
    detector.predict(DEFECTIVE)
    assert compile_count() == compiled


def test_the_batch_size_can_be_set(detector):
    one = copy.copy(detector)
    one.batch_size = 2
    assert (one.batch_size, one.settings.batch_size, detector.batch_size) == (2, 2, 4)
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        one.batch_size = 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda detector: pickle.loads(pickle.dumps(detector))])
def test_a_copy_scores_the_same(detector, again):
    copied = again(detector)
    for a, b in zip(copied.predict(DEFECTIVE), detector.predict(DEFECTIVE), strict=True):
        np.testing.assert_array_equal(a, b)
    assert copied.settings == detector.settings and copied.model.n_heldout == 3
    assert again(Detector("padim", n_features=7)).settings == Detector("padim", n_features=7).settings


def test_one_line_says_what_a_detector_and_a_prediction_are(detector):
    assert repr(Detector("padim", n_features=7)) == "<Detector padim, n_features=7: not fitted>"
    assert re.fullmatch(r"<Detector patchcore, .*: fitted, n_train=11, 32 x 32, threshold [0-9.]+>", repr(detector))
    pattern = r"<Prediction n=4, pred_score [0-9.]+ to [0-9.]+, 4 anomalous, anomaly_map 32 x 32>"
    assert re.fullmatch(pattern, repr(detector.predict(DEFECTIVE)))


def in_a_fork(work):
    """What a function returns in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()))
    process.start()
    try:
        assert receiver.poll(300)
        return receiver.recv()
    finally:
        process.kill()
        process.join()


def error_of(work):
    try:
        return work()
    except RuntimeError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_after_a_fork_fitting_is_an_error(detector, weights):
    advice = "this process was forked from one that had used JAX, .* start workers with .*spawn"
    assert re.match(advice, in_a_fork(lambda: error_of(lambda: mahalanobis(weights).fit(NORMAL))))
    assert re.match(advice, in_a_fork(lambda: error_of(lambda: jaxad.score(*args_of(detector)).__next__())))


def args_of(detector):
    data = open_data(NORMAL, preprocess=OPEN)["arrays"].train
    return detector.method, detector.state, detector.load_frozen(), data


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork")
def test_after_a_fork_scoring_works(detector, tmp_path):
    detector.save(tmp_path)
    expected = detector.predict(DEFECTIVE)
    for use in (lambda: detector, lambda: jaxad.load(tmp_path)):
        result = in_a_fork(lambda use=use: use().predict(DEFECTIVE))
        np.testing.assert_allclose(result.pred_score, expected.pred_score, rtol=1e-5)
        np.testing.assert_allclose(result.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-5)


def test_a_threshold_set_by_hand_counts(detector, tmp_path):
    detector.save(tmp_path)
    scores = detector.predict(DEFECTIVE).pred_score
    set_thresholds(tmp_path, float(np.median(scores)), None)
    loaded = jaxad.load(tmp_path)
    assert loaded.image_threshold.source == "edited by hand" and loaded.pixel_threshold.source == "held-out normals"
    assert loaded.predict(DEFECTIVE).pred_label.sum() == 2
    path = tmp_path / "threshold.json"
    path.write_text(path.read_text().replace("0", "1"))
    with pytest.raises(ValueError, match=r"threshold\.json is not what model\.json names: .* `jaxad threshold`"):
        jaxad.load(tmp_path)
    with pytest.raises(ValueError, match=r"set both thresholds"):
        set_thresholds(tmp_path, 1e9, None)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"threshold\.json is missing"):
        jaxad.load(tmp_path)
    set_thresholds(tmp_path, 1e9, 3.5)
    loaded = jaxad.load(tmp_path)
    assert not loaded.predict(DEFECTIVE).pred_label.any() and loaded.pixel_threshold.value == 3.5
    for values, rule in (
        ((None, None), "give the new thresholds"),
        ((float("nan"), 1.0), "must be a number .* got nan"),
    ):
        with pytest.raises(ValueError, match=rule):
            set_thresholds(tmp_path, *values)


def test_half_precision_is_near_and_remembered(detector, weights, folder, tmp_path):
    half = Detector("patchcore", weights=weights[0], precision="bfloat16", **OPTIONS).fit(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.load_frozen()["params"])} == {"bfloat16"}
    exact, near = detector.predict(DEFECTIVE).pred_score, half.predict(DEFECTIVE).pred_score
    assert 0 < np.abs(near / exact - 1).max() < 0.1
    half.save(tmp_path)
    np.testing.assert_array_equal(jaxad.load(tmp_path).predict(DEFECTIVE).pred_score, near)


def test_the_weights_may_name_the_backbone(weights, tmp_path):
    assert Detector(weights=weights[0]).settings.backbone == ("pdn_small",)
    assert Detector(weights=tmp_path / "resnet18.tv_in1k.safetensors").settings.backbone == ("resnet18.tv_in1k",)
    with pytest.raises(ValueError, match=r"mine.safetensors is not named after a backbone"):
        Detector(weights=tmp_path / "mine.safetensors")


@pytest.mark.parametrize("method", slow_after(1, ["padim", "mahalanobis_ad", "patchcore", "spade"]))
def test_a_model_of_equal_images(method):
    """With the real weights, so that rounding errors are not zero; any other image scores higher."""
    same = np.full((5, 64, 64, 3), 117, np.uint8)
    detector = Detector(method, image_size=64, **{"n_features": 20} if method == "padim" else {}).fit(same)
    other = same[:2].copy()
    other[1, 20:40, 20:40] = 255
    score = detector.predict(other).pred_score
    assert np.isfinite(score).all() and score[1] > 2 * score[0] + 1e-3


def test_an_ensemble_of_two_backbones(weights, tmp_path):
    options = dict(backbone=("pdn_small", "pdn_small"), weights=weights, layers=("layer2",), **OPTIONS)
    detector = Detector("patchcore", **options).fit(NORMAL)
    expected = detector.predict(np.concatenate([UNSEEN, DEFECTIVE])).pred_score
    assert expected[4:].min() > expected[:4].max()
    detector.save(tmp_path)
    np.testing.assert_array_equal(jaxad.load(tmp_path).predict(DEFECTIVE).pred_score, expected[4:])


def test_what_is_ignored_goes_with_the_model(weights, tmp_path):
    """A clock that no training image has; the model keeps the mask, whose file may be gone."""
    clock, mask = UNSEEN.copy(), np.zeros((80, 96), np.uint8)
    clock[:, :10, :20] = np.random.default_rng(0).integers(0, 256, (4, 10, 20, 3))
    mask[:20, :40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    fitted = mahalanobis(weights, ignore=tmp_path / "mask.png").fit(NORMAL)
    expected = fitted.predict(UNSEEN).pred_score
    (tmp_path / "mask.png").unlink()
    fitted.save(tmp_path)
    result = jaxad.load(tmp_path).predict(clock)
    np.testing.assert_array_equal(result.pred_score, expected)
    assert result.ignored is not None and result.ignored[:, :8, :13].all() and not result.ignored[:, 10:].any()


def test_damaged_models_are_one_clear_error(detector, weights, tmp_path):
    detector.save(tmp_path)
    model, description = (tmp_path / name for name in ("model.safetensors", "model.json"))
    content, text = model.read_bytes(), description.read_text()
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    for broken in (content[:100], flipped, b""):
        model.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors is not what model\.json names: .*fit again"):
            jaxad.load(tmp_path)
    model.write_bytes(content)
    with pytest.raises(ValueError, match="sha256"):
        jaxad.load(tmp_path, weights=weights[1])
    for broken, rule in (
        (text[:50], "must be JSON"),
        ("[1]", r"must hold a JSON object, got \[1\]"),
        ('{"format": 3}', "has format 3, but this version of jaxad reads format 4: fit again with it"),
        ('{"format": 4}', ": model lacks backbones, batch_size"),
        ('{"format": 4, "format": 4}', "a name occurs twice"),
        (text.replace('"n_train"', '"n_trained"'), "lacks n_train"),
        (text.replace('"fpr": 0.', '"fpr": 0.0'), "was edited or damaged"),
        (text.replace('"seed": 0', '"seed": NaN'), "NaN is no number"),
        (text.replace('"seed": 0', '"seed": 1e400'), r"model\.seed must be a whole number"),
        (text.replace('"seed": 0', f'"seed": {"[" * 5000}{"]" * 5000}'), "not valid"),
        (text.replace('"seed": 0', f'"seed": {"9" * 5000}'), "not valid"),
    ):
        description.write_text(broken)
        with pytest.raises(ValueError, match=rf"model\.json.*{rule}"):
            jaxad.load(tmp_path)
    description.unlink()
    with pytest.raises(FileNotFoundError, match="no fitted model"):
        jaxad.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"coreset_ratio": 0.1}, "patchcore has the hyperparameters .*coreset_sampling_ratio.*; got coreset_ratio"),
        ({"method": "patchcor"}, "no method is called 'patchcor': did you mean patchcore"),
        ({"backbone": "resnet51"}, "no backbone is called 'resnet51': did you mean"),
        ({"holdout": 1.0}, r"holdout must be in \[0, 1\), got 1.0"),
        ({"holdout": 0.2, "cross_holdout": 5}, "holdout and cross_holdout exclude each other, got 0.2 and 5: omit one"),
        ({"cross_holdout": 1}, "cross_holdout must be 2 or more, got 1"),
        ({"fpr": 0.0}, r"fpr must be in \(0, 1\), got 0.0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"image_size": 0}, "a size must be one positive number .*, got 0"),
        ({"image_size": (8, 8), "center_crop": 16}, "crop"),
        ({"coreset_sampling_ratio": 2.0}, r"coreset_sampling_ratio must be in \(0, 1\], got 2.0"),
        ({"backbone": ("pdn_small", "pdn_small"), "weights": "one"}, "got 2 backbones and 1 files"),
    ],
)
def test_bad_arguments(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        Detector(**arguments)


def test_before_fit(tmp_path):
    with pytest.raises(ValueError, match="must be fitted before it scores"):
        Detector().predict(UNSEEN)
    with pytest.raises(ValueError, match="must be fitted before it is saved"):
        Detector().save(tmp_path)


def test_several_categories_need_a_choice(weights):
    detector = mahalanobis(weights, holdout=0)
    source = {"bolt": NORMAL[:3], "nut": NORMAL[3:8]}
    with pytest.raises(ValueError, match="choose category from bolt, nut"):
        detector.fit(source)
    assert detector.fit(source, category="nut").model.n_train == 5


@pytest.mark.parametrize(("method", "options"), [("draem", {}), ("nf", {"on": "pixels", "scales": 1})])
def test_a_method_without_a_backbone_neither_stores_nor_checks_one(method, options, tmp_path):
    settings = Detector(method, weights=tmp_path / "nothing" / "resnet18.safetensors", **options).settings
    assert settings.backbone == settings.weights == () and settings.sources() == []


def test_equal_settings_build_one_method():
    """So that its programs compile once in a process."""
    first, second = (Detector("padim", n_features=4, layers=("layer1",)) for _ in range(2))
    assert first.method is second.method
    assert Detector("padim", n_features=5, layers=("layer1",)).method is not first.method
    assert Detector("padim", n_features=4, layers=["layer1"]).method is first.method  # as JSON has it
