"""CS-Flow, arXiv:2110.02855: 4 cross-scale couplings, gradients clipped at 1.

    python -m experiments.run csflow_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run csflow_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run csflow_demo --data demo --weights resnet50.caffe_in1k.safetensors

The published recipe is an EfficientNet-B5 at 768 px, 1,024 hidden channels, and 240 epochs of 16 images a step with
Adam at 2e-4; the recipes here are for two CPU cores. The networks of the couplings start with a gain of zero, which a
step of Adam moves by at most the learning rate: with so few steps, they need a higher rate and smaller batches. The
last epoch counts, whatever the test images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, by_tile, published

SHORT = {"train_batch_size": 4, "learning_rate": 1e-3}
SMALL = {"layer": "layer3", "hidden": 32, "epochs": 15, **SHORT}
NOTES = "128 px, 32 hidden channels, 15 epochs of 4 images a step at 1e-3."

RECIPES = {
    "csflow_bottle": Recipe(
        "csflow",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"layer": "layer3", "hidden": 64, "epochs": 12, **SHORT},
        published=published("anomalib, EfficientNet-B5, 768 px, best epoch", image_AUROC=1.0, pixel_AUROC=0.889),
        notes="64 hidden channels, 12 epochs of 4 images a step at 1e-3.",
    ),
    "csflow_mtd": Recipe(
        "csflow",
        backbone=RESNET50,
        image_size=128,
        hyperparameters={"layer": "layer3", "hidden": 32, "epochs": 3, **SHORT},
        seeds=(0, 1, 2),
        published=published("paper, EfficientNet-B5, 768 px", image_AUROC=0.993)
        | published("IM-IAD, EfficientNet-B5, 768 px", image_AP=0.945),
        notes="128 px, 32 hidden channels, 3 epochs of 4 images a step at 1e-3.",
        **MTD,
    ),
    "csflow_pillqc": Recipe("csflow", "pillqc", RESNET50, SMALL, image_size=128, notes=NOTES),
    "csflow_demo": Recipe("csflow", "demo", RESNET50, SMALL, image_size=128, notes=NOTES),
}
RECIPES |= by_tile(RECIPES, "csflow_mtd")
