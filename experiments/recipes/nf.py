"""NF on embeddings, arXiv:2006.08545: a RealNVP of 8 couplings on pooled features; the paper tests no defects.

    python -m experiments.run nf_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run nf_mtd nf_pillqc --data FOLDER --weights resnet50.caffe_in1k.safetensors

The paper's own question, about foreign images and flows on pixels, is that of experiments/studies/nf_ood.py.
"""

from experiments.recipes import MTD, RESNET50, Recipe, by_tile

LAYERS = {"layers": ("layer1", "layer2", "layer3")}
NOTES = "A flow on the pooled features that Mahalanobis AD models by a Gaussian."

RECIPES = {
    "nf_bottle": Recipe(
        "nf",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={**LAYERS, "epochs": 60, "learning_rate": 1e-3},
        seeds=(0, 1, 2),
        notes=NOTES,
    ),
    "nf_mtd": Recipe(
        "nf",
        backbone=RESNET50,
        hyperparameters={**LAYERS, "epochs": 20, "learning_rate": 1e-3},
        seeds=(0, 1, 2),
        notes=NOTES,
        **MTD,
    ),
    "nf_pillqc": Recipe(
        "nf",
        "pillqc",
        RESNET50,
        hyperparameters={**LAYERS, "epochs": 100, "learning_rate": 1e-3},
        seeds=(0, 1, 2),
        notes=NOTES,
    ),
    "nf_demo": Recipe("nf", "demo", RESNET50, {**LAYERS, "epochs": 100, "learning_rate": 1e-3}, notes=NOTES),
}
RECIPES |= by_tile(RECIPES, "nf_mtd")
