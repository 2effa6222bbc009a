"""Trains a model: python -m hybrid_flax.main --config=configs/gcvit_b.py --workdir=DIR

The same command continues a run that was interrupted. Exit status: 0 finished, 1 training had to
stop, 2 unusable input, 124 no progress (the watchdog), 143, 130 or 129 saved after SIGTERM, Ctrl-C
or SIGHUP.
"""

from absl import flags

from hybrid_flax import cli
from hybrid_flax.train import train

if __name__ == "__main__":
    flags.DEFINE_string(
        "profile", "", "Steps to record with JAX's profiler into WORKDIR/profile, such as 10:15."
    )
    flags.DEFINE_string(
        "program", "", "File with the compiled training step, from hybrid_flax.plan --save."
    )
    cli.run(
        lambda config, workdir: train(
            config,
            workdir,
            profile=flags.FLAGS.profile,
            compilation_cache=flags.FLAGS.compilation_cache,
            saved_program=flags.FLAGS.program,
        ),
        in_parallel=True,
        cache_of_user=False,
    )
