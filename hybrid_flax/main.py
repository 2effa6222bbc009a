"""Trains a model: python -m hybrid_flax.main --config=configs/gcvit_b.py --workdir=DIR

The same command continues a run that was interrupted. Exit status: 0 finished, 1 training had to
stop, 2 unusable input, 143 or 130 saved after SIGTERM or Ctrl-C.
"""

from hybrid_flax import cli
from hybrid_flax.train import train

if __name__ == "__main__":
    cli.run(train, in_parallel=True)
