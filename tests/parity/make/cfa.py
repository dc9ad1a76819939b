"""Writes golden/cfa.npz with anomalib's CfaModel and CfaLoss, on features in place of its backbone."""

# pyright: reportMissingImports=false
from importlib.metadata import version
from types import SimpleNamespace

import torch
from anomalib.models.image.cfa import Cfa, anomaly_map, torch_model
from anomalib.models.image.cfa.loss import CfaLoss

from tests.parity.golden import fill, normal, write
from tests.parity.make.blur import ScipyBlur

SHAPES, SIZE, RADIUS = {"layer1": (3, 8, 8), "layer2": (2, 4, 4), "layer3": (2, 2, 2)}, (16, 16), 0.6
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1
BATCHES = torch.tensor([[0, 1, 2], [3, 4, 5]])

anomaly_map.GaussianBlur2d = ScipyBlur
features = {layer: torch.from_numpy(normal(f"features {layer}", 6, *shape)) for layer, shape in SHAPES.items()}


class Backbone(torch.nn.Module):
    """Gives the features of the images that the pixels are the indices of."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, image):
        return {layer: maps[image[:, 0, 0, 0].long()] for layer, maps in features.items()}


def images(index):
    return index.float()[:, None, None, None].expand(-1, 3, *SIZE)


torch_model.get_feature_extractor = lambda backbone, nodes: Backbone()
torch_model.CfaModel.get_scale = lambda self, size: torch.Size(SHAPES["layer1"][1:])
model = Cfa("resnet18", pre_processor=False, post_processor=False, evaluator=False, visualizer=False).model
model.descriptor.layer = torch_model.CoordConv2d(7, 7, 1)
fill(model.descriptor)
model.initialize_centroid([SimpleNamespace(image=images(batch)) for batch in BATCHES])
expected = {"memory": model.memory_bank.T}

loss_of = CfaLoss(3, 3, 1e-5)
loss_of.radius = torch.nn.Parameter(torch.full((1,), RADIUS))
optimizer = Cfa.configure_optimizers(SimpleNamespace(model=model))
expected["settings"] = [optimizer.defaults["lr"], optimizer.defaults["weight_decay"], float(model.radius)]
optimizer.add_param_group({"params": [loss_of.radius]})
for group in optimizer.param_groups:
    group |= {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
trained = {k: p for k, p in model.descriptor.named_parameters() if "conv2d" in k} | {"radius": loss_of.radius}
model.train()
losses = []
for step, batch in enumerate((BATCHES[0], BATCHES[1], BATCHES[1])):
    optimizer.zero_grad()
    loss = loss_of(model(images(batch)))
    loss.backward()
    if step == 0:
        expected |= {f"gradient/{k}": p.grad for k, p in trained.items()}
    losses.append(loss.item())
    optimizer.step()
expected["loss"] = losses
expected |= {f"parameters after 3 steps/{k}": p for k, p in trained.items()}
model.eval()
with torch.no_grad():
    result = model(images(torch.arange(3)))
expected |= {"heat map": result.anomaly_map, "score": result.pred_score}
write("cfa", f"anomalib {version('anomalib')}", {}, expected)
