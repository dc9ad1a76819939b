"""What is said of a threshold holds in simulations, and where a formula is known, agrees with it."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxad import metrics
from jaxad.metrics import confident_fpr
from jaxad.metrics.guarantees import shortfall, statement
from jaxad.metrics.threshold import EXCEEDANCES


@pytest.mark.parametrize(("n", "fpr"), [(18, 0.05), (40, 0.1), (7, 0.5)])
def test_the_confident_rate_is_kept_in_95_of_100_holdouts(n, fpr):
    trials = 1_500
    scores = np.random.default_rng(0).random((trials, n))
    thresholds = [metrics.conformal_threshold(row, fpr) for row in scores]
    confident = confident_fpr(thresholds[0])
    higher = np.mean(
        [1 - threshold.value > confident for threshold in thresholds]
    )  # a uniform score exceeds t so often
    assert abs(higher - 0.05) < 4 * math.sqrt(0.05 * 0.95 / trials)
    allowed = round(thresholds[0].guaranteed_fpr * (n + 1))
    assert stats.binom.cdf(allowed - 1, n, confident) == pytest.approx(0.05)
    assert thresholds[0].guaranteed_fpr < confident < confident_fpr(thresholds[0], 0.99)


def test_tied_scores_only_lower_the_rate():
    rng, levels = np.random.default_rng(1), 7
    thresholds = [metrics.conformal_threshold(rng.integers(0, levels, 30), 0.2) for _ in range(500)]
    rates = np.array([1 - (threshold.value + 1) / levels for threshold in thresholds])
    assert 0 < np.mean(rates > confident_fpr(thresholds[0])) < 0.05


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_the_confident_rate_counts_groups(noise):
    """A part has two or eight shots, which score alike or hardly so; the rate is that of a new part's shots."""
    rng, n_groups, trials = np.random.default_rng(2), 30, 300
    kept = {"groups": 0, "images": 0}
    for _ in range(trials):
        part = rng.normal(size=n_groups)
        groups = np.repeat(np.arange(n_groups), np.where(part > 0, 2, 8))
        scores = part[groups] + noise * rng.normal(size=len(groups))
        for name, told in (("groups", groups.tolist()), ("images", None)):
            threshold = metrics.conformal_threshold(scores, 0.1, told)
            rate = stats.norm.sf(threshold.value / math.hypot(1, noise))
            kept[name] += rate <= confident_fpr(threshold)
    assert kept["groups"] >= 0.95 * trials
    if noise < 1:
        assert kept["images"] < 0.8 * trials  # what is said without groups is wrong


def test_only_holdouts_have_a_confident_rate():
    scores = np.arange(20.0)
    for threshold in (
        metrics.oracle_threshold(scores, scores > 9),
        metrics.manual_threshold(1.0),
        metrics.tail_threshold(scores, 0.01),
        metrics.cross_threshold(scores, 0.1, np.arange(20) % 5, monotone=True),
    ):
        assert confident_fpr(threshold) == 1.0
    assert confident_fpr(metrics.conformal_threshold([1.0, 2.0], 0.99, ["a", "a"])) == 1.0


def nearest(points, others):
    return np.abs(points[:, None] - others).min(1)


def cross_holdout_of_nearest_neighbors(rng, n_groups, folds, fpr, shots):
    """A threshold, and how often a shot of a new part exceeds it; the score is the distance to the nearest normal."""
    part = rng.standard_t(2, n_groups + 1)
    groups = np.repeat(np.arange(n_groups + 1), rng.integers(1, shots + 1, n_groups + 1))
    x = part[groups] + 0.3 * rng.normal(size=len(groups))
    fold = rng.permutation(n_groups)[groups[groups < n_groups]] % folds
    old, new = x[groups < n_groups], x[groups == n_groups]
    scores = np.empty(len(old))
    for i in range(folds):
        scores[fold == i] = nearest(old[fold == i], old[fold != i])
    told = groups[groups < n_groups].tolist() if shots > 1 else None
    threshold = metrics.cross_threshold(scores, fpr, fold, told, monotone=True)
    return threshold, np.mean(nearest(new, old) > threshold.value)


@pytest.mark.parametrize(
    ("n", "folds", "fpr", "shots"), [(10, 10, 0.05, 1), (10, 4, 0.2, 1), (20, 20, 0.2, 1), (12, 4, 0.1, 4)]
)
def test_the_bound_of_a_cross_holdout_holds_on_new_normals(n, folds, fpr, shots):
    rng, trials = np.random.default_rng(3), 800
    outcomes = [cross_holdout_of_nearest_neighbors(rng, n, folds, fpr, shots) for _ in range(trials)]
    bound, rate = outcomes[0][0].guaranteed_fpr, np.mean([rate for _, rate in outcomes])
    assert bound < 1
    assert bound / 10 < rate < bound + 3 * math.sqrt(bound * (1 - bound) / trials)


@pytest.mark.parametrize(("n", "folds"), [(20, 20), (20, 4), (100, 5), (100, 10), (100, 50)])
def test_the_bound_of_a_cross_holdout_is_the_papers_or_better(n, folds):
    """Barber et al. 2021, theorem 4: 2 alpha + min(2 (1 - 1 / K) / (n / K + 1), (1 - K / n) / (K + 1))."""
    scores = np.random.default_rng(4).normal(size=n)
    for allowed in (1, 2, 5):
        alpha = allowed / (n + 1)
        paper = 2 * alpha + min(2 * (1 - 1 / folds) / (n / folds + 1), (1 - folds / n) / (folds + 1))
        threshold = metrics.cross_threshold(scores, alpha + 1e-9, np.arange(n) % folds, monotone=True)
        assert alpha - 1e-9 < threshold.guaranteed_fpr <= min(1, paper) + 1e-6
        assert threshold.value == metrics.conformal_threshold(scores, alpha + 1e-9).value
        assert metrics.cross_threshold(scores, 0.1, np.arange(n) % folds).guaranteed_fpr == 1.0


def test_one_fold_is_no_cross_holdout():
    with pytest.raises(ValueError, match="needs two folds or more, got 1"):
        metrics.cross_threshold([1.0, 2.0], 0.1, [3, 3])


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3])
def test_a_long_pareto_tail_is_found(shape):
    scores = stats.genpareto.rvs(shape, size=20_000, random_state=5)
    threshold = metrics.tail_threshold(scores, 1e-3)
    assert threshold.value == pytest.approx(stats.genpareto.isf(1e-3, shape), rel=0.1)
    assert (threshold.guaranteed_fpr, threshold.source) == (1.0, "generalized Pareto tail of held-out normals")
    twice = metrics.tail_threshold(np.repeat(scores[:400], 2), 1e-3, np.repeat(np.arange(400), 2).tolist())
    assert twice.value == pytest.approx(metrics.tail_threshold(scores[:400], 1e-3).value, rel=0.05)
    assert (twice.n, twice.n_groups) == (800, 400)


@pytest.mark.parametrize("law", [stats.norm(), stats.lognorm(0.5), stats.t(5)])
def test_the_tail_of_few_scores_has_the_documented_bias(law):
    """docs/metrics.md: with 20 images and a target of 1 %, half of the thresholds keep about 1 %, on average 3 %."""
    scores = law.rvs((1_000, 20), random_state=6)
    rates = law.sf([metrics.tail_threshold(row, 0.01).value for row in scores])
    assert 0.008 < np.median(rates) < 0.016 and 0.02 < rates.mean() < 0.032
    assert rates.mean() < law.sf(scores.max(1)).mean()  # the best that is possible without a model


@pytest.mark.parametrize(
    ("scores", "fpr", "groups", "message"),
    [
        (np.arange(2.0 * EXCEEDANCES - 1), 0.01, None, "needs 8 images or groups with scores above the median, got 7"),
        (np.ones(100), 0.01, None, "got 0"),
        (np.arange(40.0), 0.01, [0, 1, 2, 3] * 10, "got 4"),
        (np.arange(40.0), 0.6, None, r"fpr must be in \(0, 0.512\) for the Pareto tail of these scores, got 0.6"),
        (np.arange(40.0), 0.0, None, "got 0.0"),
    ],
)
def test_a_tail_that_cannot_be_modeled_is_refused(scores, fpr, groups, message):
    with pytest.raises(ValueError, match=message):
        metrics.tail_threshold(scores, fpr, groups)


def test_quantized_scores_have_a_tail():
    """With 16 to 24 scores above the median and the largest excess three times the first quartile, theta is 0."""
    scores = np.concatenate([np.zeros(20), np.repeat([1.0, 2.0, 3.0], [6, 8, 6])])
    assert 2 < metrics.tail_threshold(scores, 0.01).value < 10


def test_a_shortfall_names_the_number_of_images():
    few = metrics.conformal_threshold(np.arange(18.0), 0.01)
    assert shortfall(few) == "1 % false alarms need 99 held-out images, got 18, which guarantee 5.26 %"
    grouped = metrics.conformal_threshold(np.arange(18.0), 0.05, [0, 1, 2] * 6)
    assert shortfall(grouped) == "5 % false alarms need 19 held-out groups, got 3, which guarantee 25 %"
    assert "extrapolates" in (shortfall(metrics.tail_threshold(np.arange(18.0), 0.01)) or "")
    assert "highest score" in (shortfall(metrics.cross_threshold(np.arange(18.0), 0.01, np.arange(18) % 3)) or "")
    for enough in (
        metrics.conformal_threshold(np.arange(19.0), 0.05),
        metrics.conformal_threshold(np.arange(99.0), 0.01),
        metrics.conformal_threshold(np.arange(3.0), 0.0),
        metrics.manual_threshold(1.0),
        metrics.oracle_threshold(np.arange(9.0), np.arange(9) > 7),
    ):
        assert shortfall(enough) is None


def test_a_statement_tells_averages_from_one_holdout():
    threshold = metrics.conformal_threshold(np.arange(18.0), 0.05)
    confident = 1 - 0.05 ** (1 / 18)  # nobody of 18 exceeds the threshold
    expected = f"at most 5.26 % false alarms on average over hold-outs, {100 * confident:.3g} % with 95 % confidence"
    assert statement(threshold).startswith(expected)
    assert "without a guarantee" in statement(metrics.tail_threshold(np.arange(18.0), 0.01))
    folds = np.arange(18)
    assert "without a guarantee" in statement(metrics.cross_threshold(np.arange(18.0), 0.05, folds))
    assert "at most 5.26 %" in statement(metrics.cross_threshold(np.arange(18.0), 0.05, folds, monotone=True))
    assert statement(metrics.manual_threshold(1.0)) == "no guarantee"
