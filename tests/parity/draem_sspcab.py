"""DRAEM with SSPCAB against the official block of the latter.

As in draem.py, with `SSPCAB` of sspcab_torch.py, github.com/ristea/sspcab at 07d416cd97d6534c3bc81d53939154b6ff8bd958,
in the networks of anomalib, which say where the block belongs; its squared error has anomalib's weight of 0.1.
"""

from typing import Any

from tests.parity.draem import TOLERANCES, compare
from tests.parity.golden import Golden

__all__ = ["TOLERANCES", "ours"]


def ours(golden: Golden) -> dict[str, Any]:
    return compare(golden, sspcab=True)
