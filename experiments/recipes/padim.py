"""PaDiM, arXiv:2011.08785: 100 random channels of a ResNet-18, 550 of a ResNet-50.

    python -m experiments.run padim_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run padim_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors

MTD takes about 12 minutes and 17 GB on two CPU cores (3,136 covariances of 550 x 550 are 3.8 GB).
"""

from experiments.recipes import BOTTLE, MTD, RESNET50, Recipe, by_tile, published

PUBLISHED = published(
    "IM-IAD, ResNet-18, 256 px", image_AUROC=0.994, pixel_AUROC=0.984, pixel_AP=0.73, pixel_AUPRO=0.95
)

RECIPES = {
    "padim_mtd": Recipe(
        "padim",
        backbone=RESNET50,
        published=published(
            "IM-IAD, ResNet-18, 256 px", image_AUROC=0.885, image_AP=0.944, pixel_AUROC=0.768, pixel_AUPRO=0.798
        ),
        notes="IM-IAD's pixel_AUPRO is also its mean over BTAD, and its pixel_AP, left out here, is its pixel_AUROC.",
        **MTD,
    ),
    "padim_bottle": Recipe(
        "padim",
        backbone="resnet18.tv_in1k",
        seeds=(0, 1, 2),
        published=PUBLISHED,
        notes="The crop takes the easy border away from the pixel AUROC: see padim_bottle_256 for the same without it, "
        "and padim_bottle_all for what the random choice of 100 channels costs.",
        **BOTTLE,
    ),
    "padim_bottle_all": Recipe(
        "padim",
        backbone="resnet18.tv_in1k",
        hyperparameters={"n_features": "all"},
        published=PUBLISHED,
        notes="All 448 channels instead of 100 random ones.",
        **BOTTLE,
    ),
    "padim_bottle_256": Recipe(
        "padim",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        seeds=(0, 1, 2),
        published=PUBLISHED,
        notes="anomalib's protocol: 256 px without the crop, whose easy border lifts the pixel AUROC.",
    ),
    "padim_pillqc": Recipe("padim", "pillqc", RESNET50),
}
RECIPES |= by_tile(RECIPES, "padim_mtd")
