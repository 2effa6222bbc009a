"""The README leads to every room and every program, and its examples run."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import configs
import convert
import hybrid_flax
from hybrid_flax.build import build_model, checked
from hybrid_flax.models.unified.mixer import Place
from hybrid_flax.models.unified.model import MIXERS
from hybrid_flax.settings.arguments import override, take_overrides
from hybrid_flax.weights import bridge
from tests.parity import GOLDEN, golden_state

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
WEIGHTS = (ROOT / "docs" / "weights.md").read_text()
DOORS = {"hybrid_flax.checkpoints", "hybrid_flax.data.inspect"}  # for old names, which say the new
INNER = {"hybrid_flax.data.sources.table_scan"}  # what another program starts
PROGRAMS = ("hybrid_flax", "convert", "benchmarks", "docs")


def tree() -> list[str]:
    """Paths of the tree in "Find your way"."""
    block = README.partition("## Find your way")[2].split("```")[1]
    found, folders = [], [""]
    for line in block.splitlines():
        names = re.match(r"^( *)((?:[\w.]+(?:/| |$))+)", line)
        if names and not line.startswith(" " * 12):
            depth = len(names[1]) // 2
            for name in re.findall(r"[\w.]+/?", names[2]):
                if name.endswith("/") or name.endswith(".py"):
                    path = folders[depth] + name
                    found.append(path)
                    if name.endswith("/"):
                        folders[depth + 1 :] = [path]
    return found


def test_the_tree_names_what_is_there():
    assert "hybrid_flax/run/storage/" in tree()
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_the_tree_leaves_no_room_out():
    rooms = [path for path in ROOT.glob("hybrid_flax/*") if path.suffix in (".py", "")]
    doors = {"__init__.py", "checkpoints.py", "__pycache__"}
    names = {f"hybrid_flax/{room.name}{'/' * room.is_dir()}" for room in rooms}
    assert names - {f"hybrid_flax/{door}{'/' * (door[-3:] != '.py')}" for door in doors} <= set(
        tree()
    )


def test_every_program_has_its_row():
    section = README.partition("## Commands")[2].partition("## Pages")[0]
    listed = set(re.findall(r"python -m ([\w.]+)", section))
    files = [file for package in PROGRAMS for file in (ROOT / package).rglob("*.py")]
    programs = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for file in files
        if '__name__ == "__main__"' in file.read_text()
    }
    assert programs - DOORS - INNER == {name for name in listed if not name.startswith("tests.")}


def test_every_page_is_linked():
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", README))


def code(text: str, first: str) -> str:
    """The Python example that begins with `first`."""
    (found,) = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if first in block
    ]
    return found


def test_the_first_use_of_a_model_runs(monkeypatch, tmp_path, capsys):
    names: dict = {}
    example = code(README, "model_input(").replace('"photo.jpg"', f'"{tmp_path}/photo.jpg"')
    Image.new("RGB", (300, 200), "orange").save(tmp_path / "photo.jpg")

    def create_model(name, *, pretrained):
        assert pretrained
        tiny = {"depths": (1, 1, 1, 1), "dims": (32,) * 4}
        model = bridge.abstract(lambda: real(name, **tiny))
        weights = bridge.get_weights(model)
        bridge.set_weights(model, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), weights))
        return model

    real = hybrid_flax.create_model
    monkeypatch.setattr(hybrid_flax, "create_model", create_model)
    exec(example, names)
    assert names["images"].shape == (1, 224, 224, 3)
    assert names["images"].dtype == np.float32
    assert names["logits"].shape == (1, 1000)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_weights_are_loaded_as_their_page_shows(monkeypatch):
    record = json.loads((GOLDEN / "gcvit/gcvit_b.json").read_text())
    real = hybrid_flax.create_model
    monkeypatch.setattr(
        hybrid_flax, "create_model", lambda name: bridge.abstract(lambda: real(name))
    )
    monkeypatch.setattr(convert, "load_checkpoint", lambda file: golden_state(record))

    def run(images):
        names = {"images": images}
        exec(code(WEIGHTS, "create_model"), names)
        return names["logits"], names["maps"]

    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    logits, maps = jax.eval_shape(run, images)
    assert logits.shape == (2, 1000)
    assert [224 // each.shape[1] for each in maps] == [4, 8, 16, 32]


MIXER = README[README.index("**To add a token mixer**") : README.index("**To add a model**")]


@pytest.fixture
def pooling(monkeypatch) -> type:
    """The token mixer of the README, registered as it says."""
    names: dict = {}
    exec(code(MIXER, "class PoolingMixer"), names)
    monkeypatch.setitem(MIXERS, "pooling", names["PoolingMixer"])
    return names["PoolingMixer"]


def test_the_lines_that_register_it_fit_where_they_go():
    importing, entry = re.findall(r"```\n(.*)\n(.*)\n```", MIXER)[0]
    source = (ROOT / "hybrid_flax/models/unified/model.py").read_text()
    assert importing == "from hybrid_flax.models.unified.pooling import PoolingMixer"
    assert entry == '    "pooling": PoolingMixer,'
    assert '    "swin": ShiftedWindowAttention,\n' in source


def test_the_token_mixer_averages_and_keeps_its_dtype(pooling):
    x = jnp.arange(9.0).reshape(1, 3, 3, 1).astype(jnp.bfloat16)
    mixer = pooling(1, Place(0, 0, 3, False), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    mixed = mixer(x)
    assert mixed.dtype == jnp.bfloat16
    assert float(mixed[0, 0, 0, 0]) == (0 + 1 + 3 + 4) / 4 - 0  # places outside do not count
    assert float(mixed[0, 1, 1, 0]) == 0


def test_the_command_shown_trains_a_model_with_the_token_mixer(pooling, capsys):
    (command,) = re.findall(r"python -m hybrid_flax.main (.*)", MIXER)
    arguments, fields = take_overrides(command.split())
    assert fields == {"mixer": "pooling"}
    name = arguments[0].removeprefix("--config=configs/").removesuffix(".py")
    config = configs.load(name)
    override(config, fields | {"depths": (1, 1, 1, 1)})
    config.model.num_classes = 10
    settings = checked(config)
    assert settings.optimizer.decay_never == ()
    assert "decay_never: '/position_bias$' left out" in capsys.readouterr().out
    built = bridge.abstract(lambda: build_model(settings, rngs=nnx.Rngs(0)))
    assert type(built.stages[3].blocks[0].mixer) is pooling
