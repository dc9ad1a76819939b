"""`Record`: what a reader yields for each image."""

import re
from typing import NamedTuple

from jaxad.data.images import Source

GOOD = "good"
"""The `defect` of a normal image."""
_NORMAL = re.compile(
    r"goods?|ok|normals?|0(\.0*)?|false|no[-_ ]?(defects?|anomal(y|ies))|non[-_ ]?defective"
    r"|(defect|fault|anomaly)[-_ ]?free|undamaged|flawless|pass(ed)?",
    re.IGNORECASE,
)


class Record(NamedTuple):
    """One image and its annotation."""

    path: str
    """The name of the image in results and error messages."""
    image: Source
    category: str
    split: str
    """"train" or "test"."""
    defect: str = GOOD
    """The kind of defect, "good" for a normal image, or empty if unknown."""
    mask: Source | tuple[Source, ...] | None = None
    """Several masks of one image count together."""
    group: str = ""
    """The part that it shows, such as a tile, a workpiece or a lot; empty: a part of its own."""
    ignore: tuple[Source, ...] = ()
    """Masks of what to ignore in this image, besides `Preprocess.ignore`."""

    @property
    def masks(self) -> tuple[Source, ...]:
        """The masks of the image, none if it has none."""
        return self.mask if isinstance(self.mask, tuple) else () if self.mask is None else (self.mask,)

    @property
    def label(self) -> int:
        """0 normal, 1 anomalous, -1 unknown."""
        return {GOOD: 0, "": -1}.get(self.defect, 1)


def defect_of(label: str) -> str:
    """The defect that a label or folder name denotes: "good" for good, ok, normal, defect-free, 0 ..."""
    label = label.strip()
    return GOOD if _NORMAL.fullmatch(label) else label
