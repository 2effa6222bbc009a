"""Each config, expanded: a changed number must show up here."""

import argparse
import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from absl.testing import flagsaver
from flax import nnx

import configs
import hybrid_flax
from hybrid_flax import cli, evaluate
from hybrid_flax.build import build_model
from hybrid_flax.errors import InputError
from hybrid_flax.settings import Settings, from_config, replace, to_plain
from hybrid_flax.training.optimizers import decayed
from hybrid_flax.weights import bridge

# ml_collections reads config files so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIGS = configs.names()
RECIPES = {  # {recipe: a config of it}
    re.search(r"recipes\.(\w+)\(", pathlib.Path(f"configs/{name}.py").read_text())[1]: name
    for name in CONFIGS
}
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "configs.json"

DOCUMENT = pathlib.Path("docs/recipes.md").read_text()


@functools.cache
def settings(name) -> Settings:
    return from_config(configs.load(name))


def dotted(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= dotted(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def flat(name):
    return dotted(to_plain(settings(name)))


def test_there_is_one_config_for_every_model():
    more = ["l2vit_b_22k", "l2vit_b_22k_1k"]  # other ways to train one
    assert sorted({*hybrid_flax.list_models(), *more}) == list(CONFIGS)


def test_every_decision_named_is_explained():
    files = [path for path in pathlib.Path("configs").glob("*.py") if path.stem != "__init__"]
    named = {name for path in files for name in re.findall(r"\bD\d+\b", path.read_text())}
    rows = re.findall(r"^\| (D\d.*?) \|", DOCUMENT, re.MULTILINE)
    explained = set(re.findall(r"D\d+", " ".join(rows)))
    assert named - {"D1", "D62"} <= explained  # the ends of the whole list
    assert len(named) > 20


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_of_the_recipe(name):
    golden = json.loads(GOLDEN.read_text())
    want = golden["all"] | golden["different"].get(name, {})
    assert flat(name) == want, f"{name}: if this is meant: python -m tests.configs.test_configs"


def with_classes(name, **model) -> Settings:
    changes = {f"model.{field}": value for field, value in model.items()}
    return replace(settings(name), {"model.num_classes": 10} | changes)


def test_attention_is_chosen_where_there_are_windows():
    config = with_classes("gcvit_xxt", implementation="pallas")
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    assert model.stages[0].blocks[1].attn.implementation == "pallas"
    with pytest.raises(InputError, match="glnet_4g has no operation with kernels to choose"):
        build_model(with_classes("glnet_4g", implementation="pallas"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", [*CONFIGS, "quickstart", "finetune"])
def test_every_config_is_valid_and_locked(name):
    config = configs.load(name)
    assert config.is_locked
    with pytest.raises(AttributeError, match="learningrate"):
        config.optimizer.learningrate = 1.0
    assert settings(name).model.name in hybrid_flax.list_models()


@pytest.mark.parametrize("name", [*RECIPES.values(), "quickstart", "finetune"])
def test_the_model_of_a_recipe_builds_and_decays_in_part(name):
    config = with_classes(name)
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    params = bridge.get_weights(model)["params"]
    assert any(leaf.shape[-1:] == (10,) for leaf in jax.tree.leaves(params))
    flags = jax.tree.leaves(decayed(params, config.optimizer))
    assert 0 < sum(flags) < len(flags)


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Runs a program in this process: (its exit status, what it wrote to standard error)."""

    def started(main, argv, flags_parser):
        sys.exit(main(flags_parser(argv)))

    def run(*arguments, main=lambda config, workdir: 0):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        monkeypatch.setattr(cli.app, "run", started)
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
            cli.run(main)
        return end.value.code, capsys.readouterr().err

    return run


def test_a_started_program_says_what_it_cannot_use():
    result = subprocess.run(
        [
            *(sys.executable, "-m", "hybrid_flax.main", "--workdir=x"),
            *("--config=configs/quickstart.py", "--config.seed=-1", "--config.dataset.std=(0,0,0)"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert "error: --config.seed=-1: expected a whole number from 0" in result.stderr
    assert "--config.dataset.std=(0, 0, 0): expected three numbers from 0.001" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.learningrate=1"], 'Did you mean "learning_rate"'),
        (["--config.optimzer.learning_rate=1"], 'Did you mean "optimizer"'),
        (["--config.batch_size=many"], "flag --config.batch_size=many: invalid literal for int()"),
        (["--config.batch_size=1.5"], "flag --config.batch_size=1.5: invalid literal for int()"),
        (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        (["workdir=x"], "unexpected argument 'workdir=x'; flags begin with --"),
        ([], "--workdir is missing"),
    ],
)
def test_the_command_line_names_what_it_cannot_use(command_line, arguments, message):
    status, said = command_line("--config=configs/quickstart.py", *arguments)
    assert status == 2
    assert message in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing; to try: --config=configs/quickstart.py"),
        (["--config=configs/none.py"], "--config=configs/none.py: no such file, nor a config of"),
        (["--config=configs/quickstart.py", "--workdir=/nowhere"], "no checkpoint in"),
        (
            ["--workdir=x", "--config=configs/finetune.py:model=gcvit_xxx", "--config.epochs=8"],
            "unknown model 'gcvit_xxx'. Did you mean",
        ),
    ],
)
def test_missing_files_and_models_are_named(command_line, arguments, message):
    status, said = command_line(*arguments, main=evaluate.main)
    assert status == 2
    assert message in said


def test_fields_are_still_known_by_their_former_names(command_line):
    found = []
    status, said = command_line(
        *("--config=configs/quickstart.py", "--workdir=x", "--config.model.attention=xla"),
        "--config.loss.name=softmax",
        main=lambda config, workdir: found.append(config.model.implementation),
    )
    assert (status, found) == (None, ["xla"])
    assert "--config.model.attention is called --config.model.implementation now" in said
    assert "--config.loss.name is ignored: the loss follows from the model" in said


if __name__ == "__main__":
    argparse.ArgumentParser(description=f"Writes {GOLDEN}, as the configs are now.").parse_args()
    every = {name: flat(name) for name in CONFIGS}
    first, *others = every.values()
    common = {
        field: value for field, value in first.items() if all(o.get(field) == value for o in others)
    }
    different = {
        name: {field: value for field, value in config.items() if field not in common}
        for name, config in every.items()
    }
    lines = [f'  "{name}": {json.dumps(fields)}' for name, fields in different.items()]
    body = ",\n".join(lines)
    GOLDEN.write_text(f'{{"all": {json.dumps(common, indent=1)},\n"different": {{\n{body}\n}}}}\n')
