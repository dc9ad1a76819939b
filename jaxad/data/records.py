"""What a reader yields: one record per image."""

from typing import NamedTuple

from jaxad.data.images import Source

GOOD = "good"
"""The defect of an image that has none."""


class Record(NamedTuple):
    """One image and what is known of it."""

    path: str
    """What the image is called in results and errors."""
    image: Source
    category: str
    split: str
    """"train" or "test"."""
    defect: str = GOOD
    """"good", the kind of defect, or empty where it is unknown."""
    mask: Source | None = None

    @property
    def label(self) -> int:
        """0 normal, 1 anomalous, -1 unknown."""
        return {GOOD: 0, "": -1}.get(self.defect, 1)


def kind_of(label: str) -> str:
    """The defect that a label or folder name stands for: "good" for good, ok, normal and 0."""
    label = label.strip()
    return GOOD if label.lower() in (GOOD, "ok", "normal", "0") else label
