"""What is known about the false-positive rate of a threshold, in numbers and in words."""

import math
from fractions import Fraction

from scipy import special

from jaxad.metrics.threshold import CROSS_HOLDOUT, HELD_OUT, TAIL, Threshold


def confident_fpr(threshold: Threshold, confidence: float = 0.95) -> float:
    """The false-positive rate that a threshold keeps with this confidence, given the images that were held out.

    `guaranteed_fpr` is an average over hold-outs, and many of them have a higher rate. The rate of one hold-out, the
    k-th smallest of n independent scores, has the distribution Beta(n + 1 - k, k), or a smaller one if scores are tied.
    Groups of several images, whose number takes the place of n, have at most e times the probability of such a tail,
    rounded up to the next whole n + 1 - k. The bound is then valid, but not tight.

    Sources: Vovk, Conditional validity of inductive conformal predictors, ACML 2012, section 3; for groups Bentkus, On
    Hoeffding's inequalities, Annals of Probability 2004, theorem 1.2.

    Args:
        threshold: of `conformal_threshold`.
        confidence: in (0, 1).

    Returns:
        A quantile of that distribution; 1.0 for other thresholds, of which no such bound is known.
    """
    n = threshold.n_groups
    allowed = math.ceil(threshold.guaranteed_fpr * (n + 1) - 1e-9)
    if threshold.source != HELD_OUT or allowed > n:
        return 1.0
    error = (1 - confidence) / (1 if n == threshold.n else math.e)
    return float(special.betaincinv(allowed, n + 1 - allowed, 1 - error))


def percent(rate: float) -> str:
    """A rate as text with three digits: "5.26 %"."""
    return f"{100 * rate:.3g} %"


def statement(threshold: Threshold) -> str:
    """What is known about the false-positive rate of a threshold, as a clause."""
    if threshold.source == HELD_OUT:
        average, confident = percent(threshold.guaranteed_fpr), percent(confident_fpr(threshold))
        return f"at most {average} false alarms on average over hold-outs, {confident} with 95 % confidence in this one"
    if threshold.source == CROSS_HOLDOUT and threshold.guaranteed_fpr < 1:
        return f"at most {percent(threshold.guaranteed_fpr)} false alarms on average over training sets"
    if threshold.source == CROSS_HOLDOUT:
        return f"about {percent(threshold.fpr)} false alarms if a fold changes the model little, without a guarantee"
    if threshold.source == TAIL:
        return f"about {percent(threshold.fpr)} false alarms by a model, without a guarantee"
    return "no guarantee"


def shortfall(threshold: Threshold) -> str | None:
    """In one line, how many images the target rate needs; None where there are enough, or where they do not count."""
    if threshold.source not in (HELD_OUT, CROSS_HOLDOUT, TAIL) or not threshold.fpr:
        return None
    needed = math.ceil(1 / Fraction(str(threshold.fpr))) - 1
    if threshold.n_groups >= needed:
        return None
    consequence = {
        HELD_OUT: f", which guarantee {percent(1 / (threshold.n_groups + 1))}",
        CROSS_HOLDOUT: ": the threshold is their highest score",
        TAIL: ": the threshold extrapolates their tail",
    }
    units = "images" if threshold.n_groups == threshold.n else "groups"
    wanted = f"{percent(threshold.fpr)} false alarms need {needed} held-out {units}"
    return f"{wanted}, got {threshold.n_groups}{consequence[threshold.source]}"
