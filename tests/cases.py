"""The conformance table: one row a method and one for every variant that takes another path.

`tests/test_conformance.py` runs each row through the same tests. A row holds whatever differs, so that no test asks for
a method's name. Keep it tiny: 64 px, few channels, few steps.
"""

import inspect
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxad.backbones import Backbone, backbone
from jaxad.base import Method
from jaxad.methods import METHODS
from tests.examples import slow_outside
from tests.tiny import PATCH9, PATCH13, TINY_PDN, TINY_RESNET

IMAGE_SIZE = (64, 64)
TWO = ("layer1", "layer2")
PDN_SMALL = backbone("pdn_small")


class Case(NamedTuple):
    """A method with hyperparameters small enough to compile in a moment."""

    method: str
    hyperparameters: dict[str, Any]
    backbone: Backbone | tuple[Backbone, ...] = PDN_SMALL
    pixel: bool = True
    """Whether it gives a heat map."""
    random: bool = False
    """Whether the fitted state depends on the key."""
    streaming: bool = False
    """Whether the state is of one size however many training images there are."""
    determined: bool = True
    """Whether the data determine the fitted state: principal directions have no sign, and rounding decides what Adam
    makes of gradients near 0."""
    jumps: bool = False
    """Whether the heat map is a gradient through ReLUs, which jumps where rounding moves an activation across 0."""
    tolerance: float = 1e-5
    """Of scores, from one program to another; larger where synthetic anomalies have edges, across which rounding moves
    a pixel."""
    weights: bool = True
    """Whether it uses a backbone's weights, and not only how images are normalized."""
    finds: bool = True
    """Whether tests can afford the training with which it finds a defect; else its recipe's results must show it."""
    constants: int = 0
    """Bytes of a fixed matrix of the method that is part of its programs."""
    longer: Mapping[str, Any] = MappingProxyType({})
    """Hyperparameters with which it learns enough to find a defect, where steps so long magnify rounding."""
    slow: bool = False
    """Whether it compiles so long that only `make test-all` fits it."""

    @property
    def backbones(self) -> tuple[Backbone, ...]:
        """The backbones, one or more."""
        return (self.backbone,) if isinstance(self.backbone, Backbone) else self.backbone

    def make(self, longer: bool = False) -> Method:
        """The method."""
        make = METHODS[self.method]
        arguments = {"backbone": self.backbone, "image_size": IMAGE_SIZE}
        if not self.pixel:
            del arguments["image_size"]
        accepted = {name: value for name, value in arguments.items() if name in inspect.signature(make).parameters}
        return make(**accepted, **self.hyperparameters | (self.longer if longer else {}))


PATCHCORE: dict[str, Any] = dict(layers=TWO, coreset_sampling_ratio=0.05, projection_dim=16, num_neighbors=2)
"""Ratios so small that no two patches are equally far, to 1e-6, when one is picked: rounding decides among such."""
CFA: dict[str, Any] = dict(layers=TWO, gamma_c=3, gamma_d=4, epochs=2, train_batch_size=4)
CFLOW: dict[str, Any] = dict(
    layers=("layer2",), coupling_blocks=2, condition_size=8, fiber_batch_size=64, epochs=2, train_batch_size=4
)
CSFLOW: dict[str, Any] = dict(layer="layer1", coupling_blocks=1, hidden=2, epochs=2, train_batch_size=4)
CUTPASTE: dict[str, Any] = dict(layer="layer2", head=(8, 4), epochs=2, train_batch_size=4, learning_rate=1e-6)
DIFFERNET: dict[str, Any] = dict(
    layer="layer1", coupling_blocks=2, hidden=8, rotations=2, train_rotations=1, epochs=2, train_batch_size=4
)
DRAEM: dict[str, Any] = dict(
    reconstructive_width=2, sspcab=True, discriminative_width=2, epochs=2, train_batch_size=4, learning_rate=1e-6
)
EFFICIENTAD: dict[str, Any] = dict(epochs=2, train_batch_size=4, learning_rate=1e-6)
FASTFLOW: dict[str, Any] = dict(layers=("layer2",), flow_steps=2, hidden_ratio=0.1, epochs=2, train_batch_size=4)
GLASS: dict[str, Any] = dict(
    layers=TWO, hidden=8, hypothesis="hypersphere", ascent_steps=5, epochs=2, train_batch_size=4, learning_rate=1e-6
)
MEMSEG: dict[str, Any] = dict(
    memory_size=4, channel_pooling=4, epochs=1, train_batch_size=4, learning_rate=1e-6, on_foreground=False
)
MKD: dict[str, Any] = dict(layers=TWO, hidden=4, epochs=2, train_batch_size=4, learning_rate=1e-5)
NF: dict[str, Any] = dict(layers=TWO, couplings=2, hidden=4, blocks=1, epochs=2, train_batch_size=4)
NSA: dict[str, Any] = dict(pieces=1, epochs=2, train_batch_size=4, learning_rate=1e-6, shift=1, degrees=5.0)
RD4AD: dict[str, Any] = dict(epochs=2, train_batch_size=4, learning_rate=1e-5)
SIMPLENET: dict[str, Any] = dict(
    layers=TWO, hidden=8, epochs=2, train_batch_size=4, learning_rate=1e-6, adaptor_learning_rate=1e-6
)
STFPM: dict[str, Any] = dict(layers=("layer1",), epochs=2, train_batch_size=4, learning_rate=0.01)
STUDENTS: dict[str, Any] = dict(num_students=2, stride=8, epochs=2, train_batch_size=4)

GRADIENT: dict[str, Any] = dict(random=True, streaming=True, determined=False)
"""Of most methods that follow a gradient."""
SYNTHETIC: dict[str, Any] = GRADIENT | dict(tolerance=2e-3, finds=False)

CASES = {
    "patchcore": Case("patchcore", PATCHCORE, random=True),
    "patchcore-paper": Case("patchcore", PATCHCORE | dict(scoring="paper", reweight_neighbors=4), random=True),
    "patchcore-all": Case("patchcore", dict(layers=("layer2",), coreset_sampling_ratio=1.0)),
    "patchcore-stream": Case("patchcore", PATCHCORE | dict(coreset_size=48), random=True),
    "patchcore-ensemble": Case(
        "patchcore", PATCHCORE | dict(coreset_sampling_ratio=0.02), (PDN_SMALL, PDN_SMALL), random=True
    ),
    "padim": Case("padim", dict(layers=TWO, n_features=6), random=True, streaming=True),
    "padim-all": Case("padim", dict(layers=("layer2",), n_features="all"), streaming=True),
    "spade": Case("spade", dict(layers=TWO, image_layer="layer2", num_neighbors=3, num_pixel_neighbors=2)),
    "cfa": Case("cfa", CFA, **GRADIENT),
    "cflow": Case("cflow", CFLOW, random=True, streaming=True),
    "csflow": Case("csflow", CSFLOW, **GRADIENT),
    "cutpaste": Case(
        "cutpaste", CUTPASTE | dict(pretrained=True), TINY_RESNET, random=True, determined=False, tolerance=2e-2
    ),
    "cutpaste-patches": Case(
        "cutpaste",
        CUTPASTE | dict(way="binary", patch_size=24, stride=8),
        TINY_RESNET,
        random=True,
        determined=False,
        tolerance=2e-2,
        weights=False,
    ),
    "differnet": Case("differnet", DIFFERNET, pixel=False, random=True, streaming=True),
    "draem": Case("draem", DRAEM, weights=False, slow=True, **SYNTHETIC),
    "efficientad": Case("efficientad", EFFICIENTAD, TINY_PDN, random=True, determined=False, slow=True),
    "efficientad-embedded": Case(
        "efficientad", EFFICIENTAD | dict(epochs=1), random=True, determined=False, constants=4 * 384**2
    ),
    "fastflow": Case("fastflow", FASTFLOW, random=True, streaming=True),
    "glass": Case(
        "glass",
        GLASS,
        tolerance=2e-3,
        longer=dict(epochs=60, noise=0.3, learning_rate=1e-2),
        slow=True,
        **GRADIENT,
    ),
    "glass-patches": Case(
        "glass",
        GLASS | dict(hypothesis="manifold", epochs=1, rows_per_step=32, shell=1.0),
        slow=True,
        **SYNTHETIC | dict(streaming=False),
    ),
    "memseg": Case("memseg", MEMSEG, TINY_RESNET, slow=True, **SYNTHETIC),
    "mkd": Case("mkd", MKD, jumps=True, longer=dict(learning_rate=1e-3), **GRADIENT),
    "nf": Case("nf", NF, pixel=False, **GRADIENT),
    "nf-pixels": Case("nf", NF | dict(on="pixels", scales=1, couplings=1), pixel=False, weights=False, **GRADIENT),
    "nsa": Case("nsa", NSA, TINY_RESNET, weights=False, slow=True, **SYNTHETIC),
    "rd4ad": Case("rd4ad", RD4AD, TINY_RESNET, longer=dict(epochs=4, learning_rate=1e-3), **GRADIENT),
    "simplenet": Case("simplenet", SIMPLENET, finds=False, **GRADIENT),
    "simplenet-patches": Case(
        "simplenet",
        SIMPLENET | dict(epochs=1, rows_per_step=32, precise_statistics=True),
        finds=False,
        **GRADIENT,
    ),
    "stfpm": Case("stfpm", STFPM, TINY_RESNET, longer=dict(epochs=4, learning_rate=0.1), **GRADIENT),
    "uninformed_students": Case("uninformed_students", STUDENTS, PATCH9, **GRADIENT),
    "uninformed_students-two": Case("uninformed_students", STUDENTS, (PATCH9, PATCH13), **GRADIENT),
    "mahalanobis_ad": Case("mahalanobis_ad", dict(layers=TWO), pixel=False),
    "mahalanobis_ad-pca": Case("mahalanobis_ad", dict(layers=TWO, reduction="pca"), pixel=False, determined=False),
    "mahalanobis_ad-npca": Case(
        "mahalanobis_ad",
        dict(layers=TWO, reduction="npca", variance_threshold=0.9),
        pixel=False,
        determined=False,
    ),
}

OF_EACH_KIND = frozenset({"padim", "patchcore-stream", "spade", "mahalanobis_ad", "cfa", "fastflow"})
"""Rows on which `make test` proves what the driver does: closed forms, memory banks, gradients, several stages."""
SEVERAL_CLASSES = frozenset({"padim", "patchcore-stream", "cfa"})
"""Those of them that it runs for several classes and on meshes, too."""
FITTED = OF_EACH_KIND | {name for name, case in CASES.items() if name == case.method and not case.slow}
"""Rows that `make test` fits: each method's first unless it compiles long, and those of each kind. It lowers all."""


def rows_of(among: Collection[str]) -> list:
    """All rows; those that are not among them only in `make test-all`."""
    return slow_outside(among, CASES)
