"""The registered weights: name, sha256 of the official file, and how images are normalized for them."""

import difflib
import os
from typing import NamedTuple

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and deviation of the training images, RGB in 0..255."""

IMAGENET: Normalization = ((0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255))
CAFFE: Normalization = ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0))
HUB = "https://huggingface.co"


class Entry(NamedTuple):
    """One set of weights."""

    name: str
    """Architecture and training recipe, as timm names them: `resnet50.tv_in1k`."""
    official: bool = True
    """Whether the model hub has the file; otherwise the user imports one."""
    sha256: str | None = None
    """The sha256 of the official file; None where none is published (the hub's own checksum is verified then)."""
    normalization: Normalization = IMAGENET
    stride_in_1x1: bool = False
    """The original ResNet (v1): the stride of a stage sits in its first 1x1 convolution."""

    @property
    def architecture(self) -> str:
        """The name without the training recipe."""
        return self.name.partition(".")[0]

    @property
    def url(self) -> str | None:
        """Address of the official file; `JAXAD_WEIGHTS_URL` replaces the hub by a mirror with the same layout."""
        base = os.environ.get("JAXAD_WEIGHTS_URL") or HUB
        return f"{base.rstrip('/')}/timm/{self.name}/resolve/main/model.safetensors" if self.official else None


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("pdn_small", official=False),
        Entry("efficientad_small", official=False),
        Entry("efficientad_medium", official=False),
        *(Entry(f"patch{size}", official=False) for size in (17, 33, 65)),
        Entry("resnet18.tv_in1k", sha256="694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81"),
        Entry("resnet34.tv_in1k"),
        Entry("resnet50.tv_in1k", sha256="5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888"),
        Entry("resnet50.caffe_in1k", official=False, normalization=CAFFE, stride_in_1x1=True),
        Entry("resnet101.tv_in1k"),
        Entry("resnet101.caffe_in1k", official=False, normalization=CAFFE, stride_in_1x1=True),
        Entry("resnet152.tv_in1k"),
        Entry("resnet152.caffe_in1k", official=False, normalization=CAFFE, stride_in_1x1=True),
        Entry("wide_resnet50_2.tv_in1k", sha256="df6fb6c4824769769de18e14088475fd6ee94236849aa4e5d8022ba9d9a9a16c"),
        Entry("wide_resnet50_2.racm_in1k"),
        Entry("wide_resnet101_2.tv_in1k"),
        *(Entry(f"vgg{depth}{norm}.tv_in1k") for norm in ("", "_bn") for depth in (11, 13, 16, 19)),
        Entry("efficientnet_b0.ra_in1k"),
        Entry("efficientnet_b1.ft_in1k"),
        Entry("efficientnet_b2.ra_in1k"),
        Entry("efficientnet_b3.ra2_in1k"),
        Entry("efficientnet_b4.ra2_in1k"),
        Entry("efficientnet_b5.sw_in12k_ft_in1k"),
        Entry("efficientnet_b6.tv_in1k", official=False),
        Entry("efficientnet_b7.tv_in1k", official=False),
        Entry("tf_efficientnet_b0.aa_in1k"),
        Entry("tf_efficientnet_b1.aa_in1k"),
        Entry("tf_efficientnet_b2.aa_in1k", sha256="08d7bd5d858873cb1a829f51c01811c75117665b1de91c215acbcf836a23a5c9"),
        *(Entry(f"tf_efficientnet_b{i}.aa_in1k") for i in range(3, 8)),
        *(Entry(f"tf_efficientnet_b{i}.ns_jft_in1k") for i in range(8)),
        *(Entry(f"deit_{size}_patch16_224.fb_in1k") for size in ("tiny", "small", "base")),
        *(Entry(f"deit_{size}_distilled_patch16_224.fb_in1k") for size in ("tiny", "small", "base")),
        Entry("deit_base_patch16_384.fb_in1k"),
        Entry("deit_base_distilled_patch16_384.fb_in1k"),
        *(Entry(f"cait_{size}_224.fb_dist_in1k") for size in ("xxs24", "xxs36", "s24")),
        *(Entry(f"cait_{size}_384.fb_dist_in1k") for size in ("xxs24", "xxs36", "xs24", "s24", "s36", "m36")),
        Entry("cait_m48_448.fb_dist_in1k"),
    )
}
"""The entries by full name. The plain name of an architecture means its first entry."""
PLAIN = {entry.architecture: entry for entry in reversed(ENTRIES.values())}


def lookup(name: str) -> Entry:
    """The entry of a full name (`resnet50.tv_in1k`) or of a plain one (`resnet50`).

    Raises:
        ValueError: There is none; the message names similar ones.
    """
    entry = ENTRIES.get(name) or PLAIN.get(name)
    if entry is None:
        known = [*PLAIN, *ENTRIES]
        similar = difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"known are {', '.join(sorted(PLAIN))}"
        raise ValueError(f"no backbone is called {name!r}: {hint}")
    return entry
