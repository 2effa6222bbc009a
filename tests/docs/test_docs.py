"""What the documents name is there."""

import ast
import functools
import pathlib
import re

import pytest

from configs import gcvit_b
from hybrid_flax.models.registry import list_models, model_variant

ROOT = pathlib.Path(__file__).parents[2]
DOCS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pallas/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()

every_document = pytest.mark.parametrize(
    "document", DOCS, ids=lambda path: str(path.relative_to(ROOT))
)


@functools.cache
def functions_of(file: str) -> set[str]:
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_shows_a_promise_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", RELIABILITY)
    assert len(named) > 20
    assert [f"{file}::{name}" for file, name in named if name not in functions_of(file)] == []


def test_every_promise_has_its_row_and_a_test_or_says_that_it_has_none():
    rows = re.findall(r"^\| R(\d+) \|(.*)$", RELIABILITY, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 50))
    without = [number for number, row in rows if "::test_" not in row]
    assert [number for number, row in rows if "| not shown yet |" in row] == without


def test_every_module_that_keeps_a_promise_exists():
    rows = re.findall(r"^\| R\d+ \|[^|]*\|([^|]*)\|", RELIABILITY, flags=re.MULTILINE)
    modules = re.findall(r"`([\w/]+\.py)`", " ".join(rows))
    assert len(modules) > 20
    assert [name for name in modules if not (ROOT / "hybrid_flax" / name).exists()] == []


@every_document
def test_every_file_linked_is_there(document):
    links = re.findall(r"\]\((?!http)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@every_document
def test_every_part_linked_is_there(document):
    for file, part in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", document.read_text()):
        target = document.parent / file if file else document
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert part in anchors, f"{file}#{part}"


@every_document
def test_every_file_named_with_its_folder_is_there(document):
    top = "hybrid_flax|convert|configs|pallas|benchmarks|tests|docs|launch"
    named = re.findall(rf"`((?:{top})/[\w/.]+)`", document.read_text())
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


@every_document
def test_every_field_named_is_in_the_configs(document):
    for name in re.findall(r"--config\.([\w.]*\w)", document.read_text()):
        if name.startswith("model.overrides."):  # of some family's Variant
            fields = {"FIELD"}.union(*(vars(model_variant(model)) for model in list_models()))
            assert name.rpartition(".")[2] in fields, name
            continue
        value = gcvit_b.get_config()
        for part in name.split("."):
            assert part in value, name
            value = value[part]


@every_document
def test_every_program_named_is_there(document):
    top = "hybrid_flax|convert|benchmarks|tests|docs"
    for name in re.findall(rf"python -m ((?:{top})[\w.]*\w)", document.read_text()):
        path = ROOT / name.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert file.exists(), name
        assert file.name == "__main__.py" or '__name__ == "__main__"' in file.read_text(), name
