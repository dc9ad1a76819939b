"""The published methods by name; every one is a factory of `jaxad.base.Method`."""

from collections.abc import Callable

from jaxad.base import Method
from jaxad.methods.cfa import cfa
from jaxad.methods.cflow import cflow
from jaxad.methods.csflow import csflow
from jaxad.methods.cutpaste import cutpaste
from jaxad.methods.differnet import differnet
from jaxad.methods.draem import draem
from jaxad.methods.efficientad import efficientad
from jaxad.methods.fastflow import fastflow
from jaxad.methods.glass import glass
from jaxad.methods.mahalanobis_ad import mahalanobis_ad
from jaxad.methods.memseg import memseg
from jaxad.methods.mkd import mkd
from jaxad.methods.nf import nf
from jaxad.methods.nsa import nsa
from jaxad.methods.padim import padim
from jaxad.methods.patchcore import patchcore
from jaxad.methods.rd4ad import rd4ad
from jaxad.methods.simplenet import simplenet
from jaxad.methods.spade import spade
from jaxad.methods.stfpm import stfpm
from jaxad.methods.uninformed_students import uninformed_students

METHODS: dict[str, Callable[..., Method]] = {
    "cfa": cfa,
    "cflow": cflow,
    "csflow": csflow,
    "cutpaste": cutpaste,
    "differnet": differnet,
    "draem": draem,
    "efficientad": efficientad,
    "fastflow": fastflow,
    "glass": glass,
    "mahalanobis_ad": mahalanobis_ad,
    "memseg": memseg,
    "mkd": mkd,
    "nf": nf,
    "nsa": nsa,
    "padim": padim,
    "patchcore": patchcore,
    "rd4ad": rd4ad,
    "simplenet": simplenet,
    "spade": spade,
    "stfpm": stfpm,
    "uninformed_students": uninformed_students,
}
"""Name -> factory."""


def factory(name: str) -> Callable[..., Method]:
    """The factory of that name.

    Raises:
        ValueError: There is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"the method must be one of {', '.join(METHODS)}; got {name!r}")
    return METHODS[name]
