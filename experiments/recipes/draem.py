"""DRAEM, arXiv:2108.07610: 256 px, networks of 128 and 64 channels, 700 epochs of 8 images, Adam 1e-4, textures of DTD.

    python -m experiments.run draem_bottle --data BOTTLE_FOLDER --auxiliary DTD_FOLDER
    python -m experiments.run draem_mtd --data MTD_FOLDER --auxiliary DTD_FOLDER
    python -m experiments.run draem_demo --data demo --auxiliary DTD_FOLDER

`draem_bottle_paper` and `draem_mtd_paper` are the published setting, for a GPU; they have not been run. The last epoch
counts, whatever the test images say.
"""

from experiments.recipes import MTD, Recipe, published

SMALL = {"reconstructive_width": 16, "discriminative_width": 16, "train_batch_size": 4, "learning_rate": 1e-3}
NOTES = "128 px, networks of 16 channels, 20 epochs of 4 images at 1e-3."
TILES = published(
    "IM-IAD, 256 px", image_AUROC=0.782, image_AP=0.885, pixel_AUROC=0.66, pixel_AP=0.148, pixel_AUPRO=0.541
)
BOTTLE = published("paper, 256 px", image_AUROC=0.992, pixel_AUROC=0.991, pixel_AP=0.865) | published(
    "IM-IAD, 256 px", pixel_AUPRO=0.964
)

RECIPES = {
    "draem_bottle": Recipe(
        "draem",
        "mvtec_bottle",
        backbone=None,
        image_size=128,
        hyperparameters=SMALL | {"epochs": 40},
        published=BOTTLE,
        notes="128 px, 16 channels, 40 epochs of 4 images at 1e-3; paper: 256 px, 128 and 64, 700 of 8 at 1e-4.",
        smoke_backbone="pdn_small",
    ),
    "draem_bottle_paper": Recipe(
        "draem", "mvtec_bottle", None, image_size=256, published=BOTTLE, notes="The published setting."
    ),
    "draem_mtd": Recipe(
        "draem",
        backbone=None,
        image_size=128,
        hyperparameters=SMALL | {"epochs": 20},
        seeds=(0, 1, 2),
        published=TILES,
        notes=NOTES,
        smoke_backbone="pdn_small",
        **MTD,
    ),
    "draem_mtd_paper": Recipe(
        "draem",
        backbone=None,
        image_size=256,
        hyperparameters={"epochs": 192},
        seeds=(0, 1, 2),
        published=TILES,
        notes="The published setting, as many steps as 700 epochs of bottle.",
        **MTD,
    ),
    "draem_pillqc": Recipe(
        "draem", "pillqc", None, SMALL | {"epochs": 20}, image_size=128, notes=NOTES, smoke_backbone="pdn_small"
    ),
    "draem_pillqc_sspcab": Recipe(
        "draem",
        "pillqc",
        None,
        SMALL | {"epochs": 20, "sspcab": True},
        image_size=128,
        notes=f"With SSPCAB. {NOTES}",
        smoke_backbone="pdn_small",
    ),
    "draem_demo": Recipe(
        "draem",
        "demo",
        None,
        SMALL | {"epochs": 100},
        image_size=128,
        notes="128 px, networks of 16 channels, 100 epochs of 4 images at 1e-3.",
        smoke_backbone="pdn_small",
    ),
}
