"""FastFlow of FrEIA's blocks, trained on given features; run by epoch_curve.py with a Python that has torch and FrEIA.

Takes JSON on the command line (folder with learn.npz and test.npz, epochs, batch_size, size of the heat maps), and
after every epoch prints the path of the test images' heat maps.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from freia_step import fastflow_loss, fastflow_of


def main(given):
    """Trains, and draws the heat maps of every epoch."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - FrEIA draws its permutations from it
    folder = Path(given["folder"])
    learn, test = (
        {layer: torch.from_numpy(x) for layer, x in np.load(folder / f"{part}.npz").items()}
        for part in ("learn", "test")
    )
    made = {layer: fastflow_of(tuple(x.shape[1:])) for layer, x in learn.items()}
    n, size = len(next(iter(learn.values()))), given["batch_size"]

    def likelihood(layer, rows):
        z, _ = made[layer][0](test[layer][rows])
        small = torch.exp(-0.5 * torch.mean(z**2, 1, keepdim=True))
        return nn.functional.interpolate(small, given["size"], mode="bilinear")[:, 0]

    for _ in range(given["epochs"]):
        for rows in torch.randperm(n)[: n // size * size].split(size):
            for layer, (flow, optimizer) in made.items():
                optimizer.zero_grad()
                fastflow_loss(flow, learn[layer][rows]).backward()
                optimizer.step()
        with torch.no_grad():
            parts = torch.arange(len(next(iter(test.values())))).split(size)
            maps = [1 - sum(likelihood(layer, rows) for layer in made) / len(made) for rows in parts]
        np.save(folder / "maps.npy", torch.cat(maps).numpy())
        print(folder / "maps.npy", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
