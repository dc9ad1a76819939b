"""EfficientAD, arXiv:2303.14535: 70,000 steps of one image, Adam 1e-4, a penalty on photographs of ImageNet.

    python -m experiments.run efficientad_bottle --data BOTTLE_FOLDER --auxiliary IMAGENET_FOLDER
    python -m experiments.run efficientad_mtd --data MTD_FOLDER --auxiliary IMAGENET_FOLDER
    python -m experiments.run efficientad_demo --data demo --auxiliary IMAGENET_FOLDER

The teacher is the embedded `pdn_small`, distilled from a ResNet-50; EfficientAD-S's own weights are not available. Two
CPU cores can afford few steps, so the learning rate is higher. `efficientad_mtd_paper` has the published steps, for a
GPU; it has not been run. The last step counts, whatever the test images say.
"""

from experiments.recipes import MTD, Recipe, published

FEW = {"learning_rate": 1e-3}
TEACHER = "pdn_small"
TILES = published("AnomalyNCD, size of EfficientAD not stated", pixel_AUPRO=0.731)

RECIPES = {
    "efficientad_bottle": Recipe(
        "efficientad",
        "mvtec_bottle",
        backbone=TEACHER,
        image_size=256,
        hyperparameters=FEW | {"epochs": 5},
        published=published("anomalib, EfficientAD-S", image_AUROC=1.0)
        | published("rximg/EfficientAD, EfficientAD-S", pixel_AUROC=0.988, pixel_AP=0.783)
        | published("nelson1425/EfficientAD, EfficientAD-S", pixel_AUPRO=0.952),
        notes="The embedded teacher; 5 epochs at 1e-3 instead of 70,000 steps at 1e-4.",
        smoke_backbone=TEACHER,
    ),
    "efficientad_mtd": Recipe(
        "efficientad",
        backbone=TEACHER,
        image_size=256,
        hyperparameters=FEW | {"epochs": 3},
        seeds=(0, 1, 2),
        published=TILES,
        notes="The embedded teacher, 3 epochs at 1e-3.",
        smoke_backbone=TEACHER,
        **MTD,
    ),
    "efficientad_mtd_5_epochs": Recipe(
        "efficientad",
        backbone=TEACHER,
        image_size=256,
        hyperparameters={"learning_rate": 3e-4, "epochs": 5},
        published=TILES,
        notes="The embedded teacher, 5 epochs at the rate that held-out tiles prefer to 1e-4, one seed.",
        smoke_backbone=TEACHER,
        **MTD,
    ),
    "efficientad_mtd_paper": Recipe(
        "efficientad",
        backbone=TEACHER,
        image_size=256,
        hyperparameters={"epochs": 102},
        seeds=(0, 1, 2),
        published=TILES,
        notes="The embedded teacher, the published 70,000 steps.",
        smoke_backbone=TEACHER,
        **MTD,
    ),
    "efficientad_pillqc": Recipe(
        "efficientad",
        "pillqc",
        TEACHER,
        FEW | {"epochs": 10},
        image_size=256,
        notes="The embedded teacher, 10 epochs at 1e-3.",
        smoke_backbone=TEACHER,
    ),
    "efficientad_demo": Recipe(
        "efficientad",
        "demo",
        TEACHER,
        FEW | {"epochs": 12},
        image_size=256,
        notes="The embedded teacher, 12 epochs at 1e-3.",
        smoke_backbone=TEACHER,
    ),
}
