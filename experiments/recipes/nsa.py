"""NSA, arXiv:2109.15222: a ResNet-18 from scratch, 224 px, Adam from 1e-3 to 1e-6, 320 epochs of 64 images.

    python -m experiments.run nsa_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run nsa_mtd --data MTD_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run nsa_demo --data demo --weights resnet18.tv_in1k.safetensors

Of the weights, only the normalization of images is used. The last epoch counts, whatever the test images say.
"""

from experiments.recipes import MTD, Recipe, published

ENCODER = "resnet18.tv_in1k"
FEW = {"train_batch_size": 8, "shift": 2}
TEXTURES = {
    "degrees": 0.0,
    "on_foreground": False,
    "mixed": True,
    "mirror": True,
    "pieces": 4,
    "logistic": (1 / 3, 7.0),
    "resize": (0.5, 2.0),
}
"""The reference's settings for most textures."""
SMALL = FEW | TEXTURES | {"epochs": 20}
NOTES = "128 px, the reference's settings of textures, 20 epochs of 8 images a step."
PILLS = "128 px, the reference's settings of bottle without rotations, 20 epochs of 8 images a step."

RECIPES = {
    "nsa_bottle": Recipe(
        "nsa",
        "mvtec_bottle",
        backbone=ENCODER,
        image_size=128,
        hyperparameters=FEW | {"epochs": 40},
        published=published(
            "official notebook, logistic labels, 224 px", image_AUROC=0.977, pixel_AUROC=0.983, pixel_AUPRO=0.929
        ),
        notes="128 px, 40 epochs of 8 images a step instead of 224 px, 320 of 64.",
    ),
    "nsa_bottle_intensity": Recipe(
        "nsa",
        "mvtec_bottle",
        backbone=ENCODER,
        image_size=128,
        hyperparameters=FEW | {"labels": "intensity", "epochs": 40},
        published=published(
            "official notebook, continuous labels, 224 px", image_AUROC=0.975, pixel_AUROC=0.973, pixel_AUPRO=0.899
        ),
        notes="Levels of change are learned, by squared error. 128 px, 40 epochs of 8 images a step.",
    ),
    "nsa_mtd": Recipe(
        "nsa",
        backbone=ENCODER,
        image_size=128,
        hyperparameters=FEW | TEXTURES | {"epochs": 4},
        seeds=(0, 1, 2),
        notes="128 px, the reference's settings of textures, 4 epochs of 8 images a step.",
        **MTD,
    ),
    "nsa_pillqc": Recipe("nsa", "pillqc", ENCODER, FEW | {"degrees": 0.0, "epochs": 20}, image_size=128, notes=PILLS),
    "nsa_demo": Recipe("nsa", "demo", ENCODER, SMALL, image_size=128, notes=NOTES),
}
