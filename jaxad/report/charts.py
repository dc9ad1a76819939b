"""Charts of image scores as inline SVG, colored by the style sheet of the page."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.ticker import MaxNLocator

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 280, 48, 14, 18, 44
MAX_BINS = 40


class Series(NamedTuple):
    """The scores of one kind of image: good, anomalous or unlabeled."""

    style: str
    """The CSS class that colors it, which is also its label."""
    scores: Float[np.ndarray, "n"]


class Roc(NamedTuple):
    """The corners of a ROC curve, from (0, 0) to (1, 1)."""

    false_positive_rate: Float[np.ndarray, "k"]
    true_positive_rate: Float[np.ndarray, "k"]
    area: float


def roc(scores: Float[np.ndarray, "n"], labels: Int[np.ndarray, "n"]) -> Roc:
    """The exact ROC curve, with ties at one threshold, and its area. Both labels must occur."""
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    positives = np.cumsum(labels[order] == 1)[last_of_tie]
    negatives = last_of_tie + 1 - positives
    right, up = np.diff(negatives, prepend=0), np.diff(positives, prepend=0)
    is_corner = np.append(right[:-1] * up[1:] != up[:-1] * right[1:], True)
    true_rate = np.append(0, positives[is_corner]) / positives[-1]
    false_rate = np.append(0, negatives[is_corner]) / negatives[-1]
    return Roc(false_rate, true_rate, float(np.trapezoid(true_rate, false_rate)))


def histogram_svg(series: Sequence[Series], threshold: float | None) -> str:
    """Overlaid histograms, each in percent of its own number of scores. No bin straddles the threshold."""
    scores = np.concatenate([entry.scores for entry in series])
    points = scores if threshold is None else np.append(scores, threshold)
    low, high = float(points.min()), float(points.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # float32 tells hardly more numbers apart
        margin = max(0.5, 1e-3 * abs(low))
        low, high = low - margin, high + margin
    step = (high - low) / min(MAX_BINS, max(10, int(2 * np.sqrt(len(scores)))))
    start = low if threshold is None else threshold - np.ceil((threshold - low) / step) * step
    edges = start + step * np.arange(np.ceil((high - start) / step) + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    shares = [100 * np.histogram(entry.scores, edges)[0] / max(len(entry.scores), 1) for entry in series]
    axes = _Axes(440, float(edges[0]), float(edges[-1]), 1.08 * max(float(share.max()) for share in shares))
    body = []
    for entry, share in zip(series, shares, strict=True):
        outline = axes.points(np.repeat(edges, 2), np.concatenate([[0], np.repeat(share, 2), [0]]))
        body.append(f'<path class="area {entry.style}" d="{outline}"/>')
    if threshold is not None:
        x, (side, shift) = axes.x(threshold), ("end", -6) if threshold > edges.mean() else ("start", 6)
        body.append(f'<path class="mark" d="M{x:.1f},{TOP - 6}V{HEIGHT - BOTTOM}"/>')
        label = f"threshold {threshold:.4g}"
        body.append(f'<text class="strong" x="{x + shift:.1f}" y="{TOP + 4}" text-anchor="{side}">{label}</text>')
    return axes.svg(body, "anomaly score", "share of images, %", "Histogram of anomaly scores")


def roc_svg(curve: Roc, at_threshold: tuple[float, float] | None) -> str:
    """The ROC curve, the diagonal of chance, and a dot at the (false, true) positive rates of the threshold."""
    axes = _Axes(300, 0.0, 1.0, 1.0)
    line = axes.points(curve.false_positive_rate, curve.true_positive_rate)
    body = [
        f'<path class="diagonal" d="{axes.points(np.array([0, 1]), np.array([0, 1]))}"/>',
        f'<path class="under" d="{line}V{axes.y(0):.1f}H{axes.x(0):.1f}Z"/>',
        f'<path class="curve" d="{line}"/>',
        f'<text class="strong" x="{axes.x(0.95):.0f}" y="{axes.y(0.08):.0f}" text-anchor="end">'
        f"AUROC {curve.area:.3f}</text>",
    ]
    if at_threshold is not None:
        x, y = axes.x(at_threshold[0]), axes.y(at_threshold[1])
        body.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    return axes.svg(body, "false positive rate", "true positive rate", f"ROC curve, AUROC {curve.area:.3f}")


def loss_svg(losses: Sequence[float]) -> str:
    """The training loss from the first step to the last."""
    low, high = min(losses), max(losses)
    margin = max(0.08 * (high - low), 1e-3 * max(abs(low), abs(high))) or 0.5
    axes = _Axes(440, 0.0, 100.0, high + margin, low - margin)
    line = axes.points(np.linspace(0, 100, len(losses)), np.asarray(losses))
    return axes.svg([f'<path class="curve" d="{line}"/>'], "training steps, %", "loss", "Training loss")


class _Axes(NamedTuple):
    """Axes: maps data (`low`..`high` by `bottom`..`top`) to a canvas of `width` by HEIGHT units."""

    width: int
    low: float
    high: float
    top: float
    bottom: float = 0.0

    def x(self, value):
        return LEFT + (value - self.low) / (self.high - self.low) * (self.width - LEFT - RIGHT)

    def y(self, value):
        return HEIGHT - BOTTOM - (value - self.bottom) / (self.top - self.bottom) * (HEIGHT - TOP - BOTTOM)

    def points(self, xs: np.ndarray, ys: np.ndarray) -> str:
        corners = zip(self.x(xs), self.y(ys), strict=True)
        return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in corners)

    def svg(self, body: Sequence[str], x_label: str, y_label: str, title: str) -> str:
        bottom, right = HEIGHT - BOTTOM, self.width - RIGHT
        parts = [f'<svg viewBox="0 0 {self.width} {HEIGHT}" role="img" aria-label="{escape(title)}">']
        for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(self.bottom, self.top):
            if self.bottom <= tick <= self.top:
                parts.append(f'<path class="grid" d="M{LEFT},{self.y(tick):.1f}H{right}"/>')
                label = f"{tick:.4g}".replace("e+0", "e").replace("e-0", "e-")
                parts.append(f'<text x="{LEFT - 7}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{label}</text>')
        for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(self.low, self.high):
            if self.low <= tick <= self.high:
                parts.append(f'<path class="tick" d="M{self.x(tick):.1f},{bottom}v4"/>')
                parts.append(f'<text x="{self.x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
        middle = (TOP + bottom) / 2
        parts += [
            *body,
            f'<path class="axis" d="M{LEFT},{bottom}H{right}"/>',
            f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
            f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
            "</svg>",
        ]
        return "".join(parts)
