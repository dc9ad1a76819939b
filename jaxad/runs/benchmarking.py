"""Several methods on the same images, or several runs: what one of them cannot do does not cost the others."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxad.base import Frozen
from jaxad.data import Dataset
from jaxad.driver import distributed
from jaxad.driver.programs import abstract_state, embedded_spec
from jaxad.learning import check_auxiliary, load_frozen, split
from jaxad.report.tables import Row
from jaxad.settings import Settings

Rows = Mapping[Path, Row]


def unsuited(
    candidates: Iterable[Settings], trains: Iterable[Dataset], weights: dict[Any, Frozen]
) -> dict[str, Exception]:
    """The methods that cannot learn from these images with these weights, and why; nothing is computed.

    Args:
        candidates: One for each method.
        trains: The normal images of each category.
        weights: Receives the pretrained weights by backbone; methods that share features share them.
    """
    refusals: dict[str, Exception] = {}
    fewest = {data.image_size: data for data in sorted(trains, key=len, reverse=True)}
    for settings in candidates:
        try:
            if settings.backbone not in weights:
                weights[settings.backbone] = load_frozen(settings)
            frozen = weights[settings.backbone]
            for size, data in fewest.items():
                method, (train, _) = settings.build(size), split(settings, data)
                check_auxiliary(settings, method)
                abstract_state(method, frozen, embedded_spec(method.embed, frozen, len(train), size))
        except (ValueError, OSError) as error:
            refusals[settings.method] = error
    return refusals


def measure(
    methods: Mapping[str, Callable[[], Rows]], report: Callable[[str, Exception], None]
) -> tuple[dict[Path, Row], dict[str, Exception]]:
    """Runs methods, or evaluations of runs, one by one; an error ends one of them, not the rest.

    Several processes end together, as the others would wait for the one with the error; so does a single method.

    Args:
        methods: What fits and evaluates each.
        report: Told of every error as it comes.

    Returns:
        The rows of those that ended well, and the errors of the others.

    Raises:
        Exception: The first error, if no method ends well.
    """
    rows: dict[Path, Row] = {}
    errors: dict[str, Exception] = {}
    for name, run in methods.items():
        try:
            rows |= run()
        except Exception as error:
            if len(methods) == 1 or distributed.joined() or os.environ.get("JAXAD_DEBUG"):
                raise
            errors[name] = error
            report(name, error)
    if len(errors) == len(methods):
        raise next(iter(errors.values()))
    return rows, errors
