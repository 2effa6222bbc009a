"""The smallest model of each paper agrees; `make parity` runs every model.

Gradients and training passes of all but one take minutes to compile: with `make test-all`.
"""

import pathlib

import pytest

import hybrid_flax
from tests.parity import BARS, GOLDEN, compare


def smallest_of_each_paper() -> list[pathlib.Path]:
    """Golden files, of tame weights where there are such."""
    found: dict[str, tuple[int, pathlib.Path]] = {}
    for name in hybrid_flax.list_models():
        info = hybrid_flax.model_info(name)
        for file in sorted(GOLDEN.rglob(f"{name}.json"), key=lambda file: len(file.parts)):
            if info.parameters <= found.get(info.paper, (info.parameters, file))[0]:
                found[info.paper] = info.parameters, file
    return [file for _, file in found.values()]


# What no smallest model has: several heads and a training pass, token labels, a detector's trunk.
MORE = (
    "ga/ga_convnext_t",
    "glnet/tame/glnet_4g_tklb",
    "stm/unified_halonet_micro",
    "stm/unified_pvt_micro_det_192x288",
)
SMALLEST = sorted(smallest_of_each_paper())
FASTEST = "gcvit_xxt"


def cases():
    """(golden file, whether gradients are compared)"""
    for file in SMALLEST:
        fast = file.stem == FASTEST
        if not fast:
            yield pytest.param(file, False, id=f"{file.stem}, forward")
        yield pytest.param(file, True, id=file.stem, marks=() if fast else pytest.mark.slow)
    for name in MORE:
        file = GOLDEN / f"{name}.json"
        yield pytest.param(file, True, id=file.stem, marks=pytest.mark.slow)


@pytest.mark.parametrize(("file", "gradients"), list(cases()))
def test_agrees_with_the_official_code(file, gradients):
    rows = list(compare(file, gradients=gradients))
    assert rows
    for row in rows:
        assert row.passes, row
        assert row.logits < BARS["logits"] / 10  # where it stands; a change that loses it is a bug


def test_every_paper_has_a_case_here():
    papers = {hybrid_flax.model_info(name).paper for name in hybrid_flax.list_models()}
    assert len(smallest_of_each_paper()) == len(papers)
