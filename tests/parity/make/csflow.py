"""Writes golden/csflow.npz with anomalib's CS-Flow."""

# pyright: reportMissingImports=false
from importlib.metadata import version

import torch
from anomalib.models.image.csflow import torch_model
from anomalib.models.image.csflow.anomaly_map import AnomalyMapGenerator, AnomalyMapMode
from anomalib.models.image.csflow.loss import CsFlowLoss
from FrEIA.framework import InputNode

from tests.parity.golden import fill, normal, write

CHANNELS, SIDES, BLOCKS = 5, (8, 4, 2), 2

torch_model.InputNode = lambda channels, *size, name: InputNode(CHANNELS, *size, name=name)
torch_model.CsFlowMultiScaleFeatureExtractor = lambda **options: torch.nn.Identity()
model = torch_model.CsFlowModel((256, 256), cross_conv_hidden_channels=3, n_coupling_blocks=BLOCKS)
model.anomaly_map_generator = AnomalyMapGenerator((3, 20, 24), AnomalyMapMode.MAX)
nodes = {node.name: node.module for node in model.graph.graph.node_list}
couplings = torch.nn.ModuleDict({f"block{i}": nodes[f"fc1_{i}"] for i in range(BLOCKS)})
fill(couplings)
features = [torch.from_numpy(3 * normal(f"scale {i}", 3, CHANNELS, n, n)) for i, n in enumerate(SIDES)]

model.train()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, eps=1e-4, weight_decay=1e-5)
start = {k: p.detach().clone() for k, p in couplings.named_parameters()}
expected, losses, norms = {}, [], []
for _ in range(3):
    optimizer.zero_grad()
    images = [[scale[i : i + 1] for scale in features] for i in range(len(features[0]))]
    loss = torch.stack([CsFlowLoss()(*model(image)) for image in images]).mean()
    loss.backward()
    norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
    if not losses:
        expected |= {f"gradient/{k}": p.grad + 1e-5 * p.detach() for k, p in couplings.named_parameters()}
    losses.append(loss.item())
    optimizer.step()
assert min(norms) > 1, norms
expected["loss"] = losses
expected |= {f"change in 3 steps/{k}": p.detach() - start[k] for k, p in couplings.named_parameters()}
model.eval()
with torch.no_grad():
    result = model(features)
expected |= {"heat map": result.anomaly_map, "score": result.pred_score}
given = {
    f"permutation {i} {scale}": permutation.to(torch.int32)
    for i in range(BLOCKS)
    for scale, permutation in enumerate(nodes[f"permute_{i}"].perm)
}
write("csflow", f"anomalib {version('anomalib')}, FrEIA {version('FrEIA')}", given, expected)
