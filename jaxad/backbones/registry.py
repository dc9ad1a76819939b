"""The registered weights: name, sha256 of the official file, and how images are normalized for them."""

import contextlib
import difflib
import os
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

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
    """The sha256 of the official file; None where it is not known here, so that only the server can state one."""
    normalization: Normalization = IMAGENET
    stride_in_1x1: bool = False
    """The original ResNet (v1): the stride of a stage sits in its first 1x1 convolution."""

    @property
    def architecture(self) -> str:
        """The name without the training recipe."""
        return self.name.partition(".")[0]

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses or paths where the file can be.

        `JAXAD_WEIGHTS_URL` replaces the hub by a mirror or a local folder, with the hub's layout or all files in one
        place. Raises ValueError if it is neither.
        """
        base, paths = os.environ.get("JAXAD_WEIGHTS_URL"), (f"timm/{self.name}/resolve/main/model.safetensors",)
        if not base:
            return (f"{HUB}/{paths[0]}",) if self.official else ()
        parts = None
        with contextlib.suppress(ValueError):
            parts = urlsplit(base if "://" in base else "")
        if parts and parts.scheme == "file":
            base = unquote(parts.path)
        elif not parts or (parts.scheme and (parts.scheme not in ("http", "https") or not parts.netloc)):
            raise ValueError(f"JAXAD_WEIGHTS_URL must be an address with http(s) or a folder, got {base}")
        return tuple(f"{os.path.expanduser(base).rstrip('/')}/{path}" for path in (*paths, f"{self.name}.safetensors"))

    @property
    def url(self) -> str | None:
        """The first of `urls`."""
        return next(iter(self.urls), None)


SHA256 = {
    "resnet18.tv_in1k": "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
    "resnet34.tv_in1k": "0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235",
    "resnet50.tv_in1k": "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
    "wide_resnet50_2.tv_in1k": "df6fb6c4824769769de18e14088475fd6ee94236849aa4e5d8022ba9d9a9a16c",
    "vgg11.tv_in1k": "682c023808812148d4e60c76d80ad83dbeaf5d50eb1a952a0b836895003151e5",
    "vgg16.tv_in1k": "57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8",
    "efficientnet_b0.ra_in1k": "d569899762ea9b1384ee07f4af64805cf8caa1c55f9253ebb1080dc40e87a2cd",
    "efficientnet_b4.ra2_in1k": "8030f9c929ed71a06728db4b61323960e573b463e68f310bd1bfb31ed62cbf91",
    "tf_efficientnet_b2.aa_in1k": "08d7bd5d858873cb1a829f51c01811c75117665b1de91c215acbcf836a23a5c9",
    "deit_base_distilled_patch16_224.fb_in1k": "ccc9d1bbeede1fc8609a7a7482773a35057e9f38035b9b804bced9126c5a70dc",
    "deit_base_distilled_patch16_384.fb_in1k": "f739dfae2bf3fdd4ef415fdb015966c515b9adca7de703a08365fb349fea82ca",
    "cait_s24_224.fb_dist_in1k": "ec4c0b0e1851c9b1850709caf5cbbcb0ecf121efb4317eedd99ceb0e0e0f4ddb",
    "cait_m48_448.fb_dist_in1k": "460cbe2667f0208bd39ea38f981e5d83b41bfec33ed8cefab3460ae65f4788ed",
}
"""The sha256 of official files, as far as published records of them agree; `fetch` takes no other for these."""

ENTRIES = {
    entry.name: entry._replace(sha256=SHA256.get(entry.name))
    for entry in (
        Entry("pdn_small", official=False),
        Entry("efficientad_small", official=False),
        Entry("efficientad_medium", official=False),
        *(Entry(f"patch{size}", official=False) for size in (17, 33, 65)),
        Entry("resnet18.tv_in1k"),
        Entry("resnet34.tv_in1k"),
        Entry("resnet50.tv_in1k"),
        Entry("resnet50.caffe_in1k", official=False, normalization=CAFFE, stride_in_1x1=True),
        Entry("resnet101.tv_in1k"),
        Entry("resnet101.caffe_in1k", official=False, normalization=CAFFE, stride_in_1x1=True),
        Entry("resnet152.tv_in1k"),
        Entry("resnet152.caffe_in1k", official=False, normalization=CAFFE, stride_in_1x1=True),
        Entry("wide_resnet50_2.tv_in1k"),
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
        Entry("tf_efficientnet_b2.aa_in1k"),
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
