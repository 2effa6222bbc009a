"""What a result was made with: versions, and what else of the environment its bits depend on."""

import importlib.metadata
import logging
import os
import platform
import re
import shlex
import subprocess
from typing import Any

import jax

from hybrid_flax.errors import InputError

# Settings of JAX, which the environment gives, that decide which random numbers and which products
# there are; and variables of compilers, which another machine may need otherwise.
_OPTIONS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_enable_x64",
    "jax_default_matmul_precision",
)
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_CHANGES_NOTHING = re.compile(
    r"--xla_(dump|force_host_platform_device_count|hlo_profile|gpu_cuda_data_dir|.*log)"
)
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


def numerics() -> dict[str, Any]:
    """What changes the bits of a run and is no setting of ours, by name; JSON can hold it."""
    options = {name: getattr(jax.config, name, None) for name in _OPTIONS}
    variables = {name: _flags_that_matter(os.environ.get(name, "")) for name in _VARIABLES}
    return options | variables


def _flags_that_matter(text: str) -> str:
    return " ".join(sorted(flag for flag in text.split() if not _CHANGES_NOTHING.match(flag)))


def check_same_numerics(before: dict[str, Any], step: int) -> None:
    """Compares `numerics()` with what it was when a checkpoint was saved.

    Flags of compilers that differ are a warning. What an earlier version did not note may be any.

    Raises:
      InputError: JAX would draw other random numbers, or multiply otherwise.
    """
    now = numerics()
    changed = [name for name in now if name in before and before[name] != now[name]]
    if flags := [name for name in changed if name in _VARIABLES]:
        said = "; ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in flags)
        logging.warning(
            "since the checkpoint of step %d: %s. The result may differ in the last bits from an "
            "uninterrupted run",
            step,
            said,
        )
    if options := [name for name in changed if name in _OPTIONS]:
        said = "; ".join(f"{name} was {before[name]}, is {now[name]}" for name in options)
        unset = [f"-u {name.upper()}" for name in options if before[name] is None]
        given = [
            f"{name.upper()}={shlex.quote(str(before[name]))}"
            for name in options
            if before[name] is not None
        ]
        back = " ".join(unset + given)  # as `env` wants them
        raise InputError(
            f"JAX is set otherwise than at the checkpoint of step {step} ({said}): the run would "
            f"go on with other random numbers or products. Set it back, as with `env {back}`, or "
            "begin another --workdir with --config.init_from= this one"
        )


def _commit() -> str:
    """Of the checkout that this file lies in; an installed package may lie in somebody else's."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists(os.path.join(root, ".git")):
        return "unknown"
    try:
        result = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() or "unknown"
