"""Thresholds: the finite-sample guarantee, the oracle and the JSON format."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from jaxad import metrics


@pytest.mark.parametrize(
    ("n", "fpr", "rank", "guaranteed"),
    [
        (9, 0.1, 9, 0.1),
        (99, 0.05, 95, 0.05),
        (99, 0.29, 71, 0.29),  # 100 * 0.29 is 28.999... in floating point
        (100, 0.05, 96, 5 / 101),
        (5, 0.1, 5, 1 / 6),  # too few normals for the target rate: the maximum
        (5, 0.0, 5, 1 / 6),
        (1, 0.99, 1, 0.5),
    ],
)
def test_the_rank_and_the_guarantee_follow_the_formula(n, fpr, rank, guaranteed):
    scores = np.random.default_rng(0).permutation(n) + 1.0
    threshold = metrics.conformal_threshold(scores, fpr)
    assert threshold == metrics.Threshold(rank, fpr, threshold.guaranteed_fpr, n, "held-out normals", n)
    assert threshold.guaranteed_fpr == pytest.approx(guaranteed, abs=1e-15)


@pytest.mark.parametrize(("n", "fpr"), [(19, 0.1), (30, 0.1), (7, 0.01)])
def test_the_guarantee_holds_on_new_normals(n, fpr):
    rng = np.random.default_rng(1)
    trials = 6_000
    normals = rng.normal(size=(trials, n + 1))
    thresholds = [metrics.conformal_threshold(row[:n], fpr) for row in normals]
    fpr_on_new = np.mean(normals[:, n] > [t.value for t in thresholds])
    guaranteed = thresholds[0].guaranteed_fpr
    error = math.sqrt(guaranteed * (1 - guaranteed) / trials)
    assert abs(fpr_on_new - guaranteed) < 4 * error  # the rate is exact for continuous scores
    assert guaranteed <= fpr or guaranteed == 1 / (n + 1)


def weigh(scores, groups, fpr):
    """The definition with groups, score by score."""
    members = {group: [s for s, g in zip(scores, groups, strict=True) if g == group] for group in groups}
    for t in sorted(scores):
        shares = [Fraction(sum(s <= t for s in group), len(group)) for group in members.values()]
        if sum(shares) / (len(members) + 1) >= 1 - Fraction(str(fpr)):
            return t, fpr
    return max(scores), 1 / (len(members) + 1)


@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.1, 0.3, 0.35])
def test_a_group_weighs_as_much_as_any_other(fpr):
    rng = np.random.default_rng(4)
    for n in (1, 2, 9, 40):
        for n_groups in (1, 3, 20):
            groups = rng.integers(0, n_groups, n).tolist()
            scores = rng.integers(0, 30, n) / 4  # with ties
            if len(set(groups)) < n:  # else the guarantee is a multiple of 1 / (n + 1)
                threshold = metrics.conformal_threshold(scores, fpr, groups)
                assert (threshold.value, threshold.guaranteed_fpr) == weigh(scores.tolist(), groups, fpr)
                assert (threshold.n, threshold.n_groups) == (n, len(set(groups)))


def test_rounding_decides_nothing():
    """Three groups of 3 and fpr 1/2: 2 of 4 parts must weigh up to the threshold, of which 6 scores have 1/3 each."""
    threshold = metrics.conformal_threshold(np.arange(9.0), 0.5, [0, 1, 2] * 3)
    assert threshold.value == 5.0 and threshold.guaranteed_fpr == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_groups_of_one_are_no_groups(dtype):
    rng = np.random.default_rng(5)
    for n in (1, 4, 19, 99):
        scores = rng.integers(0, 3 * n, n).astype(dtype) / 7
        for fpr in (0.0, 0.05, 0.1, 0.29, 0.5):
            expected = metrics.conformal_threshold(scores, fpr)
            assert metrics.conformal_threshold(scores, fpr, [f"part {i}" for i in range(n)]) == expected
            allowed = max(1, math.floor((n + 1) * Fraction(str(fpr))))
            assert (expected.value, expected.guaranteed_fpr) == (np.sort(scores)[n - allowed], allowed / (n + 1))


@pytest.mark.parametrize(("n_groups", "fpr"), [(4, 0.05), (19, 0.1)])
def test_the_guarantee_holds_on_new_groups(n_groups, fpr):
    """Shots of a part score alike, and there are fewer of parts that score high. Counting the shots fails."""
    rng, trials = np.random.default_rng(6), 2_000
    part = rng.normal(size=(trials, n_groups + 1))
    sizes = np.where(part > 0, 2, 8)
    rates = {"groups": 0.0, "images": 0.0}
    for effects, counts in zip(part, sizes, strict=True):
        groups = np.repeat(np.arange(n_groups + 1), counts)
        scores = effects[groups] + rng.normal(0, 0.1, len(groups))
        seen, new = scores[groups < n_groups], scores[groups == n_groups]
        grouped = metrics.conformal_threshold(seen, fpr, groups[groups < n_groups].tolist())
        counted = metrics.conformal_threshold(seen, fpr)
        rates["groups"] += np.mean(new > grouped.value) / trials
        rates["images"] += np.mean(new > counted.value) / trials
    guaranteed = max(fpr, 1 / (n_groups + 1))
    error = math.sqrt(guaranteed * (1 - guaranteed) / trials)
    assert rates["groups"] < guaranteed + 3 * error
    assert rates["groups"] > guaranteed / 2  # it is no empty promise
    assert rates["images"] > fpr + 4 * error


def test_a_pixel_threshold_bounds_the_rate_of_images():
    rng = np.random.default_rng(2)
    maps = rng.normal(size=(39, 6, 5)).astype(np.float32)
    threshold = metrics.conformal_threshold(maps, 0.1)
    assert (threshold.n, threshold.guaranteed_fpr) == (39, 0.1)
    assert np.sum((maps > threshold.value).any((1, 2))) == 3
    assert threshold.value == metrics.conformal_threshold(maps.max((1, 2)), 0.1).value


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [2, 100])
def test_the_oracle_reaches_the_best_f1(dtype, levels):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        labels = rng.random(50) < 0.4
        labels[:2] = 0, 1
        scores = (np.round((rng.normal(size=50) + labels) * levels) / levels).astype(dtype)
        threshold = metrics.oracle_threshold(scores, labels)
        predicted = scores > threshold.value
        f1 = 2 * np.sum(predicted & labels) / (np.sum(predicted) + np.sum(labels))
        assert f1 == pytest.approx(metrics.f1_max(scores, labels), abs=1e-12)
        assert threshold.fpr == pytest.approx(np.mean(predicted[~labels]))
        assert (threshold.source, threshold.guaranteed_fpr, threshold.n) == ("oracle (test set)", 1.0, 50)


def test_an_oracle_may_predict_everything_anomalous():
    threshold = metrics.oracle_threshold(np.zeros(3, np.float32), [1, 1, 0])
    assert threshold.value < 0 and threshold.fpr == 1.0


def test_thresholds_survive_a_json_round_trip():
    scores = np.random.default_rng(3).normal(size=20).astype(np.float32)
    for threshold in (metrics.conformal_threshold(scores, 0.1), metrics.oracle_threshold(scores, scores > 0.3)):
        stored = json.dumps(metrics.to_json(threshold), allow_nan=False)
        assert metrics.from_json(json.loads(stored)) == threshold
    manual = metrics.from_json(json.loads(json.dumps(metrics.to_json(metrics.manual_threshold(2)), allow_nan=False)))
    assert manual.value == 2.0 and manual.source == "edited by hand" and math.isnan(manual.fpr)


STORED = metrics.to_json(metrics.conformal_threshold(np.arange(10.0), 0.2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.conformal_threshold([], 0.1), "needs scores of held-out normals"),
        (lambda: metrics.conformal_threshold([1.0, np.nan], 0.1), "finite, got 1 of 2"),
        (lambda: metrics.conformal_threshold([1.0], 1.0), r"fpr must be in \[0, 1\), got 1.0"),
        (lambda: metrics.conformal_threshold([1.0], -0.1), "got -0.1"),
        (lambda: metrics.conformal_threshold([1.0], math.nan), "got nan"),
        (lambda: metrics.conformal_threshold([1.0, 2.0], 0.1, ["a"]), r"one entry per score \(2\), got 1"),
        (lambda: metrics.oracle_threshold([1.0, 2.0], [0, 0]), "needs normal and anomalous samples: none of the 2"),
        (lambda: metrics.manual_threshold(math.inf), r"a number in \[.*\], got inf"),
        (lambda: metrics.from_json(STORED | {"value": "high"}), "threshold.value must be a number .* got 'high'"),
        (lambda: metrics.from_json(STORED | {"fpr": 1.5}), r"fpr must be a number in \[0, 1\], got 1.5"),
        (lambda: metrics.from_json(STORED | {"n": True}), "n must be a whole number .* got True"),
        (lambda: metrics.from_json(STORED | {"n": 10**400}), "n must be a whole number"),
        (lambda: metrics.from_json(STORED | {"source": "a guess"}), "source must be one of held-out normals"),
        (lambda: metrics.from_json(STORED | {"fpr": None}), "has an fpr unless it is edited by hand"),
        (lambda: metrics.from_json(STORED | {"n_groups": 11}), "no more groups than samples, got 11 and 10"),
        (lambda: metrics.from_json(STORED | {"more": 1}), "must not have more"),
        (lambda: metrics.from_json({"value": 1.0}), "lacks fpr, guaranteed_fpr, n, n_groups, source"),
        (lambda: metrics.from_json([1.0]), "must be an object"),
    ],
)
def test_invalid_input_gives_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
