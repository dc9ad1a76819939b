"""Writes golden/cflow.npz with anomalib's CFLOW, whose training step is written out as its Lightning module has it."""

# pyright: reportMissingImports=false
import math
from importlib.metadata import version

import torch
from anomalib.models.image.cflow.torch_model import CflowModel
from anomalib.models.image.cflow.utils import cflow_head, get_logp, positional_encoding_2d

from tests.parity.golden import fill, normal, write

SHAPES, CONDITION = {"layer1": (5, 6, 8), "layer2": (6, 6, 8)}, 8
RATE = 1e-2 * (0.001 + 0.999 * (1 + math.cos(math.pi * 0.5)) / 2)
"""The official code's learning rate half way through the training, of which the largest is 0.01 here."""

model = CflowModel("resnet18", tuple(SHAPES), pre_trained=False, condition_vector=CONDITION, fiber_batch_size=1000)
model.encoder = torch.nn.Identity()
model.decoders = torch.nn.ModuleList(cflow_head(CONDITION, 2, 1.9, c, permute_soft=True) for c, _, _ in SHAPES.values())
rotations = {k: v.clone() for k, v in model.state_dict().items() if "w_perm" in k}
fill(model)
model.load_state_dict(rotations, strict=False)
features = {layer: torch.from_numpy(normal(f"features {layer}", 4, *shape)) for layer, shape in SHAPES.items()}
trained = {k: p for k, p in model.named_parameters() if p.requires_grad and "w_perm" not in k}
optimizer = torch.optim.Adam(trained.values(), lr=RATE)
expected, losses = {}, []
for _ in range(3):
    losses.append([])
    for x, decoder in zip(features.values(), model.decoders, strict=True):
        b, c, h, w = x.shape
        encoding = positional_encoding_2d(CONDITION, h, w).repeat(b, 1, 1, 1).permute(0, 2, 3, 1).reshape(-1, CONDITION)
        optimizer.zero_grad()
        z, log_determinant = decoder(x.permute(0, 2, 3, 1).reshape(-1, c), [encoding])
        loss = -torch.nn.functional.logsigmoid(get_logp(c, z, log_determinant) / c).mean()
        loss.backward()
        if len(losses) == 1:
            expected |= {f"gradient/{k}": p.grad.clone() for k, p in trained.items() if p.grad is not None}
        optimizer.step()
        losses[-1].append(loss.item())
expected["loss"] = [sum(parts) / len(parts) for parts in losses]
expected |= {f"parameters after 3 steps/{k}": p for k, p in trained.items()}


class Features(dict):
    """Where the model asks for the size and device of images."""

    shape, device = (4, 3, 6, 8), "cpu"


result = model(Features(features))
expected |= {"heat map": result.anomaly_map, "score": result.pred_score}
write(
    "cflow", f"anomalib {version('anomalib')}", {k: v for k, v in rotations.items() if k.endswith("w_perm")}, expected
)
