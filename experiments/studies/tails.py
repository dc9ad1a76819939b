"""How far a generalized Pareto tail misses the wanted rate with few images; tails.json.

    python -m experiments.studies.tails

Scores are drawn from six distributions. For each number of images and each target, the rate with which a new score
exceeds the threshold of `tail_threshold`, and the highest score, is known exactly; the means over many draws are kept.
"""

import dataclasses
from pathlib import Path

import numpy as np
from scipy import stats

from experiments.command import RESULTS, origin, start
from jaxad.files import write_json
from jaxad.metrics import tail_threshold

DISTRIBUTIONS = {
    "normal": stats.norm(),
    "log-normal": stats.lognorm(0.5),
    "gamma": stats.gamma(3),
    "t": stats.t(5),
    "Gumbel": stats.gumbel_r(),
    "uniform": stats.uniform(),
}
CASES = ((16, 0.01), (20, 0.02), (20, 0.01), (40, 0.01), (80, 0.01), (20, 0.001), (80, 0.001))
"""Images and targets."""


@dataclasses.dataclass
class Options:
    """Rates of Pareto tails."""

    draws: int = 4000
    results: Path = RESULTS


def main(options: Options) -> None:
    """Draws and measures."""
    rows = []
    for n, target in CASES:
        rates = {}
        for name, distribution in DISTRIBUTIONS.items():
            scores = distribution.rvs((options.draws, n), random_state=np.random.default_rng(0))
            thresholds = [tail_threshold(draw, target).value for draw in scores]
            exceeding = distribution.sf(thresholds)
            rates[name] = {
                "mean": float(exceeding.mean()),
                "median": float(np.median(exceeding)),
                "highest_score": float(distribution.sf(scores.max(1)).mean()),
            }
        rows.append({"images": n, "target": target, "rates": rates})
    write_json(
        options.results / "tails.json", {"experiment": "tails", "draws": options.draws, "rows": rows, **origin()}
    )


if __name__ == "__main__":
    start(main, Options)
