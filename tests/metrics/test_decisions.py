"""Rates at a threshold, against scipy and scikit-learn."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score, precision_score, recall_score

from jaxad.metrics.decisions import binomial_rate, decide, to_json


@pytest.mark.parametrize(("count", "n"), [(0, 1), (0, 30), (3, 30), (17, 18), (18, 18), (500, 1000)])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_are_those_of_clopper_and_pearson(count, n, confidence):
    expected = binomtest(count, n).proportion_ci(confidence, method="exact")
    assert binomial_rate(count, n, confidence) == pytest.approx((count / n, expected.low, expected.high, n))


def test_rates_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, -1], [30, 20, 10])
    scores = np.round(rng.normal(size=60) + labels, 1)  # some are equal to the threshold, and so below
    defects = ["good"] * 30 + ["crack"] * 12 + ["stain"] * 8 + [""] * 10
    decisions = decide(scores, labels, 0.5, defects)
    truth, predicted = labels[:50], scores[:50] > 0.5
    assert decisions.FPR.value == np.mean(predicted[:30]) and decisions.FPR.n == 30
    assert decisions.recall.value == pytest.approx(recall_score(truth, predicted))
    assert decisions.precision.value == pytest.approx(precision_score(truth, predicted))
    assert decisions.F1.value == pytest.approx(f1_score(truth, predicted))
    assert {kind: (rate.value, rate.n) for kind, rate in decisions.recall_by_defect.items()} == {
        "crack": (np.mean(predicted[30:42]), 12),
        "stain": (np.mean(predicted[42:]), 8),
    }


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.5])
def test_the_interval_of_f1_covers_the_true_f1(threshold):
    """Test sets of 40 images drawn from a million, of which a third is anomalous."""
    rng = np.random.default_rng(1)
    labels = rng.random(1_000_000) < 1 / 3
    scores = rng.normal(size=labels.size) + 2 * labels
    true, covered, trials = f1_score(labels, scores > threshold), 0, 500
    for drawn in rng.integers(0, labels.size, (trials, 40)):
        rate = decide(scores[drawn], labels[drawn].astype(int), threshold).F1
        assert math.isnan(rate.value) or rate.low <= rate.value <= rate.high
        covered += rate.low <= true <= rate.high
    assert covered >= 0.95 * trials - 3 * math.sqrt(0.95 * 0.05 * trials)


def test_rates_of_nothing_are_null():
    decisions = decide(np.array([0.1, 0.2]), np.array([0, 0]), 1.0)
    assert decisions.FPR.value == 0 and math.isnan(decisions.recall.value) and math.isnan(decisions.precision.value)
    fields = json.loads(json.dumps(to_json(decisions), allow_nan=False))
    assert fields["precision"] == {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    assert fields["recall_by_defect"] == {} and set(fields) == {"FPR", "recall", "precision", "F1", "recall_by_defect"}
