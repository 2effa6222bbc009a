"""One optimizer step, and what surrounds it; sees only dictionaries of arrays."""

from typing import Any

# Fields by attribute: a part of a run's config, or any other namespace. No more is asked for, so
# that a machine that only measures needs no ml_collections.
Config = Any
