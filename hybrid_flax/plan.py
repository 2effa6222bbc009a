"""What a training run would need on machines that are not here: compiled for them, not run.

python -m hybrid_flax.plan --config=configs/gcvit_l.py --topology=v5e:16x16 [--largest_batch]

The very step that `hybrid_flax.main` would run is compiled by the machines' own compiler, for the
config's batch and mesh; with --config.mesh.num_slices=2 for two slices of that topology. TPUs need
`pip install libtpu`, the H200 `pip install "jax[cuda13]"`; neither needs a chip. It takes minutes,
nearly all of them for machine code: `--quick` stops before it is made, on TPUs. `--json` prints the
figures alone.

`--save=FILE` writes the compiled step, which `python -m hybrid_flax.main --program=FILE` loads on
such machines instead of compiling it. Give the number of training images with it
(`--train_images=`) and of classes (`--config.model.num_classes=`): the step depends on them. The
file is code: load none that you would not run. `--topology=cpu:1` stands for this machine.

Speed is not foretold: a compiler does not know it. `--scaling` shows what a simple model makes of
the figures (scaling.py says what it assumes).
"""

import json

import ml_collections
from absl import flags

from hybrid_flax import cli
from hybrid_flax.costs import scaling
from hybrid_flax.costs.plan_text import show, show_scaling
from hybrid_flax.costs.targets import EXAMPLES, find_target, set_up
from hybrid_flax.errors import InputError
from hybrid_flax.run import compilation_cache
from hybrid_flax.step_plan import IMAGENET, largest_batch, plan


def main(config: ml_collections.ConfigDict, options) -> int:
    """Plans and prints; 1 if the step does not fit."""
    set_up()
    with compilation_cache.cached(options.compilation_cache, compilation_cache.user_folder()):
        return _main(config, options)


def _main(config: ml_collections.ConfigDict, options) -> int:
    mesh = config.mesh
    if options.scaling and (mesh.fsdp, mesh.tensor, max(1, mesh.num_slices)) != (1, 1, 1):
        raise InputError(
            "--scaling starts from one slice that only splits the images; leave --config.mesh as "
            "it is (the model adds the slices itself)"
        )
    target = find_target(options.topology or "", max(1, mesh.num_slices))
    if options.save and options.quick:
        raise InputError("--save with --quick: there is no program to save without machine code")
    found = plan(
        config, target, options.quick, save=options.save, train_images=options.train_images
    )
    lines = [show(found)]
    if options.save and "saved_bytes" in found:
        lines.append(f"saved the training step to {options.save}: {found['saved_bytes']:,} bytes")
    if options.scaling and "collectives" in found:
        found["scaling"] = scaling.of_plan(found, target.chip)
        lines.append(show_scaling(found["scaling"]))
    if options.largest_batch:
        found["largest_batch"] = largest_batch(config, target, options.quick)
        lines.append(f"largest batch that fits: {found['largest_batch']}")
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines))
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, f"Machines: {EXAMPLES}.")
    flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits, by compiling.")
    flags.DEFINE_bool("quick", False, "Stop before machine code is made: a tenth of the time.")
    flags.DEFINE_bool("scaling", False, "Show what a simple model says of 8 to 1024 chips.")
    flags.DEFINE_string(
        "save", "", "File for the compiled step, for hybrid_flax.main --program=FILE."
    )
    flags.DEFINE_integer(
        "train_images", IMAGENET, "In the training split: schedules count epochs.", lower_bound=1
    )
    flags.DEFINE_bool("json", False, "Print the figures alone, as JSON.")
    cli.run(
        lambda config, workdir: main(config, flags.FLAGS),
        needs_workdir=False,
        cache_of_user=False,
    )
