"""Tables in documents are those that the registry, the configs and the figures make."""

import pytest

from docs import generate


def of(document: str, name: str) -> str:
    begin = f"<!-- generated: {name} -->\n"
    _, _, rest = (generate.ROOT / document).read_text().partition(begin)
    return rest.partition("\n<!-- end -->")[0]


SLOW = {"decay"}  # builds every model; test_decay_groups holds the rule by name


@pytest.mark.parametrize(
    ("document", "name"),
    [
        pytest.param(document, name, marks=[pytest.mark.slow] * (name in SLOW))
        for document, tables in generate.TABLES.items()
        for name in tables
    ],
)
def test_a_table_is_as_generated(document, name):
    made = generate.TABLES[document][name]()
    assert of(document, name) == made, f"{document} is stale: run {generate.COMMAND}"


def test_values_that_differ_within_a_row_say_whose_they_are():
    row = next(line for line in generate.regularisation().splitlines() if "GC ViT, S to L" in line)
    assert "| 0.3: s; 0.35: s2; 0.5: b, l |" in row


def test_a_model_that_was_not_measured_says_how_to():
    cells = generate._model("gcvit_b", {"cases": [], "multiply_adds": {}})
    assert "`make model NAME=gcvit_b` counts" in cells[3]
    assert cells[5] == "not compared"


def test_a_document_without_its_table_is_named(monkeypatch):
    monkeypatch.setattr(generate, "TABLES", {"docs/pods.md": {"models": str}})
    with pytest.raises(SystemExit, match=r"docs/pods.md has no lines <!-- generated: models -->"):
        generate.generated("docs/pods.md")
