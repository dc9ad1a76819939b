"""Trains a FastFlow of FrEIA's blocks on features; epoch_curve.py runs it with a Python that has torch and FrEIA.

The command line is JSON (folder with train.npz and test.npz, epochs, batch_size, size of the heat maps). After every
epoch it prints the path of the test images' heat maps.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from freia_step import fastflow_loss, fastflow_of
from torch import nn  # pyright: ignore[reportMissingImports]


def main(settings):
    """Trains, and saves the heat maps of every epoch."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - FrEIA draws its permutations from it
    folder = Path(settings["folder"])
    train, test = (
        {layer: torch.from_numpy(x) for layer, x in np.load(folder / f"{part}.npz").items()}
        for part in ("train", "test")
    )
    flows = {layer: fastflow_of(tuple(x.shape[1:])) for layer, x in train.items()}
    n, size = len(next(iter(train.values()))), settings["batch_size"]

    def likelihood(layer, rows):
        z, _ = flows[layer][0](test[layer][rows])
        small = torch.exp(-0.5 * torch.mean(z**2, 1, keepdim=True))
        return nn.functional.interpolate(small, settings["size"], mode="bilinear")[:, 0]

    for _ in range(settings["epochs"]):
        for rows in torch.randperm(n)[: n // size * size].split(size):
            for layer, (flow, optimizer) in flows.items():
                optimizer.zero_grad()
                fastflow_loss(flow, train[layer][rows]).backward()
                optimizer.step()
        with torch.no_grad():
            parts = torch.arange(len(next(iter(test.values())))).split(size)
            maps = [1 - sum(likelihood(layer, rows) for layer in flows) / len(flows) for rows in parts]
        np.save(folder / "maps.npy", torch.cat(maps).numpy())
        print(folder / "maps.npy", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
