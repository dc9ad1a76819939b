"""CFA, arXiv:2206.04325: 30 epochs of 4 images, AdamW with AMSGrad at 1e-3.

    python -m experiments.run cfa_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run cfa_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run cfa_mtd_all --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run cfa_demo --data demo --weights resnet50.caffe_in1k.safetensors

`feature_scale` makes the patch features of these weights deviate about as much as a ResNet-18's on normal images. The
last epoch counts, whatever the test images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, by_tile, published

SMALL = {"layers": ("layer2", "layer3"), "gamma_d": 4, "epochs": 10}
NOTES = "A ResNet-50's layers 2 and 3, 160 px, a quarter of the channels (gamma_d) and 10 epochs."
BOTTLE = (
    published("official README, WRN-50, 224 px, best epoch", image_AUROC=1.0, pixel_AUROC=0.989)
    | published("IM-IAD, backbone not stated, 256 px", pixel_AP=0.726)
    | published("anomalib, ResNet-18, 256 px, best epoch", pixel_AUPRO=0.94)
)
IM_IAD = published(
    "IM-IAD, backbone not stated, 256 px",
    image_AUROC=0.913,
    image_AP=0.959,
    pixel_AUROC=0.731,
    pixel_AP=0.246,
    pixel_AUPRO=0.528,
)

RECIPES = {
    "cfa_bottle": Recipe(
        "cfa",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        published=BOTTLE,
        notes="A ResNet-18 and 256 px instead of a WRN-50 and 224 px.",
    ),
    "cfa_bottle_10_epochs": Recipe(
        "cfa",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"epochs": 10},
        published=BOTTLE,
        notes="A ResNet-18, 256 px and 10 epochs instead of a WRN-50, 224 px and 30.",
    ),
    "cfa_mtd": Recipe(
        "cfa",
        backbone=RESNET50,
        image_size=224,
        hyperparameters=SMALL | {"epochs": 30},
        seeds=(0, 1, 2),
        published=IM_IAD,
        notes="A ResNet-50's layers 2 and 3, 224 px, a quarter of the channels (gamma_d).",
        **MTD,
    ),
    "cfa_mtd_all": Recipe(
        "cfa",
        backbone=RESNET50,
        image_size=224,
        hyperparameters={"layers": SMALL["layers"], "feature_scale": 0.25},
        seeds=(0, 1, 2),
        published=IM_IAD,
        notes="A ResNet-50's layers 2 and 3, 224 px.",
        **MTD,
    ),
    "cfa_pillqc": Recipe("cfa", "pillqc", RESNET50, SMALL, image_size=160, notes=NOTES),
    "cfa_demo": Recipe("cfa", "demo", RESNET50, SMALL, image_size=160, notes=NOTES),
}
RECIPES |= by_tile(RECIPES, "cfa_mtd")
