"""STFPM, arXiv:2103.04257: a ResNet-18's layers 1 to 3, SGD at 0.4, 100 epochs of 32 images.

    python -m experiments.run stfpm_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run stfpm_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run stfpm_demo --data demo --weights resnet50.caffe_in1k.safetensors

The last epoch counts, whatever the test images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, published

SMALL = {"epochs": 10, "train_batch_size": 8}
NOTES = "A ResNet-50, 128 px, 10 epochs of 8 images a step."

RECIPES = {
    "stfpm_bottle": Recipe(
        "stfpm",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"epochs": 20, "train_batch_size": 8},
        published=published("official README, ResNet-18", image_AUROC=1.0, pixel_AUROC=0.988, pixel_AUPRO=0.959)
        | published("DeSTSeg's paper, official weights", pixel_AP=0.806),
        notes="20 epochs of 8 images a step instead of 100 of 32.",
    ),
    "stfpm_mtd": Recipe(
        "stfpm",
        backbone=RESNET50,
        image_size=128,
        hyperparameters=SMALL | {"epochs": 4},
        seeds=(0, 1, 2),
        published=published(
            "IM-IAD, ResNet-18, 256 px",
            image_AUROC=0.729,
            image_AP=0.847,
            pixel_AUROC=0.642,
            pixel_AP=0.102,
            pixel_AUPRO=0.478,
        ),
        notes="A ResNet-50, 128 px, 4 epochs of 8 images a step.",
        **MTD,
    ),
    "stfpm_pillqc": Recipe("stfpm", "pillqc", RESNET50, SMALL, image_size=128, notes=NOTES),
    "stfpm_demo": Recipe(
        "stfpm",
        "demo",
        RESNET50,
        SMALL | {"epochs": 60},
        image_size=128,
        notes="A ResNet-50, 128 px, 60 epochs of 8 images a step.",
    ),
}
