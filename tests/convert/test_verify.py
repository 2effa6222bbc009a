"""convert.verify, on files and beside a stand-in for an official repository."""

import json
import os
import shutil
import sys
import textwrap

import numpy as np
import pytest

import convert
import hybrid_flax
from convert.verify import main
from tests import reference

torch = pytest.importorskip("torch")

NAME = "unified_convnext_micro"

# The unified ConvNeXt written down for PyTorch from its description, with the names of the release.
OFFICIAL = textwrap.dedent(
    '''
    import torch
    from torch import nn


    class Norm(nn.LayerNorm):
        """Over the channels of [B, C, H, W]."""

        def __init__(self, dim):
            super().__init__(dim, eps=1e-6)

        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.dw_norm = Norm(dim)
            self.dw_input_proj = nn.Conv2d(dim, dim, 1)
            self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
            self.dw_out_proj = nn.Conv2d(dim, dim, 1)
            self.gamma_1 = nn.Parameter(torch.ones(1, dim, 1, 1))
            self.pw_norm = nn.LayerNorm(dim, eps=1e-6)
            self.pwconv1 = nn.Linear(dim, 4 * dim)
            self.pwconv2 = nn.Linear(4 * dim, dim)
            self.gamma_2 = nn.Parameter(torch.ones(1, 1, 1, dim))

        def forward(self, x):
            y = self.dw_out_proj(self.dwconv(self.dw_input_proj(self.dw_norm(x))))
            x = (x + self.gamma_1 * y).permute(0, 2, 3, 1)
            y = self.pwconv2(nn.functional.gelu(self.pwconv1(self.pw_norm(x))))
            return (x + self.gamma_2 * y).permute(0, 3, 1, 2)


    def part(name, *layers):
        module = nn.Module()
        setattr(module, name, nn.Sequential(*layers))
        return module


    class Model(nn.Module):
        def __init__(self, dims=(32, 64, 128, 256), depths=(3, 3, 8, 3)):
            super().__init__()
            first, half = dims[0], dims[0] // 2
            stem = part(
                "stem",
                nn.Conv2d(3, half, 3, 2, 1), Norm(half), nn.GELU(),
                nn.Conv2d(half, first, 3, 2, 1), Norm(first),
            )
            reductions = [
                part("reduction", nn.Conv2d(a, b, 3, 2, 1, bias=False), Norm(b))
                for a, b in zip(dims, dims[1:])
            ]
            self.downsample_layers = nn.ModuleList([stem, *reductions])
            self.stages = nn.ModuleList(
                [nn.Sequential(*(Block(d) for _ in range(n))) for d, n in zip(dims, depths)]
            )
            self.stage_norms = nn.ModuleList([Norm(dim) for dim in dims])
            wide = dims[-1] * 3 // 2
            self.conv_head = nn.Sequential(
                nn.Conv2d(dims[-1], wide, 1, bias=False), nn.BatchNorm2d(wide), nn.GELU()
            )
            self.head = nn.Linear(wide, 1000)

        def forward(self, x):
            for down, stage, norm in zip(self.downsample_layers, self.stages, self.stage_norms):
                (reduce,) = down.children()
                x = norm(stage(reduce(x)))
            return self.head(self.conv_head(x).mean((2, 3)))


    def unified_convnext_micro():
        return Model()
    '''
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A checkout of the official repository, as far as verify looks into it."""
    root = tmp_path_factory.mktemp("official")
    folder = root / "classification" / "models" / "model_factory"
    folder.mkdir(parents=True)
    (folder / "convnext_factory.py").write_text(OFFICIAL)
    return root


@pytest.fixture(autouse=True)
def forget_imports():
    """Official code is imported as `models`, anew in each test."""
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def state():
    exported = convert.to_state_dict(reference.model(NAME))
    return {key: torch.tensor(array) for key, array in exported.items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / f"{NAME}.pth"
    torch.save({"model": state, "epoch": 299}, path)
    return path


def verify(*arguments):
    return main([NAME, *map(str, arguments)])


def test_a_good_file_beside_the_official_code(file, repository, capsys):
    assert verify(file, f"--reference={repository}") == 0
    said = capsys.readouterr().out
    assert "pass  conversion  " in said
    assert "4,439,624, the official model has 4,439,624" in said
    assert "| stages/2 | " in said
    assert said.endswith("all checks pass\n")


def test_the_report_as_json_names_every_layer(file, repository, capsys):
    assert verify(file, f"--reference={repository}", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["first_difference"] is None
    assert report["top1_agreement"] == 1
    layers = {layer["layer"]: layer for layer in report["layers"]}
    assert next(iter(layers)) == "stem/conv1"  # in calling order
    assert list(layers)[-1] == "logits"
    assert layers["stages/2/blocks/7/mixer/depthwise"]["official"] == "stages.2.7.dwconv"
    assert layers["stages/3/blocks/2"]["relative_error"] < 1e-5
    assert layers["conv_head/norm"]["cosine"] == pytest.approx(1)


def test_the_first_layer_that_differs_is_named(file, repository, tmp_path, capsys):
    other = tmp_path / "official"
    shutil.copytree(repository, other)
    code = other / "classification" / "models" / "model_factory" / "convnext_factory.py"
    code.write_text(
        OFFICIAL.replace("self.dw_input_proj(", "nn.functional.gelu(self.dw_input_proj(").replace(
            "dw_norm(x))))", "dw_norm(x)))))"
        )
    )
    assert verify(file, f"--reference={other}") == 1
    said = capsys.readouterr().out
    assert "FAIL  layers" in said
    assert "stages/0/blocks/0/mixer/depthwise is the first to differ" in said
    assert "FAIL  logits" in said


def test_weights_that_the_official_model_does_not_take(state, repository, tmp_path, capsys):
    path = tmp_path / "five_classes.pth"
    cut = {key: state[key][:5].clone() for key in ("head.weight", "head.bias")}
    torch.save({"model": state | cut}, path)
    assert verify(path, f"--reference={repository}") == 2
    said = capsys.readouterr().err
    assert f"unified_convnext_micro of {repository} does not take these weights" in said
    assert "give that file, or leave --reference out" in said
    assert "size mismatch for head.bias" in said


def test_official_weights_of_other_names(file, repository, tmp_path, capsys):
    other = tmp_path / "official"
    shutil.copytree(repository, other)
    code = other / "classification" / "models" / "model_factory" / "convnext_factory.py"
    code.write_text(OFFICIAL.replace("self.gamma_1", "self.ls1"))
    assert verify(file, f"--reference={other}") == 2
    said = capsys.readouterr().err
    assert 'Missing key(s) in state_dict: "stages.0.0.ls1"' in said
    assert 'Unexpected key(s) in state_dict: "stages.0.0.gamma_1"' in said


def test_half_precision_beside_the_official_code(state, repository, tmp_path, capsys):
    path = tmp_path / "half.pth"
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": half}, path)
    assert verify(path, f"--reference={repository}") == 0
    assert "pass  logits" in capsys.readouterr().out


def test_without_the_official_code(file, capsys):
    assert verify(file) == 0
    said = capsys.readouterr().out
    assert "finite on 2 images" in said
    assert "layers" not in said


def test_a_folder_of_images(file, tmp_path, capsys):
    from PIL import Image

    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (240, 300, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.{'PNG' if i else 'tif'}")
    (tmp_path / "._0.png").write_bytes(b"of another system's file manager")
    assert verify(file, f"--images={tmp_path}") == 0
    assert "finite on 3 images" in capsys.readouterr().out
    assert verify(file, f"--images={os.path.dirname(file)}") == 2
    assert "holds no .jpeg, .jpg" in capsys.readouterr().err
    assert verify(file, f"--images={tmp_path}/none") == 2
    assert "error: cannot look into the folder" in capsys.readouterr().err


def test_files_that_do_not_fit_or_are_not_finite(state, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save({"model": {key: value for key, value in state.items() if "gamma" not in key}}, path)
    assert verify(path) == 1
    said = capsys.readouterr().out
    assert "FAIL  conversion" in said
    assert "stages.0.0.gamma_1" in said
    torch.save({"model": state | {"head.bias": torch.full((1000,), torch.nan)}}, path)
    assert verify(path) == 1
    said = capsys.readouterr().out
    assert "pass  round trip  the same keys, layouts and bits" in said
    assert "FAIL  outputs     not all finite" in said


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_comes_back_widened(state, tmp_path, capsys, dtype):
    path = tmp_path / "half.pth"
    half = {
        k: v.to(getattr(torch, dtype)) if v.is_floating_point() else v for k, v in state.items()
    }
    half["head.bias"][0] = torch.nan
    torch.save({"model": half}, path)
    assert verify(path) == 1  # its outputs are not finite
    said = capsys.readouterr().out
    assert f"pass  round trip  the same keys, layouts and values, {dtype} as float32\n" in said


def test_what_cannot_be_used_is_said(file, tmp_path, capsys):
    assert verify() == 2
    assert "give either the file or --download" in capsys.readouterr().err
    assert verify(file, f"--reference={tmp_path}") == 2
    assert (
        "has no classification/models/model_factory/convnext_factory.py" in capsys.readouterr().err
    )
    broken = tmp_path / "classification" / "models" / "model_factory"
    broken.mkdir(parents=True)
    (broken / "convnext_factory.py").write_text("import not_installed_here\n")
    assert verify(file, f"--reference={tmp_path}") == 2
    said = capsys.readouterr().err
    assert "No module named 'not_installed_here'. Install what that repository requires" in said
    assert main(["ga_vit_s", str(file), "--reference=x"]) == 1  # its state does not fit at all
    assert main(["ga_vit_s", "--download"]) == 2
    assert "no weights of ga_vit_s were released" in capsys.readouterr().err


def test_pretrained_takes_the_file_in_the_cache(file, state, monkeypatch, capsys):
    monkeypatch.setenv("HYBRID_FLAX_CACHE", os.path.dirname(file))
    model = hybrid_flax.create_model(NAME, num_classes=5, pretrained=True)
    assert "the classifier for 1000 classes is replaced by a fresh one for 5" in (
        capsys.readouterr().out
    )
    weights = convert.to_state_dict(model)
    assert weights["head.weight"].shape == (5, 384)
    for key in ("stages.3.2.dwconv.weight", "conv_head.1.running_var"):
        np.testing.assert_array_equal(weights[key], state[key].numpy())
