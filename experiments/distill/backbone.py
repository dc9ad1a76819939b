"""Distills the embedded backbone: a small patch-description network learns a ResNet-50's layer2 and layer3.

The target of a position is the teacher's layer2 vector and its layer3 vector (bilinearly upsampled), concatenated and
projected onto the leading principal components. Distances between patches, which a memory bank compares, are then close
to the teacher's. The loss is the mean squared error over the teacher's variance, so 1 - loss is the explained variance.

Paper: EfficientAD, WACV 2024, arXiv:2303.14535, section 3.1 (distillation on ImageNet; its teacher is standardized per
    channel, ours projected); Uninformed Students, CVPR 2020, arXiv:1911.02357, section 3.1.

    python -m experiments.distill.backbone --images IMAGENET_FOLDER --weights resnet50.caffe_in1k.safetensors

Needs about 4 GB of memory and about an hour on two CPU cores. A killed run resumes from its last epoch in --workdir.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from rich.progress import track
from safetensors.numpy import load_file, save_file

import jaxad.backbones
from experiments.command import RESULTS, ROOT, origin, start
from experiments.distill.photographs import photographs
from jaxad.backbones import pdn
from jaxad.files import replacing, write_json
from jaxad.ops.heatmap import stack_maps


@dataclass
class Options:
    """Distill the embedded backbone."""

    images: Path
    """A folder of photographs."""
    weights: Path | None = None
    """The teacher's safetensors file; None: random weights."""
    teacher: str = "resnet50.caffe_in1k"
    out: Path = ROOT / "jaxad" / "backbones" / "pdn_small.safetensors"
    results: Path = RESULTS / "distill_backbone.json"
    workdir: Path = Path("runs/distill_backbone")
    crops: int = 6000
    """Augmented crops; the teacher's features of each are computed once."""
    size: int = 192
    batch_size: int = 16
    epochs: int = 3
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    seed: int = 0


def augment(path: Path, size: int, rng: np.random.Generator) -> np.ndarray:
    """A strongly augmented crop of a photograph, uint8 (size, size, 3)."""
    image = Image.open(path).convert("RGB")
    side = int(min(image.size) * np.sqrt(rng.uniform(0.05, 1.0)))
    left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
    image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    image = image.transpose(Image.Transpose(rng.integers(0, 7)))
    for enhance, strength in ((ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.5), (ImageEnhance.Color, 0.6)):
        image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
    if rng.random() < 0.3:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.3:
        draw = ImageDraw.Draw(image)
        for _ in range(rng.integers(1, 5)):
            points = [tuple(p) for p in rng.integers(0, size, 2) + rng.normal(0, size / 12, (4, 2)).cumsum(0)]
            color = tuple(int(c) for c in rng.integers(0, 256, 3))
            if rng.random() < 0.5:
                draw.line(points, fill=color, width=int(rng.integers(1, 5)), joint="curve")
            else:
                draw.polygon(points, fill=color)
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    pixels = np.asarray(image, np.float32)
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0, rng.uniform(2, 12), pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def teach(describe, frozen, crop, options: Options) -> tuple[np.ndarray, np.ndarray, float]:
    """All crops in random order, the teacher's projected features, and the share of variance that they keep."""
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(track(pool.map(crop, range(options.crops)), "augment", options.crops)))
    images = images[np.random.default_rng(options.seed).permutation(options.crops)]
    batches = range(0, options.crops, options.batch_size)
    first = batches[:24]
    sample = np.concatenate([np.asarray(describe(frozen, images[i : i + options.batch_size])) for i in first])
    flat = sample.reshape(-1, sample.shape[-1]).astype(np.float64)
    mean = flat.mean(0)
    values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False))
    values, basis = values[::-1], vectors[:, ::-1][:, : pdn.OUT]
    basis = (basis / np.sqrt(values[: pdn.OUT].mean())).astype(np.float32)
    targets = np.empty((options.crops, *sample.shape[1:3], pdn.OUT), np.float16)
    for i in track(batches, "teacher"):
        x = np.asarray(describe(frozen, images[i : i + options.batch_size]))
        targets[i : i + options.batch_size] = (x - mean.astype(np.float32)) @ basis
    return images, targets, float(values[: pdn.OUT].sum() / values.sum())


def main(options: Options) -> None:
    """Distills, and writes the weights and results/distill_backbone.json."""
    started = time.time()
    paths = photographs(options.images)
    if options.crops % options.batch_size:
        raise ValueError(f"crops must be a multiple of batch_size={options.batch_size}, got {options.crops}")
    teacher = jaxad.backbones.backbone(options.teacher)
    frozen = teacher.fold(load_file(options.weights)) if options.weights else teacher.init(jax.random.key(options.seed))

    @jax.jit
    def describe(frozen, image):
        maps = teacher.apply(frozen, image, ("layer2", "layer3"))
        return stack_maps([maps["layer2"], maps["layer3"]])

    def crop(i: int) -> np.ndarray:
        return augment(paths[i % len(paths)], options.size, np.random.default_rng((options.seed, i)))

    options.workdir.mkdir(parents=True, exist_ok=True)
    cache = options.workdir / f"crops_{options.crops}_{options.size}_{options.seed}.npz"
    if cache.exists():
        with np.load(cache) as saved:
            images, targets, kept = saved["images"], saved["targets"], float(saved["kept"])
    else:
        images, targets, kept = teach(describe, frozen, crop, options)
        with replacing(cache) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images, targets=targets, kept=kept)
    batches = range(0, options.crops, options.batch_size)

    student = jaxad.backbones.backbone("pdn_small")
    student_frozen = student.init(jax.random.key(options.seed + 1))
    student_frozen["params"]["head"]["kernel"] *= 0.0
    steps = options.epochs * len(batches)
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, min(100, steps // 5), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=options.weight_decay))

    def loss_fn(params, image, target):
        out = student.apply({**student_frozen, "params": params}, image, ("layer3",))["layer3"]
        return jnp.mean((out - target.astype(jnp.float32)) ** 2)

    @jax.jit
    def step(state, image, target):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, image, target)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    evaluate = jax.jit(loss_fn)
    state = (student_frozen["params"], optimizer.init(student_frozen["params"]))
    curve: list[float] = []
    resumed = 0
    held_out = max(1, len(batches) // 50)

    with ocp.training.Checkpointer(str(options.workdir.absolute())) as checkpoints:
        latest = checkpoints.latest
        if latest is not None:
            saved = checkpoints.load(latest.step, {"state": state, "curve": np.zeros(2 * latest.step)})
            state, curve, resumed = saved["state"], [float(v) for v in saved["curve"]], latest.step
        for epoch in range(len(curve) // 2, options.epochs):
            rng = np.random.default_rng((options.seed, epoch))
            losses = []
            for i in track(rng.permutation(len(batches) - held_out), f"epoch {epoch + 1}/{options.epochs}"):
                rows = slice(i * options.batch_size, (i + 1) * options.batch_size)
                state, loss = step(state, images[rows], targets[rows])
                losses.append(loss)
            rest = (slice(i, i + options.batch_size) for i in batches[len(batches) - held_out :])
            test = [float(evaluate(state[0], images[rows], targets[rows])) for rows in rest]
            curve += [float(np.mean(losses)), float(np.mean(test))]
            if not np.isfinite(curve[-2]):
                raise ValueError(
                    f"the loss must stay finite, got {curve[-2]} in epoch {epoch + 1}: lower learning_rate"
                )
            print(f"epoch {epoch + 1}: loss {curve[-2]:.4f}, held-out crops {curve[-1]:.4f}", flush=True)
            checkpoints.save(epoch + 1, {"state": state, "curve": np.array(curve)})

    tensors = {f"{m}.{k}": np.asarray(v, np.float16) for m, leaf in state[0].items() for k, v in leaf.items()}
    with replacing(options.out) as temporary:
        save_file(tensors, temporary, metadata={"backbone": "pdn_small", "teacher": options.teacher})
    record = {
        "recipe": "distill_backbone",
        "method": "distillation of pdn_small",
        "dataset": "imagenet_sample",
        "backbone": options.teacher,
        "image_size": options.size,
        "crops": options.crops,
        "photographs": len(paths),
        "metrics": {"held_out_loss": curve[-1], "variance_explained": 1 - curve[-1], "pca_variance_kept": kept},
        "loss_curve": {"train": curve[::2], "held_out": curve[1::2]},
        "parameters": int(sum(t.size for t in tensors.values())),
        "file_bytes": options.out.stat().st_size,
        "seconds": {"total": time.time() - started},
        "resumed_from_epoch": resumed,
        **origin(),
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
    }
    write_json(options.results, record)


if __name__ == "__main__":
    start(main, Options)
