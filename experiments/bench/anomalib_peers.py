"""Accuracy beside anomalib: the same photographs, weights, hyperparameters and steps, for every method that it has.

    python -m experiments.bench.anomalib_peers mtd --data MTD_FOLDER --weights resnet18.tv_in1k.safetensors
        --auxiliary TEXTURES_FOLDER --torch-python PYTHON

100 training images and at most 100 test images, half of them normal where there are enough, of 224 px (CS-Flow and
EfficientAD, which need it: 256; DRAEM, which trains longest: 128). A method that draws anything takes three seeds;
CS-Flow, EfficientAD and DRAEM take one.
`PYTHON` is an interpreter with anomalib (`pip install anomalib==2.7.0 FrEIA==0.2 safetensors`). Writes
results/anomalib_<name>.json after every method; those that are there already are kept, so that a run continues where
it was stopped. `--smoke` is the small variant for the tests, without anomalib.
"""

import json
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from safetensors.numpy import save_file

import jaxad
import jaxad.backbones
from experiments.command import RESULTS, origin, start
from jaxad.data import Dataset, Preprocess, open_data
from jaxad.driver.execution import Execution
from jaxad.driver.program import compile_seconds, cpu_seconds
from jaxad.files import read_json, write_json
from jaxad.metrics import evaluate
from jaxad.settings import Settings

IMAGES, BATCH = 100, 8
RESNET18, TEACHER = "resnet18.tv_in1k", "efficientad_small"
"""EfficientAD's teacher has random weights here, the same in both libraries."""


class Peer(NamedTuple):
    """A method with the same hyperparameters in both libraries."""

    method: str
    ours: dict[str, Any]
    theirs: dict[str, Any]
    """What differs from anomalib's defaults."""
    epochs: int | None = None
    """None: it does not train."""
    batch_size: int = BATCH
    backbone: str | None = RESNET18
    auxiliary: str | None = None
    """Anomalib's name for the folder of other photographs."""
    size: int = 224
    """Of the images."""
    seeds: tuple[int, ...] = (0, 1, 2)


RESNET = {"backbone": "resnet18"}
DEEP = {"layers": ("layer2", "layer3")}
PEERS = (
    Peer("patchcore", DEEP | {"scoring": "paper"}, RESNET | DEEP, seeds=(0,)),
    Peer("padim", {"n_features": 100}, RESNET | {"n_features": 100}),
    Peer("stfpm", {"learning_rate": BATCH * 0.4, "weight_decay": 1e-3 / BATCH}, RESNET, epochs=4),  # losses are sums
    Peer("rd4ad", {}, RESNET, epochs=2),
    Peer("cfa", {}, RESNET, epochs=2, batch_size=4),
    Peer("fastflow", {}, RESNET, epochs=4),
    Peer(
        "cflow",
        DEEP | {"coupling_blocks": 4},
        RESNET | DEEP | {"coupling_blocks": 4, "fiber_batch_size": 256, "permute_soft": True, "lr": 2e-4},
        epochs=1,
    ),
    Peer(
        "csflow",
        {"layer": "layer3", "hidden": 64, "learning_rate": 1e-3},
        {"cross_conv_hidden_channels": 64},
        epochs=2,
        batch_size=1,  # anomalib adds the log-determinants of a batch
        size=256,
        seeds=(0,),
    ),
    Peer(
        "glass",
        DEEP,
        RESNET | DEEP | {"input_shape": (224, 224), "pretrain_embed_dim": 384, "target_embed_dim": 384},
        epochs=1,
        auxiliary="anomaly_source_path",
    ),
    Peer("efficientad", {}, {}, 1, 1, TEACHER, "imagenet_dir", size=256, seeds=(0,)),
    Peer("draem", {}, {}, 1, 4, None, "dtd_dir", size=128, seeds=(0,)),
)


@dataclass
class Options:
    """Compare with anomalib."""

    name: Annotated[str, tyro.conf.Positional]
    """Of the data set, for the result."""
    data: str = "demo"
    weights: Path | None = None
    """Of a ResNet-18."""
    auxiliary: Path | None = None
    """A folder of photographs of other things."""
    torch_python: Path | None = None
    """A Python interpreter with anomalib; None: jaxad alone."""
    methods: tuple[str, ...] = ()
    """None: all."""
    mask_threshold: int = 0
    threads: int = 2
    results: Path = RESULTS
    smoke: bool = False
    """Few small images and random weights."""


def chosen(data: Dataset, n: int) -> Dataset:
    """At most n images; of a test split, half of them normal, and the rest spread over all defects."""
    normal, anomalous = (np.flatnonzero(data.labels == label) for label in (0, 1))
    if not len(anomalous):
        return data.subset(normal[np.linspace(0, len(normal) - 1, min(n, len(normal))).astype(int)])
    count = min(len(normal), n // 2)
    rows = [
        part[np.linspace(0, len(part) - 1, min(len(part), k)).astype(int)]
        for part, k in ((normal, count), (anomalous, n - count))
    ]
    return data.subset(np.sort(np.concatenate(rows)))


def measured(image: np.ndarray, pixel: np.ndarray, test: Dataset) -> dict[str, float]:
    """The metrics of one fit."""
    values = evaluate(image, test.labels, pixel, test.masks(range(len(test)))).values
    return {name: values[name] for name in ("image_AUROC", "image_AP", "pixel_AUROC", "pixel_AP") if name in values}


def fit_jaxad(peer: Peer, train: Dataset, test: Dataset, seed: int, options: Options) -> tuple[dict[str, Any], Any]:
    """Metrics and seconds of jaxad, and the channels that PaDiM has drawn."""
    training = {"epochs": peer.epochs, "train_batch_size": peer.batch_size} if peer.epochs else {}
    settings = Settings.of(
        peer.method,
        backbone=peer.backbone,
        weights=options.weights if peer.backbone == RESNET18 else (),
        auxiliary=options.auxiliary if peer.auxiliary else None,
        image_size=train.image_size,
        holdout=0,
        seed=seed,
        **training,
        **peer.ours,
    )
    drawn = peer.backbone if options.smoke or peer.backbone == TEACHER else None
    frozen = random_weights(drawn) if drawn else None
    detector, cpu = jaxad.Detector.from_settings(settings, frozen=frozen), [cpu_seconds()]
    detector.fit(train)
    cpu.append(cpu_seconds())
    started, compiled = time.perf_counter(), compile_seconds()
    scores = [batch for _, batch in detector.score(test, Execution())]
    wall = time.perf_counter() - started - (compile_seconds() - compiled)
    cpu.append(cpu_seconds())
    assert detector.model is not None
    seconds = {
        "compile": detector.model.seconds["compile"],
        "fit": detector.model.seconds["fit"],
        "cpu_fit": cpu[1] - cpu[0],
        "score_per_image": wall / len(test),
        "cpu_score_per_image": (cpu[2] - cpu[1]) / len(test),
    }
    image, pixel = (np.concatenate([getattr(batch, part) for batch in scores]) for part in ("image", "pixel"))
    return {"metrics": measured(image, pixel, test), "seconds": seconds}, getattr(detector.state, "channels", None)


def fit_anomalib(
    peer: Peer, train: Dataset, test: Dataset, seed: int, channels: Any, options: Options
) -> dict[str, Any]:
    """Metrics and seconds of anomalib, in a process of its own; PaDiM takes the channels that jaxad has drawn."""
    with tempfile.TemporaryDirectory() as folder:
        for part, data in (("train", train), ("test", test)):
            np.save(f"{folder}/{part}.npy", data.images(range(len(data))))
        theirs = peer.theirs | ({peer.auxiliary: str(options.auxiliary)} if peer.auxiliary else {})
        if peer.backbone == TEACHER:
            save_file(teacher_tensors(), f"{folder}/teacher.safetensors")
        settings = {
            "folder": folder,
            "method": peer.method,
            "options": theirs,
            "weights": str(options.weights),
            "teacher": f"{folder}/teacher.safetensors",
            "auxiliary": str(options.auxiliary),
            "epochs": peer.epochs,
            "batch_size": peer.batch_size,
            "seed": seed,
            "channels": None if channels is None else np.asarray(channels).tolist(),
            "threads": options.threads,
        }
        script = Path(__file__).with_name("anomalib_models.py")
        command = [str(options.torch_python), "-W", "ignore", str(script), json.dumps(settings)]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        image, pixel = (np.load(f"{folder}/{part}.npy") for part in ("image", "pixel"))
        return {"metrics": measured(image, pixel, test), **json.loads(run.stdout.splitlines()[-1])}


def random_weights(name: str) -> Any:
    """Of a backbone."""
    return jaxad.backbones.backbone(name).init(jax.random.key(0))


def teacher_tensors() -> dict[str, np.ndarray]:
    """EfficientAD's teacher under anomalib's names."""
    return {
        f"{name}.{leaf.replace('kernel', 'weight')}": np.array(
            values if leaf == "bias" else values.transpose(3, 2, 0, 1)
        )
        for name, group in random_weights(TEACHER)["params"].items()
        for leaf, values in group.items()
    }


def main(options: Options) -> None:
    """Compares method by method."""
    path = options.results / f"anomalib_{options.name}.json"
    record: dict[str, Any] = read_json(path) if path.exists() else {}
    methods = record.get("methods", {})
    for peer in PEERS:
        if (options.methods and peer.method not in options.methods) or peer.method in methods:
            continue
        size, count = (64, 8) if options.smoke else (peer.size, IMAGES)
        preprocess = Preprocess((size, size))
        opened = open_data(options.data, preprocess=preprocess, mask_threshold=options.mask_threshold)
        train, test = (part and chosen(part, count) for part in next(iter(opened.values())))
        assert train is not None and test is not None
        peer = peer._replace(epochs=peer.epochs and 1, seeds=(0,)) if options.smoke else peer
        ours = [fit_jaxad(peer, train, test, seed, options) for seed in peer.seeds]
        row: dict[str, Any] = {
            "epochs": peer.epochs,
            "batch_size": peer.batch_size,
            "images": {"size": size, "train": len(train), "test": len(test)},
            "jaxad": [fitted for fitted, _ in ours],
        }
        if options.torch_python is not None:
            draws = zip(peer.seeds, (channels for _, channels in ours), strict=True)
            row["anomalib"] = [fit_anomalib(peer, train, test, *draw, options) for draw in draws]
        methods = methods | {peer.method: row | origin()}
        write_json(path, {"experiment": f"anomalib_{options.name}", "methods": methods})
        for library in ("jaxad", "anomalib"):
            print(options.name, peer.method, library, [fit["metrics"] for fit in row.get(library, ())], flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    start(main, Options)
