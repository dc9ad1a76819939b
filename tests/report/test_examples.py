import numpy as np
import pytest

from jaxad.report.examples import Examples, choose_examples, load_examples, save_examples

SCORES = np.array([0.9, 0.2, 0.6, 0.1, 0.3, 0.8, 0.4, 0.7])
LABELS = np.array([0, 0, 0, 1, 1, 1, 1, 1])


def test_missed_defects_then_false_alarms_then_the_closest_calls():
    indices = choose_examples(SCORES, LABELS, 0.5, n=8)
    # missed defects, lowest first; false alarms, highest first; correct images, closest to the threshold first
    assert indices.tolist() == [3, 4, 6, 0, 2, 7, 1, 5]


def test_both_kinds_of_error_are_chosen_alternately():
    scores, labels = np.arange(100.0), np.array([1] * 40 + [0] * 60)
    indices = choose_examples(scores, labels, 50.0, n=6)
    assert indices.tolist() == [0, 1, 2, 99, 98, 97]
    assert choose_examples(scores, np.array([1] * 99 + [0]), 50.0, n=4).tolist() == [0, 1, 2, 99]


def test_a_score_at_the_threshold_is_good():
    assert choose_examples(np.array([0.5, 0.5, 0.4]), np.array([1, 0, 0]), 0.5, n=1).tolist() == [0]
    assert choose_examples(np.array([0.5, 0.51]), np.array([0, 0]), 0.5, n=1).tolist() == [1]


def test_without_a_threshold_the_most_suspicious_images_are_chosen():
    assert choose_examples(SCORES, LABELS, None, n=4).tolist() == [3, 4, 0, 2]


@pytest.mark.parametrize("labels", [None, np.full(8, -1)])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_without_labels_the_highest_scores_are_chosen(labels, threshold):
    assert choose_examples(SCORES, labels, threshold, n=3).tolist() == [0, 5, 7]


def test_every_image_is_chosen_at_most_once():
    for threshold in (None, -1.0, 0.5, 2.0):
        assert sorted(choose_examples(SCORES, LABELS, threshold, n=99).tolist()) == list(range(8))
    assert choose_examples(np.empty(0), None, 0.5).tolist() == []


def test_invalid_arguments_are_reported():
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        choose_examples(SCORES, LABELS, None, n=0)
    with pytest.raises(ValueError, match="got 3 and 8"):
        choose_examples(SCORES, LABELS[:3], None)


def make_examples(n=3, **changes) -> Examples:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (n, 6, 5, 3), np.uint8)
    paths = ("a/ü.png", "b.png", "c.png")
    return Examples(image, paths, np.array([1, 0, -1]), np.array([0.1, 2.0, 3.0]))._replace(**changes)


def test_examples_survive_a_round_trip(tmp_path):
    rng = np.random.default_rng(1)
    mask, heat_map = rng.random((3, 6, 5)) > 0.5, rng.random((3, 6, 5), np.float32)
    complete = make_examples(mask=mask, map=heat_map, limits=(0.25, 4.0), ignored=~mask)
    for examples in (make_examples(), complete):
        path = save_examples(tmp_path, examples)
        loaded = load_examples(tmp_path)
        assert loaded is not None
        assert loaded.path == list(examples.path) and loaded.limits == examples.limits
        for name in ("image", "label", "score", "mask", "map", "ignored"):
            np.testing.assert_array_equal(getattr(loaded, name), getattr(examples, name))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_missing_file_is_none(tmp_path):
    assert load_examples(tmp_path) is None


def test_pickled_content_is_rejected(tmp_path):
    np.savez(tmp_path / "examples.npz", image=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_examples(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ("one.png",)}, r"path must have the shape \(3,\).*got \(1,\)"),
        ({"mask": np.zeros((3, 2, 2), bool)}, r"mask must have the shape \(3, 6, 5\).*got \(3, 2, 2\)"),
        ({"map": np.zeros((2, 6, 5), np.float32)}, r"map must have the shape \(3, 6, 5\)"),
    ],
)
def test_saving_rejects_arrays_of_another_shape(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_examples(tmp_path, make_examples(**changes))
    assert not list(tmp_path.iterdir())
