"""Which device computes, and whether a faster one stands idle."""

from __future__ import annotations

import glob
import os
import shutil

import jax

from jaxprune.errors import UsageError, reason


def device() -> str:
    """Return the kind and number of the devices that JAX uses, such as `cpu (2 cores)` or `gpu, NVIDIA H100, 1 of them`.

    Raises:
      UsageError: JAX cannot use the one that JAX_PLATFORMS asks for.
    """
    try:
        found = jax.devices()
    except RuntimeError as error:
        raise UsageError(
            f"JAX has no device to compute on ({reason(error)}); set JAX_PLATFORMS=cpu, or install the extra for this machine"
        ) from None
    if found[0].platform == "cpu":
        return f"cpu, {_cores()} cores"
    return f"{found[0].platform}, {found[0].device_kind}, {len(found)} of them"


def idle_accelerator(platform: str, root: str = "/") -> str:
    """Say what accelerator is in this machine though JAX computes on the CPU, and what to do; nothing where all is well.

    Args:
      platform: what JAX uses, `jax.default_backend()`.
      root: where the file system begins, for tests.
    """
    if platform != "cpu":
        return ""
    for what, pattern, extra in (("an NVIDIA GPU", "dev/nvidia[0-9]*", "cuda"), ("a TPU", "dev/accel[0-9]*", "tpu")):
        # In Linux under Windows a GPU has no file of its own.
        under_windows = extra == "cuda" and os.path.exists(os.path.join(root, "dev/dxg")) and shutil.which("nvidia-smi")
        if glob.glob(os.path.join(glob.escape(root), pattern)) or under_windows:
            asked = os.environ.get("JAX_PLATFORMS")
            why = f"as JAX_PLATFORMS={asked} says" if asked else f'install what it needs: pip install -e ".[{extra}]"'
            return f"{what} is in this machine, and JAX DOES NOT USE IT; {why}"
    return ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
