"""Flags of XLA for the tests. XLA aborts the process on a flag that it does not know, so other processes try them."""

import os
import subprocess
import sys

DEVICES = "--xla_force_host_platform_device_count=8"
FAST_COMPILATION = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")
"""The tests mostly compile. Code that is not optimized, fused by the older emitter, compiles twice as fast."""
TRIAL = "from jaxlib import xla_client; xla_client.make_cpu_client()"


def xla_flags() -> str:
    """The flags that the installed XLA accepts, in about half a second."""
    trials = [
        subprocess.Popen([sys.executable, "-c", TRIAL], env=os.environ | {"XLA_FLAGS": flag}, stderr=subprocess.DEVNULL)
        for flag in FAST_COMPILATION
    ]
    accepted = [flag for flag, trial in zip(FAST_COMPILATION, trials, strict=True) if trial.wait() == 0]
    return " ".join([DEVICES, *accepted])
