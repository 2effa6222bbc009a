"""A compiled step in a file: the same program, or the reason why it is not used."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_flax.distributed.mesh import make_mesh, replicated
from hybrid_flax.errors import InputError
from hybrid_flax.run import saved_program
from hybrid_flax.run.compiling import CompiledOnce
from hybrid_flax.run.saved_program import check_file, fingerprint, load, save, saved

MESH = make_mesh(jax.devices()[:2])
PLACE = replicated(MESH)
ARGUMENT = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=PLACE)


def step(factor=2.0):
    return jax.jit(lambda x: {"y": jnp.sin(x) * factor}, in_shardings=PLACE, out_shardings=PLACE)


@pytest.fixture
def file(tmp_path):
    lowered = step().lower(ARGUMENT)
    file = tmp_path / "step"
    assert save(str(file), lowered.compile(), fingerprint(lowered, MESH)) > 100
    file.chmod(0o600)
    return file


def refused(file, made=None, mesh=MESH):
    """Why the file is not used for a step."""
    found, why = load(str(file), (made or step()).lower(ARGUMENT), mesh)
    assert found is None
    return why


def test_a_saved_step_gives_what_the_compiled_one_gives(file, capsys):
    x = jax.device_put(np.arange(4, dtype=np.float32), PLACE)
    once = CompiledOnce(step(), "step", saved(str(file), MESH))
    assert once(x)["y"].tobytes() == step()(x)["y"].tobytes()
    assert f" s (from {file})" in capsys.readouterr().out


def test_another_program_is_named_and_compiled(file, caplog):
    once = CompiledOnce(step(3.0), "step", saved(str(file), MESH))
    x = jax.device_put(np.ones(4, np.float32), PLACE)
    np.testing.assert_allclose(once(x)["y"], 3 * np.sin(x), rtol=1e-6)
    assert once.made.source in ("new", "the cache")
    assert f"--program={file} is not used: it was made for something else (program: there" in (
        caplog.text
    )


def test_other_versions_devices_and_settings_are_named(file, monkeypatch):
    why = refused(file, mesh=make_mesh(jax.devices()[1:3]))
    assert "order of devices: there [[0, 0], [1, 0]], here [[1, 0], [2, 0]]" in why
    monkeypatch.setattr(jax, "__version__", "9.9.9")
    assert "jax: there '0." in refused(file)
    monkeypatch.undo()
    monkeypatch.setattr(saved_program, "processor", lambda: "another")
    assert "processor: there " in refused(file)
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert "setting XLA_FLAGS: there " in refused(file)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1], "it is damaged"),
        (lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "it is damaged"),
        (lambda content: b"", "it is no saved program of this version, or it is damaged"),
        (lambda content: b"[1]\n" + content, "it is no saved program of this version"),
        (lambda content: b"\xff" + content, "it is no saved program of this version"),
    ],
)
def test_a_damaged_file_is_not_loaded(file, damage, said):
    file.write_bytes(damage(file.read_bytes()))
    assert said in refused(file)


def test_nothing_is_unpickled_of_a_file_that_others_may_write(file, monkeypatch):
    monkeypatch.setattr(saved_program.serialize_executable, "deserialize_and_load", None)
    file.chmod(0o666)
    assert refused(file) == "others may write to it, and it is code"
    file.chmod(0o600)
    file.write_bytes(file.read_bytes() + b"more")
    assert refused(file) == "it is damaged"
    file.unlink()
    assert refused(file) == "No such file or directory"


def test_a_program_that_cannot_be_loaded_is_compiled(file):
    head, _, _ = file.read_bytes().partition(b"\n")
    about = json.loads(head) | {"sha256": saved_program.hashlib.sha256(b"no pickle").hexdigest()}
    file.write_bytes(json.dumps(about).encode() + b"\nno pickle")
    assert "it cannot be loaded (UnpicklingError" in refused(file)


def test_files_are_looked_at_first(tmp_path):
    with pytest.raises(InputError, match="no such file. Make it with python -m hybrid_flax.plan"):
        check_file(str(tmp_path / "none"))
    with pytest.raises(InputError, match="--program=gs://b/step"):
        check_file("gs://b/step")
    compiled = step().lower(ARGUMENT).compile()
    with pytest.raises(InputError, match="--save=.*/none/step: cannot write it: No such file"):
        save(str(tmp_path / "none" / "step"), compiled, {})
