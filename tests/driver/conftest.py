"""Fixtures of the driver's tests."""

import pytest

from jaxad.data import Dataset


@pytest.fixture
def decoded(monkeypatch):
    """The number of images decoded so far, as a list of batches."""
    calls = []
    images = Dataset.images

    def counted(self, indices):
        calls.extend(indices)
        return images(self, indices)

    monkeypatch.setattr(Dataset, "images", counted)
    return calls
