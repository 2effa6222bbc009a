"""Each config, expanded: a changed number must show up here."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx

import hybrid_flax
from benchmarks.plans import configs
from hybrid_flax.config import build_model, check
from hybrid_flax.errors import InputError
from hybrid_flax.run.workdir import to_plain
from hybrid_flax.training.optimizers import decayed
from hybrid_flax.weights import bridge

CONFIGS = sorted(configs())
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "configs.json"

DOCUMENT = pathlib.Path("docs/recipes.md").read_text()


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def dotted(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= dotted(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def flat(name):
    return json.loads(json.dumps(dotted(to_plain(get_config(name)))))


def test_there_is_one_config_for_every_model():
    more = ["l2vit_b_22k", "l2vit_b_22k_1k"]  # other ways to train one
    assert sorted({*hybrid_flax.list_models(), *more}) == CONFIGS


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


def test_attention_is_chosen_where_there_are_windows():
    config = get_config("gcvit_xxt")
    config.model.num_classes = 10
    config.model.attention = "pallas"
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    assert model.stages[0].blocks[1].attn.attention == "pallas"
    config = get_config("glnet_4g")
    config.model.attention = "pallas"
    with pytest.raises(InputError, match="glnet_4g has no field 'attention' to override"):
        build_model(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", [*CONFIGS, "quickstart", "finetune"])
def test_every_config_is_valid_locked_and_builds(name):
    config = get_config(name)
    assert config.is_locked
    check(config)
    config.model.num_classes = 10
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    params = bridge.get_weights(model)["params"]
    assert any(leaf.shape[-1:] == (10,) for leaf in jax.tree.leaves(params))
    flags = jax.tree.leaves(decayed(params, config.optimizer))
    assert 0 < sum(flags) < len(flags)


def program(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"hybrid_flax.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


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
def test_the_command_line_names_what_it_cannot_use(arguments, message):
    result = program("main", "--config=configs/quickstart.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("main", [], "--config is missing; to try: --config=configs/quickstart.py"),
        ("main", ["--config=configs/none.py"], "cannot read the config file"),
        ("evaluate", ["--config=configs/quickstart.py", "--workdir=/nowhere"], "no checkpoint in"),
    ],
)
def test_missing_files_are_named(module, arguments, message):
    result = program(module, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


if __name__ == "__main__":
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
