"""Writes golden/fastflow.npz with anomalib's FastFlow, made of FrEIA's blocks (of which anomalib has a copy)."""

# pyright: reportMissingImports=false
from importlib.metadata import version

import torch
from anomalib.models.image.fastflow import torch_model
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock

from tests.parity.golden import fill, normal, write

CHANNELS, SIDES, SIZE = (5, 6), (8, 4), (32, 32)

torch_model.SequenceINN, torch_model.AllInOneBlock = SequenceINN, AllInOneBlock
model = FastflowModel(SIZE, "resnet18", pre_trained=False)
model.feature_extractor = torch.nn.Identity()
model.norms = torch.nn.ModuleList(torch.nn.LayerNorm([c, n, n]) for c, n in zip(CHANNELS, SIDES, strict=True))
model.fast_flow_blocks = torch.nn.ModuleList(
    create_fast_flow_block([c, n, n], conv3x3_only=False, hidden_ratio=1.0, flow_steps=4)
    for c, n in zip(CHANNELS, SIDES, strict=True)
)
torch.manual_seed(0)
permutations = {k: v.clone() for k, v in model.state_dict().items() if "w_perm" in k}
fill(model)
model.load_state_dict(permutations, strict=False)
given = {k: v[..., 0, 0].argmax(1).to(torch.int32) for k, v in permutations.items() if k.endswith("w_perm")}
features = [torch.from_numpy(normal(f"features {c}", 3, c, n, n)) for c, n in zip(CHANNELS, SIDES, strict=True)]
expected = {}

model.train()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-5)
trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = FastflowLoss()(*model(features))
    loss.backward()
    if not losses:
        expected |= {f"gradient/{k}": p.grad + 1e-5 * p.detach() for k, p in trained.items()}
    losses.append(loss.item())
    optimizer.step()
expected["loss"] = losses
expected |= {f"parameters after 3 steps/{k}": p for k, p in trained.items()}
model.eval()
with torch.no_grad():
    result = model(features)
expected |= {"heat map": result.anomaly_map, "score": result.pred_score}
given |= {f"features {i}": x for i, x in enumerate(features)}
write("fastflow", f"anomalib {version('anomalib')}, FrEIA {version('FrEIA')}", given, expected)
