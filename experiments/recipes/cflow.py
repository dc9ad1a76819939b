"""CFLOW-AD, arXiv:2107.12571: 8 couplings a level, 256 positions a step, cosine learning rate from 2e-4.

    python -m experiments.run cflow_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run cflow_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run cflow_demo --data demo --weights resnet50.caffe_in1k.safetensors

The published budget is 200 epochs; the recipes here are for two CPU cores. The last epoch counts, whatever the test
images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, by_tile, published

SMALL = {"layers": ("layer3",), "coupling_blocks": 4, "epochs": 12, "train_batch_size": 8}
NOTES = "160 px, layer 3 alone, 4 couplings and 12 epochs of 8 images a step."

RECIPES = {
    "cflow_bottle": Recipe(
        "cflow",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"layers": ("layer2", "layer3"), "epochs": 8},
        published=published(
            "official README, WRN-50, 512 px, best epoch", image_AUROC=1.0, pixel_AUROC=0.99, pixel_AUPRO=0.968
        ),
        notes="Layers 2 and 3 (the deepest of the weights at hand) and 8 epochs instead of layers 2 to 4 and 200.",
    ),
    "cflow_mtd": Recipe(
        "cflow",
        backbone=RESNET50,
        image_size=160,
        hyperparameters={"layers": ("layer3",), "coupling_blocks": 4, "epochs": 4, "learning_rate": 2e-3},
        seeds=(0, 1, 2),
        notes="160 px, layer 3 alone, 4 couplings and 4 epochs at 2e-3 instead of 256 px and more, 3 layers, 8 and 200 "
        "at 2e-4; the rate of the lowest loss on held-out normal images (select_cflow_mtd.json).",
        **MTD,
    ),
    "cflow_pillqc": Recipe("cflow", "pillqc", RESNET50, SMALL, image_size=160, notes=NOTES),
    "cflow_demo": Recipe("cflow", "demo", RESNET50, SMALL, image_size=160, notes=NOTES),
}
RECIPES |= by_tile(RECIPES, "cflow_mtd")
