"""Where equal blocks run as a loop if nobody says: `model.scan_blocks=auto`."""

from jax.sharding import Mesh

from hybrid_flax.settings import Model

# Platforms whose steps compile at least 2.5 times sooner with loops and need at most 1.03 times the
# temporary memory and traffic, by benchmarks/results/scan_blocks.json: so far there is none.
PLATFORMS: frozenset[str] = frozenset()


def scans(model: Model, mesh: Mesh) -> bool:
    """Whether equal blocks of a model run as a loop on the platform of these devices."""
    if model.scan_blocks != "auto":
        return model.scan_blocks == "on"
    return mesh.devices.flat[0].platform in PLATFORMS
