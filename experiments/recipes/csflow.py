"""CS-Flow, arXiv:2110.02855: 4 cross-scale couplings, Adam 2e-4, gradients clipped at 1.

    python experiments/run.py csflow_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors

The published recipe is an EfficientNet-B5 at 768 px, 1,024 hidden channels and 240 epochs; what is here is what two CPU
cores can do. The last epoch counts, whatever the test images say.
"""

from recipes import Recipe, published

RECIPES = {
    "csflow_bottle": Recipe(
        "csflow",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"hidden": 128, "epochs": 12},
        published=published("anomalib, EfficientNet-B5, 256 px, mean of all classes", image_AUROC=0.972),
        notes="128 hidden channels and 12 epochs instead of 1,024 and 240.",
    ),
}
