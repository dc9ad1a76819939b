"""FastFlow, arXiv:2111.07677, as gathierry/FastFlow has it for a ResNet-18: 8 couplings of 3x3 convolutions a level.

    python experiments/run.py fastflow_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors

The published budget is 500 epochs of 32 images; those here are what two CPU cores can do in minutes. The last epoch
counts, whatever the test images say.
"""

from recipes import Recipe, published

RECIPES = {
    "fastflow_bottle": Recipe(
        "fastflow",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"conv3x3_only": True, "epochs": 12, "batch_size": 16},
        published=published("anomalib, ResNet-18, 256 px", image_AUROC=1.0, pixel_AUROC=0.983),
        notes="12 epochs of 16 images a step (156 steps) instead of 500 of 32.",
    ),
}
