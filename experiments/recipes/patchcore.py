"""PatchCore, arXiv:2106.08265, with the paper's 10 % coreset.

    python -m experiments.run patchcore_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run patchcore_pillqc --data PILLQC_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run patchcore_demo --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run patchcore_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run patchcore_mtd_embedded --data MTD_FOLDER

On two CPU cores MTD takes about 20 minutes and 8 GB, the others a few minutes.
"""

from experiments.recipes import BOTTLE, MTD, RESNET50, Recipe, by_tile, published

EMBEDDED = "The embedded backbone, distilled from the ResNet-50 of the recipe of the same name without _embedded."
TILES = (
    published("paper, WRN-50", image_AUROC=0.979)
    | published("IM-IAD, WRN-50, 256 px", image_AP=0.988, pixel_AUROC=0.836, pixel_AP=0.303)
    | published("AnomalyNCD, backbone not stated", pixel_AUPRO=0.729)
)

RECIPES = {
    "patchcore_mtd": Recipe(
        "patchcore",
        backbone=RESNET50,
        published=TILES,
        **MTD,
    ),
    "patchcore_bottle": Recipe(
        "patchcore",
        backbone="resnet18.tv_in1k",
        published=published("paper, WRN-50, 224 px", image_AUROC=1.0, pixel_AUROC=0.986, pixel_AUPRO=0.961)
        | published("DeSTSeg's paper, official weights", pixel_AP=0.801),
        **BOTTLE,
    ),
    "patchcore_pillqc": Recipe("patchcore", "pillqc", RESNET50),
    "patchcore_demo": Recipe("patchcore", "demo", RESNET50),
    "patchcore_mtd_embedded": Recipe("patchcore", backbone="pdn_small", published=TILES, notes=EMBEDDED, **MTD),
    "patchcore_pillqc_embedded": Recipe("patchcore", "pillqc", "pdn_small", notes=EMBEDDED),
    "patchcore_demo_embedded": Recipe("patchcore", "demo", "pdn_small", notes=EMBEDDED),
}
RECIPES |= by_tile(RECIPES, "patchcore_mtd", "patchcore_mtd_embedded")
