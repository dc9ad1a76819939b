"""Steps of training with FrEIA's blocks on a CPU, timed; run by bench_flows.py with a Python that has torch and FrEIA.

Takes JSON on the command line (method, shape, batch_size, steps, threads) and prints the seconds of every step as JSON.
"""

import json
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
from FrEIA.framework import SequenceINN  # pyright: ignore[reportMissingImports]
from FrEIA.modules import AllInOneBlock  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]


class NormalizedFlow(SequenceINN):
    """A flow behind a layer norm."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.norm = nn.LayerNorm(shape)

    def forward(self, x):
        """The latent values and the log determinant."""
        return super().forward(self.norm(x))


def fastflow_of(shape):
    """Eight 3x3 couplings behind a layer norm."""
    flow = NormalizedFlow(*shape)

    def subnet(given, out):
        return nn.Sequential(
            nn.Conv2d(given, given, 3, padding="same"), nn.ReLU(), nn.Conv2d(given, out, 3, padding="same")
        )

    for _ in range(8):
        flow.append(AllInOneBlock, subnet_constructor=subnet, affine_clamping=2.0, permute_soft=False)
    return flow, torch.optim.Adam(flow.parameters(), lr=1e-3, weight_decay=1e-5)


def fastflow_loss(flow, x):
    """The negative log likelihood of an image, without its constant."""
    z, log_det = flow(x)
    return torch.mean(0.5 * torch.sum(z**2, dim=(1, 2, 3)) - log_det)


def fastflow(shape, batch_size):
    """A step of FastFlow."""
    flow, optimizer = fastflow_of(shape)
    x = torch.randn(batch_size, *shape)
    return lambda: fastflow_loss(flow, x), optimizer


def cflow(shape, batch_size):
    """Eight couplings of feature vectors, given a code of their position."""
    flow = SequenceINN(shape[0])

    def subnet(given, out):
        return nn.Sequential(nn.Linear(given, 2 * given), nn.ReLU(), nn.Linear(2 * given, out))

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


def main(given):
    """Times the steps."""
    torch.set_num_threads(given["threads"])
    loss, optimizer = {"fastflow": fastflow, "cflow": cflow}[given["method"]](
        tuple(given["shape"]), given["batch_size"]
    )
    seconds = []
    for _ in range(given["steps"]):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"seconds": seconds, "torch": torch.__version__}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
