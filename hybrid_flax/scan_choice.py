"""Where equal blocks run as a loop if nobody says: `model.scan_blocks=auto`."""

from typing import NamedTuple

from jax.sharding import Mesh

from hybrid_flax.settings import Model


class Rule(NamedTuple):
    """A platform's row."""

    scan: bool
    why: str


# By benchmarks/results/scan_blocks.json: a platform takes loops when its steps compile at least 2.5
# times sooner with them and need at most 1.03 times the temporary memory and traffic.
AUTO = {
    "tpu": Rule(False, "gcvit_b on v5e compiles 1.3 times sooner, with 1.6 times the memory"),
    "gpu": Rule(False, "nothing is measured there"),
    "cpu": Rule(False, "gcvit_b compiles 1.07 times sooner, with 1.3 times the traffic"),
}


def scans(model: Model, mesh: Mesh) -> bool:
    """Whether equal blocks of a model run as a loop on the platform of these devices."""
    if model.scan_blocks != "auto":
        return model.scan_blocks == "on"
    platform = mesh.devices.flat[0].platform
    return platform in AUTO and AUTO[platform].scan
