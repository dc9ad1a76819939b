"""The exact metrics, compared with scikit-learn and with a slow implementation of the definition of AUPRO."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from jaxad import metrics


def samples(seed, n=400, levels=None, dtype=np.float64):
    """Overlapping scores of normal and anomalous samples; few `levels` give many ties."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < rng.uniform(0.02, 0.98)
    labels[:2] = 0, 1
    scores = rng.normal(size=n) + labels
    if levels:
        scores = np.round(scores * levels) / levels
    return scores.astype(dtype), labels


@pytest.mark.parametrize("levels", [None, 8, 1, 0.1])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_rank_metrics_equal_scikit_learn(levels, dtype):
    for seed in range(5):
        scores, labels = samples(seed, levels=levels, dtype=dtype)
        precision, recall, _ = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        assert metrics.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert metrics.average_precision(scores, labels) == pytest.approx(
            average_precision_score(labels, scores), abs=1e-12
        )
        assert metrics.f1_max(scores, labels) == pytest.approx(f1.max(), abs=1e-12)


def test_metrics_match_hand_computed_values():
    scores, labels = [0.9, 0.8, 0.8, 0.1], [1, 1, 0, 0]
    assert metrics.auroc(scores, labels) == 0.875  # three pairs won, one tied
    assert metrics.average_precision(scores, labels) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert metrics.f1_max(scores, labels) == pytest.approx(2 * 2 / (2 * 2 + 1))


def connected_regions(mask):
    """The 8-connected regions of one mask as lists of pixels, by flood fill."""
    unvisited = set(zip(*np.nonzero(mask), strict=True))
    while unvisited:
        region, edge = [], [unvisited.pop()]
        while edge:
            row, column = edge.pop()
            region.append((row, column))
            neighbors = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & unvisited
            unvisited -= neighbors
            edge.extend(neighbors)
        yield region


def slow_aupro(scores, masks, limit):
    """AUPRO by its definition, over every threshold and region, in exact fractions."""
    regions = [[(i, *pixel) for pixel in region] for i, mask in enumerate(masks) for region in connected_regions(mask)]
    limit = Fraction(str(limit))
    curve = [(Fraction(0), Fraction(0))]
    for threshold in sorted(set(scores.ravel().tolist()), reverse=True):
        detected = scores >= threshold
        false = Fraction(int((detected & ~masks).sum()), int((~masks).sum()))
        overlaps = [Fraction(sum(bool(detected[p]) for p in region), len(region)) for region in regions]
        curve.append((false, sum(overlaps, Fraction(0)) / len(regions)))
    area = Fraction(0)
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x1 > limit > x0:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
    return float(area / limit)


def random_maps(seed, levels=None, shape=(4, 7, 6)):
    rng = np.random.default_rng(seed)
    masks = rng.random(shape) < 0.25
    masks[0] = False  # a normal image, whose pixels count in the false-positive rate
    scores = rng.normal(size=shape) + masks
    return (np.round(scores * levels) / levels if levels else scores).astype(np.float32), masks


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [None, 3, 0.5])
def test_aupro_equals_its_definition(limit, levels):
    for seed in range(3):
        scores, masks = random_maps(seed, levels)
        assert metrics.aupro(scores, masks, limit) == pytest.approx(slow_aupro(scores, masks, limit), abs=1e-12)


def test_aupro_of_perfect_constant_and_inverted_maps():
    _, masks = random_maps(0)
    assert metrics.aupro(masks.astype(np.float32), masks) == 1.0
    assert metrics.aupro(np.zeros(masks.shape), masks) == pytest.approx(0.15)  # all tied: the diagonal
    assert metrics.aupro(-masks.astype(np.float32), masks) == 0.0


def test_regions_connect_at_corners_but_not_across_images():
    masks = np.zeros((2, 3, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 0, 3] = masks[1, 0, 0] = True
    weights = metrics.region_weights(masks)
    assert weights[0, 0, 0] == weights[0, 1, 1] == 0.5
    assert weights[0, 0, 3] == weights[1, 0, 0] == 1.0
    assert weights.sum() == 3


def test_small_regions_weigh_as_much_as_large_ones():
    masks = np.zeros((1, 12, 12), bool)
    masks[0, :8, :8] = masks[0, 11, 11] = True
    scores = np.zeros(masks.shape, np.float32)
    scores[0, :8, :8] = 1
    assert metrics.evaluate([0.5], [1], scores, masks).values["pixel_AUPRO"] > 0.5
    assert metrics.aupro(scores, masks, 1e-9) == pytest.approx(0.5)


def test_evaluate_equals_the_single_metrics():
    scores, masks = random_maps(5)
    image_scores, labels = scores.max((1, 2)), masks.any((1, 2))
    report = metrics.evaluate(image_scores, labels.astype(np.int32), scores, masks.astype(np.uint8), fpr_limit=0.1)
    assert tuple(report.values) == metrics.METRICS and report.reasons == {}
    for prefix, s, y in [("image", image_scores, labels), ("pixel", scores, masks)]:
        assert report.values[f"{prefix}_AUROC"] == metrics.auroc(s, y)
        assert report.values[f"{prefix}_AP"] == metrics.average_precision(s, y)
        assert report.values[f"{prefix}_F1max"] == metrics.f1_max(s, y)
    assert report.values["pixel_AUPRO"] == metrics.aupro(scores, masks, 0.1) != metrics.aupro(scores, masks)


def test_ignored_pixels_leave_all_counts():
    scores, masks = random_maps(6)
    masks[1], ignored = False, np.zeros(masks.shape, bool)
    masks[1, 1, 1:5] = masks[1, 5:, :2] = True  # two regions
    ignored[1, 1, 2:4] = ignored[1, 4:, :3] = ignored[0, :3] = True  # cuts one in two, hides the other
    kept, arguments = ~ignored, ([0, 1, 1, 1], [0, 1, 1, 1])
    report = metrics.evaluate(*arguments, scores, masks, ignored=ignored)
    assert report == metrics.evaluate(*arguments, np.where(ignored, 99, scores), masks, ignored=ignored)
    assert report.values["pixel_AUROC"] == metrics.auroc(scores[kept], masks[kept])
    assert report.values["pixel_F1max"] == metrics.f1_max(scores[kept], masks[kept])
    assert report.values["pixel_AUPRO"] == metrics.aupro(scores, masks, ignored=ignored) != metrics.aupro(scores, masks)
    weights = metrics.region_weights(masks, ignored)
    assert weights[1, 1, [1, 4]].tolist() == [0.5, 0.5] and weights[1].sum() == 1 and not weights[ignored].any()


@pytest.mark.parametrize(
    ("labels", "maps", "masks", "nans", "reason"),
    [
        ([0, 0], np.eye(2)[None].repeat(2, 0), np.eye(2)[None].repeat(2, 0), "image", "none of the 2 images is anomal"),
        ([1, 1], np.eye(2)[None].repeat(2, 0), np.eye(2)[None].repeat(2, 0), "image", "none of the 2 images is normal"),
        ([0, 1], np.eye(2)[None].repeat(2, 0), np.zeros((2, 2, 2)), "pixel", "none of the 8 pixels is anomalous"),
        ([0, 1], np.eye(2)[None].repeat(2, 0), np.ones((2, 2, 2)), "pixel", "none of the 8 pixels is normal"),
        ([0, 1], None, np.ones((2, 2, 2)), "pixel", "the method gives no anomaly maps"),
        ([0, 1], np.ones((2, 2, 2)), None, "pixel", "the data set has no masks"),
        ([], np.ones((0, 2, 2)), np.ones((0, 2, 2)), "", "none of the 0"),
    ],
)
def test_undefined_metrics_are_nan_with_a_reason(labels, maps, masks, nans, reason):
    report = metrics.evaluate(np.arange(len(labels)), labels, maps, masks)
    assert tuple(report.values) == metrics.METRICS
    expected = {name for name in metrics.METRICS if name.startswith(nans)}
    assert {name for name, value in report.values.items() if math.isnan(value)} == set(report.reasons) == expected
    assert all(reason in text for text in report.reasons.values())


def test_single_metrics_are_nan_when_undefined():
    for metric in (metrics.auroc, metrics.average_precision, metrics.f1_max):
        assert math.isnan(metric([1.0, 2.0], [0, 0])) and math.isnan(metric([1.0, 2.0], [1, 1]))
    assert math.isnan(metrics.aupro(np.ones((1, 2, 2)), np.zeros((1, 2, 2))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([np.nan, 1, np.inf], [0, 1, 1]), "finite, got 2 of 3"),
        (([1.0, 2.0], [0, 1, 1]), r"shape .* got \(3,\) for scores of \(2,\)"),
        (([1.0, 2.0], [0, -1]), "0 .normal. or 1 .anomalous., got -1"),
        (([1.0, 2.0], [0, 1], np.full((2, 2, 2), np.nan), np.zeros((2, 2, 2))), "finite, got 8 of 8"),
        (([1.0, 2.0], [0, 1], np.ones((2, 2, 2)), np.zeros((2, 3, 2))), "shape"),
        (([1.0, 2.0], [0, 1], np.ones((2, 2, 2)), np.full((2, 2, 2), 255)), "got 255"),
        (([1.0, 2.0], [0, 1], np.ones((3, 2, 2)), np.ones((3, 2, 2))), r"for 2 images, got \(3, 2, 2\)"),
        (([1.0, 2.0], [0, 1], np.ones((2, 4)), np.ones((2, 4))), r"masks must be \(n, h, w\)"),
        (([[1.0, 2.0]], [[0, 1]]), r"image_scores must be \(n,\)"),
        (([1.0, 2.0], [0, 1], None, None, 0.0), r"fpr_limit must be in \(0, 1\], got 0.0"),
        (([1.0, 2.0], [0, 1], None, None, 1.5), "got 1.5"),
    ],
)
def test_invalid_input_gives_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        metrics.evaluate(*arguments)
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.int64, (3, 5, 4), elements=st.integers(-40, 40)),
    hnp.arrays(np.bool_, (3, 5, 4)),
    st.sampled_from(
        [
            lambda ranks: ranks * 3.7e-3 + 1e3,
            lambda ranks: np.exp(ranks / 2.0),
            lambda ranks: ranks.astype(np.float64) ** 3,
            lambda ranks: np.arctan(ranks).astype(np.float32),
            lambda ranks: (ranks * 1e36).astype(np.float32),
        ]
    ),
)
def test_metrics_are_invariant_under_monotone_functions(ranks, masks, increasing):
    assert (np.diff(increasing(np.arange(-40, 41))) > 0).all()  # strictly increasing in the type of the scores
    labels = masks.any((1, 2))
    scores = increasing(ranks)
    expected = metrics.evaluate(ranks.max((1, 2)), labels, ranks, masks)
    report = metrics.evaluate(scores.max((1, 2)), labels, scores, masks)
    assert report.reasons == expected.reasons
    np.testing.assert_equal(report.values, expected.values)


def test_scores_keep_their_precision():
    base = 16777216.0  # 2^24: base + 1 is a float64, and would tie with base in float32
    assert metrics.auroc(np.array([base, base + 1]), [0, 1]) == 1.0
    assert metrics.auroc(np.array([3e38, -3e38], np.float32), [1, 0]) == 1.0
    assert metrics.auroc([0.0, -0.0], [1, 0]) == 0.5
