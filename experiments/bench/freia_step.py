"""Training steps of FrEIA's blocks on a CPU, timed; flows.py runs this file with a Python that has torch and FrEIA.

The command line is JSON (method, shape, batch_size, steps, threads); it prints the seconds of every step as JSON.
"""

import json
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
from FrEIA.framework import SequenceINN  # pyright: ignore[reportMissingImports]
from FrEIA.modules import AllInOneBlock  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]


class NormalizedFlow(SequenceINN):
    """A flow after a layer norm."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.norm = nn.LayerNorm(shape)

    def forward(self, x):
        """The latent values and the log determinant."""
        return super().forward(self.norm(x))


def fastflow_of(shape):
    """Eight 3x3 couplings after a layer norm, and their optimizer; `shape` is c h w."""
    flow = NormalizedFlow(*shape)

    def subnet(channels, out):
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding="same"), nn.ReLU(), nn.Conv2d(channels, out, 3, padding="same")
        )

    for _ in range(8):
        flow.append(AllInOneBlock, subnet_constructor=subnet, affine_clamping=2.0, permute_soft=False)
    return flow, torch.optim.Adam(flow.parameters(), lr=1e-3, weight_decay=1e-5)


def fastflow_loss(flow, x):
    """The mean negative log likelihood of images, without its constant."""
    z, log_det = flow(x)
    return torch.mean(0.5 * torch.sum(z**2, dim=(1, 2, 3)) - log_det)


def fastflow(shape, batch_size):
    """The loss and the optimizer of FastFlow."""
    flow, optimizer = fastflow_of(shape)
    x = torch.randn(batch_size, *shape)
    return lambda: fastflow_loss(flow, x), optimizer


def cflow(shape, batch_size):
    """The loss and the optimizer of CFLOW-AD: eight couplings of feature vectors, conditioned on their positions."""
    flow = SequenceINN(shape[0])

    def subnet(channels, out):
        return nn.Sequential(nn.Linear(channels, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, out))

    for _ in range(8):
        flow.append(
            AllInOneBlock,
            cond=0,
            cond_shape=(128,),
            subnet_constructor=subnet,
            affine_clamping=1.9,
            global_affine_type="SOFTPLUS",
            permute_soft=True,
        )
    x, code = torch.randn(batch_size, shape[0]), torch.randn(batch_size, 128)

    def loss():
        z, log_det = flow(x, [code])
        return -nn.functional.logsigmoid((log_det - 0.5 * torch.sum(z**2, 1)) / shape[0]).mean()

    return loss, torch.optim.Adam(flow.parameters(), lr=2e-4)


def main(settings):
    """Times the steps."""
    torch.set_num_threads(settings["threads"])
    method = {"fastflow": fastflow, "cflow": cflow}[settings["method"]]
    loss, optimizer = method(tuple(settings["shape"]), settings["batch_size"])
    seconds = []
    for _ in range(settings["steps"]):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds, "torch": torch.__version__}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
