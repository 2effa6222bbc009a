"""Golden files are written from a PyTorch model as an authors' repository has it, and read back."""

import json
import pathlib
import sys

import pytest

from tests import parity, write_golden

# A small model of the Unified family with ConvNeXt's mixer, as the official repository names it.
CHECKOUT = """
import torch
from torch import nn


class ChannelNorm(nn.LayerNorm):  # of NCHW
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.gamma_2 = nn.Parameter(torch.ones(1, 1, 1, dim))
        self.dw_norm = ChannelNorm(dim, eps=1e-6)
        self.dw_input_proj = nn.Conv2d(dim, dim, 1)
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.dw_out_proj = nn.Conv2d(dim, dim, 1)
        self.pw_norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        branch = self.dwconv(self.dw_input_proj(self.dw_norm(x)))
        x = x + self.gamma_1 * self.dw_out_proj(branch)
        y = self.pw_norm(x.permute(0, 2, 3, 1))
        y = self.gamma_2 * self.pwconv2(nn.functional.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class Down(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        if dim == 3:
            half = out // 2
            self.stem = nn.Sequential(
                nn.Conv2d(3, half, 3, 2, 1), ChannelNorm(half, eps=1e-6), nn.GELU(),
                nn.Conv2d(half, out, 3, 2, 1), ChannelNorm(out, eps=1e-6))
        else:
            self.reduction = nn.Sequential(
                nn.Conv2d(dim, out, 3, 2, 1, bias=False), ChannelNorm(out, eps=1e-6))

    def forward(self, x):
        return self.stem(x) if hasattr(self, "stem") else self.reduction(x)


class Model(nn.Module):
    def __init__(self, dims=(16, 16, 32, 32)):
        super().__init__()
        pairs = zip((3, *dims), dims)
        self.downsample_layers = nn.ModuleList(Down(a, b) for a, b in pairs)
        self.stages = nn.ModuleList(nn.Sequential(Block(dim)) for dim in dims)
        self.stage_norms = nn.ModuleList(ChannelNorm(dim, eps=1e-6) for dim in dims)
        wide = dims[-1] * 3 // 2
        self.conv_head = nn.Sequential(
            nn.Conv2d(dims[-1], wide, 1, bias=False), nn.BatchNorm2d(wide), nn.GELU())
        self.head = nn.Linear(wide, 1000)

    def forward(self, x):
        for down, stage, norm in zip(self.downsample_layers, self.stages, self.stage_norms):
            x = norm(stage(down(x)))
        return self.head(self.conv_head(x).mean((2, 3)))


def unified_convnext_micro():
    return Model()
"""
NAME = "unified_convnext_micro"
OVERRIDES = {"dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*arguments) → exit status of `python -m tests.write_golden NAME` for a small checkout."""
    factories = tmp_path / "checkout/classification/models/model_factory"
    factories.mkdir(parents=True)
    (factories / "convnext_factory.py").write_text(CHECKOUT)

    def run(*arguments) -> int:
        fixed = [NAME, f"--reference={tmp_path}/checkout", "--image_size=64", f"--out={tmp_path}"]
        fixed.append(f"--overrides={json.dumps(OVERRIDES)}")
        monkeypatch.setattr(sys, "argv", ["write_golden", *fixed, *arguments])
        return write_golden.main()

    yield run
    for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
        del sys.modules[name]


@pytest.mark.slow
def test_what_is_written_is_what_parity_compares(run, tmp_path):
    assert run("--stage=stem:downsample_layers.0", "--stage=stage4:stage_norms.3") == 0
    (row,) = parity.compare(tmp_path / f"{NAME}.json")
    assert row.case == NAME
    assert row.images == "2×64×64"
    assert row.passes, row
    assert row.logits < 1e-5
    assert not row._replace(loss=1e-2).passes
    record = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert record.keys() <= parity_fields()
    assert set(record["cases"][0]["stages"]) == {"stem", "stage4"}
    assert record["other_entries"] == {"conv_head.1.num_batches_tracked": [[], "torch.int64"]}


def parity_fields() -> set[str]:
    """What the golden files of the five papers have, and what parity reads beside that."""
    known = json.loads((parity.GOLDEN / f"stm/{NAME}.json").read_text())
    return {*known, "overrides", "unfilled"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--stage: none is given; expected at least one of conv_head, logits, pooled"),
        (
            ["--stage=steam:downsample_layers.0"],
            "--stage: steam; expected at least one of",
        ),
        (
            ["--stage=stem:patch_embed"],
            "the official model has no patch_embed",
        ),
        (["--stage=stem:head", "--reference=/nowhere"], "give the root of a checkout"),
    ],
)
def test_what_cannot_be_written_is_said(run, capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_figures_of_one_model_leave_the_others_in_place():
    old_row = {"case": "gcvit_b", "logits": 1e-7}
    versions = {"machine": "another", "versions": {"jax": "0.1"}}
    replaced = {"case": "l2vit_t (train)", "logits": 1.0}
    old = versions | {"cases": [old_row, replaced], "multiply_adds": {"gcvit_b": 5, "l2vit_t": 1}}
    row = parity.Parity("l2vit_t", "2×224×224", 1e-7, 1e-7, None, None, None, 1.0)
    new = parity.merge(old, [row], ["l2vit_t"])
    assert [case["case"] for case in new["cases"]] == ["gcvit_b", "l2vit_t"]
    assert new["cases"][0] == old_row
    assert new["machine"] == "another"
    assert new["cases"][1]["versions"] != {"jax": "0.1"}  # its own
    assert new["multiply_adds"]["gcvit_b"] == 5
    assert new["multiply_adds"]["l2vit_t"] > 4e9


def test_a_model_without_golden_files_says_how_to_write_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity", "ga_vit_s"])
    assert parity.main() == 0
    assert "python -m tests.write_golden ga_vit_s --reference=CHECKOUT" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["parity", "nothing"])
    assert parity.main() == 1
    assert "no model or golden file matches nothing" in capsys.readouterr().err
    assert pathlib.Path(parity.GOLDEN).is_dir()
