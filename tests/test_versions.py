import jax
import pytest

from hybrid_flax import versions
from hybrid_flax.errors import InputError


def test_what_changes_bits_is_compared(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/x --xla_b")
    before = versions.numerics()
    assert before["XLA_FLAGS"] == "--xla_a=1 --xla_b"
    assert before["jax_default_prng_impl"] == "threefry2x32"
    versions.check_same_numerics(before, 5)
    with jax.threefry_partitionable(False), jax.default_matmul_precision("highest"):
        with pytest.raises(InputError) as error:
            versions.check_same_numerics(before, 5)
        said = str(error.value)
    assert "otherwise than at the checkpoint of step 5" in said
    assert "jax_threefry_partitionable was True, is False" in said
    assert "jax_default_matmul_precision was None, is highest" in said
    assert "`env -u JAX_DEFAULT_MATMUL_PRECISION JAX_THREEFRY_PARTITIONABLE=True`, or begin" in said


def test_flags_of_compilers_are_a_warning(monkeypatch, caplog):
    monkeypatch.setenv("XLA_FLAGS", "--xla_b --xla_force_host_platform_device_count=4 --xla_a")
    before = versions.numerics()
    monkeypatch.setenv("XLA_FLAGS", "--xla_a --xla_b")
    versions.check_same_numerics(before, 5)
    assert not caplog.records
    monkeypatch.setenv("XLA_FLAGS", "--xla_c")
    versions.check_same_numerics(before, 5)
    assert "XLA_FLAGS was '--xla_a --xla_b', is '--xla_c'. The result may differ" in caplog.text


def test_earlier_checkpoints_noted_nothing():
    versions.check_same_numerics({}, 5)


def test_the_commit_is_of_our_own_checkout(monkeypatch, tmp_path):
    assert versions.versions()["commit"] != "unknown"
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "site-packages" / "x" / "versions.py"))
    assert versions.versions()["commit"] == "unknown"
