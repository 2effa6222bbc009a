"""Moved to `python -m hybrid_flax.preview_data`; this door stays for one version."""

import runpy
import sys

if __name__ == "__main__":
    print("hybrid_flax.data.inspect is now hybrid_flax.preview_data", file=sys.stderr)
    runpy.run_module("hybrid_flax.preview_data", run_name="__main__")
