"""What a result was made with."""

import importlib.metadata
import os
import platform
import subprocess

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def versions(*others: str) -> dict[str, str]:
    """Versions of Python, the packages that matter and `others`; devices; this code's commit.

    What is not installed is left out: a machine that only measures needs no data loader.
    """
    packages = {}
    for package in (*_PACKAGES, *others):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {
        "python": platform.python_version(),
        **packages,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "commit": _commit(),
    }


def _commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        result = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"
