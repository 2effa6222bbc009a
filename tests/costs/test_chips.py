"""Datasheet figures, the platform's name, and what lies in the package."""

import importlib.resources
from types import SimpleNamespace

import jax
import pytest

from hybrid_flax.costs import chips
from hybrid_flax.costs.subjects import Subject
from hybrid_flax.costs.targets import H200


@pytest.mark.parametrize(
    ("backend", "version", "name"),
    [
        ("cpu", "cpu", "cpu"),
        ("tpu", "TPU v5 lite", "tpu"),
        ("gpu", "PJRT C API\ncuda 13000", "cuda"),
        ("gpu", "PJRT C API\nrocm 60200", "rocm"),
        ("METAL", "", "METAL"),
    ],
)
def test_the_platform_is_named_as_lowering_names_it(monkeypatch, backend, version, name):
    device = SimpleNamespace(client=SimpleNamespace(platform_version=version))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert chips.platform_name() == name


def test_a_platform_without_kernels_runs_xla_and_says_so(monkeypatch):
    monkeypatch.setattr(chips, "platform_name", lambda: "METAL")
    (operation, *_) = Subject(
        "ours", "l2vit_t", image_size=None, dtype="float32", depths=(1, 1, 1, 1)
    ).operations()
    assert operation["kernel"] is None
    assert operation["why"] == "there is no kernel for platform METAL"


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "TPU v6e"])
def test_a_chip_s_figures_are_found_by_its_kind(monkeypatch, kind):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    found = chips.chip()
    assert 1e14 < found.flops < 1e15
    assert 1e12 < found.bandwidth < 5e12


def test_the_description_of_the_h200_is_a_file_of_its_package():
    file = importlib.resources.files("hybrid_flax.costs") / "h200.textproto"
    assert "CUDA" in file.read_text()
    assert file.read_text() == H200.read_text()
