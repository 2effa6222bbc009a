"""The README's figures are those of the registry and of the last `make parity SAVE=…`."""

import json
import pathlib
import re

import pytest

import hybrid_flax

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PARITY = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())


def row(name: str) -> str:
    info = hybrid_flax.model_info(name)
    cases = [case for case in PARITY["cases"] if case["case"].removesuffix(" (train)") == name]
    gradients = [case[key] for case in cases for key in ("norms", "projections") if case[key]]
    counted = f"{PARITY['multiply_adds'][name] / 1e9:.1f}"
    crop = info.eval_transform
    weights = (
        f"[{info.release_file}]({info.release_page})" if info.release_file else "none released"
    )
    cells = [
        f"`{name}`",
        f"{info.top1:.1f}" if info.top1 else "–",
        f"{info.parameters / 1e6:.1f} M",
        f"{info.gflops:.1f} ({counted})" if info.gflops else f"– ({counted})",
        f"{info.image_size}, {crop.crop_mode} {crop.crop_fraction:g}",
        f"{max(case['logits'] for case in cases):.0e}" if cases else "no official code",
        f"{max(gradients):.0e}" if gradients else "",
        weights,
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", hybrid_flax.list_models())
def test_every_model_has_its_row(name):
    assert row(name) in README.splitlines()


def test_every_model_named_is_known():
    named = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    assert named == set(hybrid_flax.list_models())


def test_every_file_named_is_there():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"configs/\w+\.py", README):
        assert (ROOT / path).exists(), path


def test_every_field_named_is_in_the_configs():
    from configs import gcvit_b

    config = gcvit_b.get_config()
    for name in re.findall(r"--config\.([\w.]+)", README):
        value = config
        for part in name.split("."):
            assert part in value, name
            value = value[part]


if __name__ == "__main__":  # the rows, to be pasted into the README
    for model in hybrid_flax.list_models():
        print(row(model))
