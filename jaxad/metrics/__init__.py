"""Metrics on raw scores, exact and streaming, and thresholds. See docs/metrics.md for the definitions."""

from jaxad.metrics import streaming
from jaxad.metrics.exact import (
    METRICS,
    Curve,
    Report,
    aupro,
    auroc,
    average_precision,
    curve,
    evaluate,
    f1_max,
    region_weights,
)
from jaxad.metrics.guarantees import confident_fpr
from jaxad.metrics.threshold import (
    Threshold,
    conformal_threshold,
    cross_threshold,
    from_json,
    manual_threshold,
    oracle_threshold,
    tail_threshold,
    to_json,
)

__all__ = [
    "METRICS",
    "Curve",
    "Report",
    "Threshold",
    "aupro",
    "auroc",
    "average_precision",
    "confident_fpr",
    "conformal_threshold",
    "cross_threshold",
    "curve",
    "evaluate",
    "f1_max",
    "from_json",
    "manual_threshold",
    "oracle_threshold",
    "region_weights",
    "streaming",
    "tail_threshold",
    "to_json",
]
