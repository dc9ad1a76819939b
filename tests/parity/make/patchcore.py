"""Writes golden/patchcore.npz with anomalib's PatchcoreModel, on features in place of its backbone."""

# pyright: reportMissingImports=false
from importlib.metadata import version

import numpy as np
import torch
from anomalib.models.components.dimensionality_reduction import SparseRandomProjection
from anomalib.models.components.sampling import k_center_greedy
from anomalib.models.image.patchcore.torch_model import PatchcoreModel

from tests.parity.golden import normal, write
from tests.parity.make.blur import ScipyBlur

SHAPES, SIZE, IMAGES, DIMENSIONS = {"layer2": (5, 8, 8), "layer3": (6, 4, 4)}, (8, 8), 7, 8
FIRST = 239  # of the patches, image by image: jaxad's draw with its key 0

features = {layer: torch.from_numpy(normal(f"features {layer}", 10, *shape)) for layer, shape in SHAPES.items()}
images = torch.arange(10.0)[:, None, None, None].expand(-1, 3, *SIZE)
projections = []


class Projection(SparseRandomProjection):
    """Remembers what it has drawn."""

    def __init__(self, eps):
        super().__init__(eps, np.random.RandomState(0))

    @staticmethod
    def _johnson_lindenstrauss_min_dim(n_samples, eps):
        return DIMENSIONS

    def _sparse_random_matrix(self, n_features):
        projections.append(super()._sparse_random_matrix(n_features))
        return projections[-1]


class Torch:
    """torch, whose only draw of an integer is FIRST."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def randint(self, high, size, device):
        return torch.tensor([FIRST])


torch.manual_seed(0)
k_center_greedy.SparseRandomProjection, k_center_greedy.torch = Projection, Torch()
model = PatchcoreModel(list(SHAPES), "resnet18", pre_trained=False, num_neighbors=9)
del model.feature_extractor
model.feature_extractor = lambda image: {layer: maps[image[:, 0, 0, 0].long()] for layer, maps in features.items()}
model.anomaly_map_generator.blur = ScipyBlur(4)
model.train()
for batch in (images[:4], images[4:IMAGES]):
    model(batch)
model.subsample_embedding(0.1)
model.eval()
result = model(images[IMAGES:])
expected = {"bank": model.memory_bank, "heat map": result.anomaly_map, "score": result.pred_score}
write("patchcore", f"anomalib {version('anomalib')}", {"projection": projections[0]}, expected)
