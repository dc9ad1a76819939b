"""Uninformed Students, arXiv:1911.02357: 3 students of each of 3 patch sizes, 256 px, Adam 1e-4, one image a step.

    python -m experiments.distill.teacher --images IMAGENET_FOLDER --weights resnet18.tv_in1k.safetensors --patch 33 \
        --patches 20000 --epochs 2 --learning-rate 5e-4
    python -m experiments.run uninformed_students_bottle --data BOTTLE_FOLDER --weights patch33.safetensors
    python -m experiments.run uninformed_students_bottle_65 --data BOTTLE_FOLDER --weights patch65.safetensors
    python -m experiments.run uninformed_students_bottle_all --data BOTTLE_FOLDER --weights patch17.safetensors \
        --weights patch33.safetensors --weights patch65.safetensors
    python -m experiments.run uninformed_students_mtd --data MTD_FOLDER --weights patch33.safetensors

The authors' teachers, trained on all of ImageNet, are not available; the recipes here use teachers distilled on 20,000
patches of few photographs (distill_patch33.json; distill_patch17.json by the same command, and distill_patch65.json
with one epoch). They use one patch size, except for uninformed_students_bottle_all, and descriptions of every eighth
pixel. The last epoch counts, whatever the test images say.
"""

from experiments.recipes import MTD, Recipe, published

TEACHER = "patch33"
DESCRIPTION = "patches alone, of every eighth pixel, by a teacher distilled from a ResNet-18 on 20,000 of them"
PATCHES = f"33 px {DESCRIPTION}"
FEW = {"train_batch_size": 2, "learning_rate": 5e-4, "stride": 8}
SMALL = FEW | {"num_students": 2, "epochs": 3}
NOTES = f"{PATCHES}, 2 students, 128 px, 3 epochs of 2 images a step at 5e-4."

BOTTLE = published("DRAEM's paper", pixel_AUROC=0.978, pixel_AP=0.742)

RECIPES = {
    "uninformed_students_bottle": Recipe(
        "uninformed_students",
        "mvtec_bottle",
        backbone=TEACHER,
        image_size=128,
        hyperparameters=FEW | {"epochs": 3},
        published=BOTTLE,
        notes=f"{PATCHES}, 128 px, 3 epochs of 2 images at 5e-4 instead of 100 of 1.",
        smoke_backbone="patch17",
    ),
    "uninformed_students_bottle_17": Recipe(
        "uninformed_students",
        "mvtec_bottle",
        backbone="patch17",
        image_size=96,
        hyperparameters=SMALL | {"epochs": 1},
        published=BOTTLE,
        notes=f"17 px {DESCRIPTION}, 2 students, 96 px, 1 epoch of 2 images a step at 5e-4.",
        smoke_backbone="patch17",
    ),
    "uninformed_students_bottle_65": Recipe(
        "uninformed_students",
        "mvtec_bottle",
        backbone="patch65",
        image_size=128,
        hyperparameters=FEW | {"epochs": 3},
        published=BOTTLE,
        notes=f"65 px {DESCRIPTION}, 128 px, 3 epochs of 2 images at 5e-4 instead of 100 of 1.",
        smoke_backbone="patch17",
    ),
    "uninformed_students_bottle_all": Recipe(
        "uninformed_students",
        "mvtec_bottle",
        backbone=("patch17", "patch33", "patch65"),
        image_size=96,
        hyperparameters=SMALL | {"epochs": 1},
        published=BOTTLE,
        notes=f"17, 33 and 65 px {DESCRIPTION}, 2 students of each, 96 px, 1 epoch of 2 images a step at 5e-4.",
        smoke_backbone="patch17",
    ),
    "uninformed_students_mtd": Recipe(
        "uninformed_students",
        backbone=TEACHER,
        image_size=96,
        hyperparameters=SMALL | {"epochs": 1},
        seeds=(0, 1, 2),
        notes=f"{PATCHES}, 2 students, 96 px, 1 epoch of 2 images a step at 5e-4.",
        smoke_backbone="patch17",
        **MTD,
    ),
    "uninformed_students_pillqc": Recipe(
        "uninformed_students", "pillqc", TEACHER, SMALL, image_size=128, notes=NOTES, smoke_backbone="patch17"
    ),
    "uninformed_students_demo": Recipe(
        "uninformed_students", "demo", TEACHER, SMALL, image_size=128, notes=NOTES, smoke_backbone="patch17"
    ),
}
