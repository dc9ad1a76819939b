"""Files of several pages or frames: multi-page TIFF, animated GIF, PNG, WebP and AVIF."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxad.data import images
from jaxad.data.images import Page, Source
from jaxad.data.records import Record


def split(records: Sequence[Record]) -> Iterator[Record]:
    """One record for every page: "scan.tif[0]", "scan.tif[1]" ... where a file has several."""
    for record, n in zip(records, _counts(records), strict=True):
        if n == 1:
            yield record
        for number in range(n if n > 1 else 0):
            mask = tuple(_page(mask, number) for mask in record.masks) or None
            yield record._replace(path=f"{record.path}[{number}]", image=_page(record.image, number), mask=mask)


def note(records: Sequence[Record]) -> str:
    """Which files have several pages, of which one is read; empty if none has."""
    several = [(record.path, n) for record, n in zip(records, _counts(records), strict=True) if n > 1]
    if not several:
        return ""
    return (
        f"{len(several)} of {len(records)} files have several pages or frames, such as {several[0][0]} with "
        f"{several[0][1]}: only the first is read; pages (--pages) reads all"
    )


def _counts(records: Sequence[Record]) -> list[int]:
    return images.in_threads(lambda record: images.page_count(record.image, record.path), records)


def _page(source: Source, number: int) -> Source:
    return Page(source, number) if isinstance(source, Path | bytes) and images.page_count(source, "") > 1 else source
