"""The rooms of the house, read from its imports: data flows one way, and tests mirror the tree."""

import ast
import functools
import pathlib
from graphlib import CycleError, TopologicalSorter

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("hybrid_flax", "convert", "pallas")  # configs is a link


def module_name(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def modules() -> dict[str, ast.Module]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {module_name(file): ast.parse(file.read_text()) for file in files}


def imports(module: str) -> set[str]:
    """Modules of ours that one imports, also inside its functions."""
    found = set()
    for node in ast.walk(modules()[module]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in PACKAGES:
                while name not in modules():  # a class or function: its module
                    name = name.rpartition(".")[0]
                found.add(name)
    return found - {module}


def room(module: str) -> str:
    """The folder a module lies in; a module at the root of hybrid_flax is a room of its own."""
    package, *rest = module.split(".")
    if package != "hybrid_flax":
        return package
    return ".".join((package, *rest[:1]))


def rooms() -> dict[str, set[str]]:
    """{room: the other rooms it imports from}; the façade, `hybrid_flax` itself, is one."""
    found: dict[str, set[str]] = {}
    for module in modules():
        found.setdefault(room(module), set()).update(map(room, imports(module)))
    return {name: others - {name} for name, others in found.items()}


def test_no_room_imports_from_one_that_imports_from_it():
    try:
        TopologicalSorter(rooms()).prepare()
    except CycleError as error:
        pytest.fail(f"rooms in a circle: {' → '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("low", "may_import"),
    [
        ("pallas", set()),
        ("hybrid_flax.layers", {"pallas", "hybrid_flax.errors"}),
        ("hybrid_flax.models", {"hybrid_flax.layers", "pallas", "hybrid_flax.errors"}),
    ],
)
def test_kernels_layers_and_models_know_nothing_above_them(low, may_import):
    assert rooms()[low] <= may_import


def test_only_the_facade_reaches_from_the_package_to_the_converters():
    users = {module for module in modules() if "convert" in map(room, imports(module))}
    outside = {module for module in users if room(module) != "convert"}
    assert outside <= {"hybrid_flax", "hybrid_flax.start", "hybrid_flax.opened"}


def test_tests_lie_where_the_code_lies_that_they_test():
    tests = ROOT / "tests"
    for file in tests.rglob("test_*.py"):
        folder = file.parent.relative_to(tests)
        if folder == pathlib.Path():
            name = file.name.removeprefix("test_")
            assert (
                (ROOT / "hybrid_flax" / name).exists()
                or (tests / name).exists()
                or (file == pathlib.Path(__file__))
            ), f"{file.name} at the root of tests/ tests no module at the root of hybrid_flax/"
        elif folder != pathlib.Path("end_to_end"):
            assert (ROOT / "hybrid_flax" / folder).is_dir() or (ROOT / folder).is_dir(), (
                f"{file.relative_to(ROOT)}: there is no folder {folder} to mirror"
            )


def test_a_folder_holds_more_than_one_file():
    for folder in {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) > 2 or any(
            child.is_dir() and child.name != "__pycache__" for child in folder.iterdir()
        ), f"{folder.relative_to(ROOT)} holds one file: it is a file"
