"""Moved to `python -m hybrid_flax.run.checkpoints`; this door stays for one version."""

import runpy
import sys

if __name__ == "__main__":
    print("hybrid_flax.checkpoints is now hybrid_flax.run.checkpoints", file=sys.stderr)
    runpy.run_module("hybrid_flax.run.checkpoints", run_name="__main__")
