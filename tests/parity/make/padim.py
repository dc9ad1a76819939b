"""Writes golden/padim.npz with anomalib's PadimModel, on features in place of its backbone."""

# pyright: reportMissingImports=false
from importlib.metadata import version

import torch
from anomalib.models.image.padim.torch_model import PadimModel

from tests.parity.golden import normal, write
from tests.parity.make.blur import ScipyBlur

SHAPES, SIZE, DRAWN = {"layer1": (4, 8, 8), "layer2": (5, 4, 4), "layer3": (6, 2, 2)}, (32, 32), 9

features = {layer: torch.from_numpy(normal(f"features {layer}", 9, *shape)) for layer, shape in SHAPES.items()}
torch.manual_seed(0)
channels = torch.randperm(sum(shape[0] for shape in SHAPES.values()))[:DRAWN]

model = PadimModel("resnet18", list(SHAPES), pre_trained=False)
del model.feature_extractor
model.feature_extractor = lambda image: {layer: maps[image[:, 0, 0, 0].long()] for layer, maps in features.items()}
model.idx = channels
model.anomaly_map_generator.blur = ScipyBlur(4)
images = torch.arange(9.0)[:, None, None, None].expand(-1, 3, *SIZE)

model.train()
for batch in (images[:4], images[4:6]):
    model(batch)
model.fit()
model.eval()
result = model(images[6:])
expected = {
    "mean": model.gaussian.mean.T,
    "inverse covariance": model.gaussian.inv_covariance,
    "heat map": result.anomaly_map,
    "score": result.pred_score,
}
write("padim", f"anomalib {version('anomalib')}", {"channels": channels.int()}, expected)
