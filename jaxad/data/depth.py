"""How many bits the integers of 16-bit images use: cameras of 10 and 12 bits write them, too."""

from collections.abc import Sequence

import numpy as np

from jaxad.data import images
from jaxad.data.dataset import Dataset

SAMPLE, FIRST = 100, 3
"""Images of a data set that are looked at, evenly spread; only the first ones if these are not in 16 bits."""
DEPTHS = (8, 10, 12)


def usual_bits(datasets: Sequence[Dataset]) -> tuple[int | None, str]:
    """The depth to read images with, where the data sets do not say: what their 16-bit images use.

    Returns:
        The depth, None if it is all 16 bits or if there are no 16-bit images; and a warning where images use a
        sixteenth of the range or less, else empty.

    Raises:
        ValueError: the data sets say different depths, or an image cannot be decoded.
    """
    stated = {data.preprocess.bits for data in datasets}
    if len(stated) > 1:
        raise ValueError(f"data sets that are fitted together must have the same bits, got {stated}")
    if stated - {None}:
        return stated.pop(), ""
    brightest = [(value, data.category) for data in datasets if (value := _brightest(data))]
    if not brightest:
        return None, ""
    highest, lowest = max(brightest), min(brightest)
    if lowest[0] >= 1 << DEPTHS[-1]:
        return None, ""
    bits, least = (next((n for n in DEPTHS if value < 1 << n), None) for value, _ in (highest, lowest))
    rule = f"read as {bits} bits" if bits else f"fit them alone, with bits={least}"
    return bits, (
        f"the 16-bit images of {lowest[1]} use values up to {lowest[0]}, a sixteenth of the range or less: {rule}; set "
        "bits (--bits) to the depth of the camera, or to 16 for the whole range"
    )


def _brightest(data: Dataset) -> int | None:
    """The largest integer of 16-bit images; None where there are none."""
    chosen = [data.records[i] for i in np.unique(np.linspace(0, len(data) - 1, SAMPLE).astype(int))]
    values: list[int | None] = []
    for part in (chosen[:FIRST], chosen[FIRST:]):
        values += images.in_threads(lambda record: images.brightest(record.image, record.path), part)
        if not any(values):
            break
    return max((value for value in values if value), default=None)
