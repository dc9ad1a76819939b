"""TFDS builders of public inspection data sets, whose files have to be downloaded by hand.

`prepare("mvtec_ad", "path/to/mvtec_ad")` writes array_record files that `open_data("tfds:mvtec_ad")` reads. Neither
needs TensorFlow. Importing this module registers the builders with TFDS, so `tfds.builder("mvtec_ad")` works, too. The
cards in the folder `data/` of the repository say where to download each data set.
"""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxad.data import folders, images
from jaxad.data.checks import check_mask_size
from jaxad.data.images import MaskThreshold
from jaxad.data.records import GOOD, Record


class InspectionBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base class: examples with image, mask, label, defect and category, read by one of `folders.LAYOUTS`.

    Masks are stored as 0 or 255. The masks of normal images are empty.
    """

    VERSION = tfds.core.Version("1.0.0")
    LAYOUT: ClassVar[str] = "mvtec"
    """How the files are arranged: a key of `folders.LAYOUTS`."""
    FOLDER: ClassVar[str]
    """The folder inside TFDS's manual directory. The manual directory may also be this folder."""
    HOMEPAGE: ClassVar[str]
    CHANNELS: ClassVar[int] = 3
    MASK_THRESHOLD: ClassVar[MaskThreshold] = None
    """As `mask_threshold` of `open_data`."""

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:
        """Tells the user where to put the files."""
        return f"Download the data set from {self.HOMEPAGE} and unpack it as {self.FOLDER}."

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, self.CHANNELS)),
                "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[GOOD, "anomalous"]),
                "defect": tfds.features.Text(),
                "category": tfds.features.Text(),
                "id": tfds.features.Text(),
            }
        )
        return self.dataset_info_from_configs(features=features, homepage=self.HOMEPAGE, description=self.__doc__)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        root = Path(dl_manager.manual_dir)
        root = root / self.FOLDER if (root / self.FOLDER).is_dir() else root
        records = list(folders.read(root, self.LAYOUT, self.MASK_THRESHOLD)[1])
        if not records:
            raise ValueError(f"no images of {self.name} in {root}: expected the {self.LAYOUT} layout")
        if unlabeled := [record.path for record in records if record.label < 0]:
            raise ValueError(f"every image of {self.name} needs a label, got none for {unlabeled[0]}")
        if lacking := [record.path for record in records if record.label and not record.masks]:
            raise ValueError(
                f"every anomalous image of {self.name} needs a mask, but {len(lacking)} have none, the first is "
                f"{lacking[0]}: complete the masks, or open the folder itself"
            )
        images.in_threads(check_mask_size, records)
        if note := folders.unread(root, self.LAYOUT, records):
            warnings.warn(note, stacklevel=2)
        return {
            split: self._generate_examples(root, [record for record in records if record.split == split])
            for split in ("train", "test")
        }

    def _generate_examples(self, root: Path, records: list[Record]) -> Iterator[tuple[str, dict[str, Any]]]:
        for record in records:
            mask = np.zeros(images.size_of(record.image, record.path), np.bool_)
            for source in record.masks:
                mask |= images.read_mask(source, f"the mask of {record.path}", threshold=self.MASK_THRESHOLD)
            encoded = io.BytesIO()
            Image.fromarray(mask).convert("L").save(encoded, "png")
            key = Path(record.path).relative_to(root).as_posix()
            yield (
                key,
                {
                    "image": record.path,
                    "mask": encoded.getvalue(),
                    "label": record.label,
                    "defect": record.defect,
                    "category": record.category,
                    "id": key,
                },
            )


class MvtecAd(InspectionBuilder):
    """MVTec AD: 15 textures and objects, 5354 images."""

    FOLDER = "mvtec_ad"
    HOMEPAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad"


class Visa(InspectionBuilder):
    """VisA: 12 objects, 10821 images, in the one-class split of its authors."""

    LAYOUT = "visa"
    FOLDER = "VisA"
    HOMEPAGE = "https://github.com/amazon-science/spot-diff"


class Btad(InspectionBuilder):
    """BTAD: 3 industrial products, 2540 images."""

    FOLDER = "BTech_Dataset_transformed"
    HOMEPAGE = "https://github.com/pankajmishra000/VT-ADL"


class Mpdd(InspectionBuilder):
    """MPDD: 6 kinds of painted metal parts, 1346 images."""

    FOLDER = "MPDD"
    HOMEPAGE = "https://github.com/stepanje/MPDD"


class Ksdd2(InspectionBuilder):
    """KolektorSDD2: one surface, 3335 images; its training split has defects, which one-class methods drop."""

    LAYOUT = "ksdd2"
    FOLDER = "KolektorSDD2"
    HOMEPAGE = "https://www.vicos.si/resources/kolektorsdd2"


class Mtd(InspectionBuilder):
    """Magnetic tile defects: 1344 gray images in DifferNet's split, masks thresholded at 127."""

    LAYOUT = "mtd"
    FOLDER = "mtd"
    HOMEPAGE = "https://github.com/abin24/Magnetic-tile-defect-datasets."
    CHANNELS = 1
    MASK_THRESHOLD = 127


def prepare(name: str, folder: str | Path, data_dir: str | Path | None = None) -> Path:
    """Prepares one of these data sets, unless that has been done before.

    Args:
        name: mvtec_ad, visa, btad, mpdd, ksdd2 or mtd.
        folder: the unpacked data set.
        data_dir: where to write; None for TFDS's default folder.

    Returns:
        The folder of the prepared data set.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such data set, the folder has no images, or an anomalous image has no mask.
    """
    classes = {builder.name: builder for builder in InspectionBuilder.__subclasses__()}
    if name not in classes:
        raise ValueError(f"no builder {name!r}: choose one of {', '.join(classes)}")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    builder = classes[name](data_dir=data_dir)
    config = tfds.download.DownloadConfig(manual_dir=folder)
    builder.download_and_prepare(download_config=config, file_format="array_record")
    return Path(builder.data_dir)
