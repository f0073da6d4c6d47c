"""The floor plan: rooms on storeys, nobody climbs, doors are used, and one wall keeps torch out of half the house.

What a room is for stands in its `__init__`; which storey it is on stands here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "fastcompat"

# From the ground up. A room may use what stands below it, never what stands beside or above it.
STOREYS = [
    {"errors", "wording", "version", "hub"},
    {"rows", "ops", "cloud"},
    {"corpus", "tokens", "metrics"},
    {"store", "models"},
    {"decisions", "scoring"},
    {"report", "benchmark", "demo", "adapters", "study"},
    {"cli"},
]
# The rooms behind the wall: nothing else loads torch, at import or late, but the command line's doors into them.
TORCH = {"ops", "models", "scoring", "benchmark", "adapters", "study"}
# Rooms that hand on at their door what others use of them. The others have no guests, or must be entered late.
WITH_DOORS = {"rows", "ops", "corpus", "tokens", "metrics", "store", "models", "decisions", "scoring"}
HEAVY = {"torch", "transformers"}


class Import(NamedTuple):
    """`late`: within a function, or for types only."""

    file: str
    room: str
    module: str
    name: str
    late: bool

    @property
    def of(self) -> str:
        """The room that is used, "" outside of the package."""
        parts = [*self.module.split("."), self.name]
        return parts[1] if parts[0] == "fastcompat" else ""


def modules() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path.parent != SOURCE or path.stem[:2] != "__"]


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late: set[ast.AST] = set()
    for node in ast.walk(tree):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            late |= set(ast.walk(node))
    file = path.relative_to(SOURCE)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            for alias in node.names:
                yield Import(str(file), file.with_suffix("").parts[0], node.module or "", alias.name, node in late)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(str(file), file.with_suffix("").parts[0], alias.name, "", node in late)


IMPORTS = [found for path in modules() for found in imports_of(path)]
STOREY = {room: storey for storey, rooms in enumerate(STOREYS) for room in rooms}


def test_every_room_has_its_storey():
    there = {path.relative_to(SOURCE).with_suffix("").parts[0] for path in modules()}
    assert there == set(STOREY)
    assert there >= TORCH | WITH_DOORS


def test_nobody_climbs():
    ways = [found for found in IMPORTS if found.of not in ("", found.room)]
    assert len(ways) > 200, "the imports were not read"
    climbs = [found for found in ways if STOREY[found.of] >= STOREY[found.room]]
    assert not climbs


def test_no_room_without_torch_reaches_it():
    outside = [found for found in IMPORTS if found.room not in {*TORCH, "cli"}]
    torch = [found for found in outside if found.of in TORCH or found.module.split(".")[0] == "torch"]
    # What made the demo's models is no part of what runs.
    assert not [found for found in torch if not found.file.startswith("demo/training/")]


def test_nobody_reaches_past_a_door():
    past = [
        found
        for found in IMPORTS
        if found.of in WITH_DOORS and found.of != found.room and not found.late and found.module.count(".") > 1
    ]
    assert not past


def test_alcoves_do_not_know_each_other():
    """But racing, which asks at every look what ranking asks at the end."""
    for found in IMPORTS:
        if found.room == "decisions" and found.module.startswith("fastcompat.decisions."):
            alcove, used = found.file.split("/")[1], found.module.split(".")[2]
            assert alcove in (used, "__init__.py") or (alcove, used) == ("racing", "ranking"), found


def test_what_is_private_to_a_file_stays_in_it():
    assert not [found for found in IMPORTS if found.of and found.name[:1] == "_" and found.name[:2] != "__"]


def test_no_file_imports_itself_by_a_circle():
    """Of what is imported at once."""
    wanted: dict[str, set[str]] = {}
    for found in IMPORTS:
        if found.of and not found.late:
            own = found.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            module = found.module.removeprefix("fastcompat").lstrip(".")
            if (SOURCE / module.replace(".", "/") / f"{found.name}.py").exists():
                module = f"{module}.{found.name}".lstrip(".")
            wanted.setdefault(own, set()).add(module)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for other in wanted.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in list(wanted):
        visit(module, ())


def test_every_room_has_a_map_that_names_its_files():
    for room in sorted(path.parent for path in SOURCE.rglob("__init__.py")):
        files = {path.stem for path in room.glob("*.py")} - {"__init__", "__main__"}
        if room == SOURCE or room.name in ("paper", "training"):
            continue
        text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
        missing = {name for name in files if name not in text}
        assert not missing, f"{room.relative_to(SOURCE)}/__init__.py does not say what {missing} is"


def test_few_files_stand_outside_the_rooms():
    assert len(list(SOURCE.glob("*.py"))) <= 7


def test_storeys_are_climbed_without_a_gap():
    """Each but the ground uses something of the one below it: a storey that none needs is none."""
    for lower, upper in pairwise(STOREYS):
        assert any(found.room in upper and found.of in lower for found in IMPORTS), upper


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("room", sorted(set(STOREY) - TORCH))
def test_rooms_outside_the_wall_load_neither_torch_nor_transformers(room):
    inside = [path.relative_to(SOURCE).with_suffix("") for path in modules()]
    names = [
        ".".join(parts) for parts in (path.parts for path in inside) if parts[0] == room and "training" not in parts
    ]
    imported = ", ".join(f"fastcompat.{name.removesuffix('.__init__')}" for name in names)
    assert run_python(f"import sys, {imported}; print(sorted({HEAVY!r} & set(sys.modules)))").strip() == "[]"


@pytest.mark.parametrize("module", ["", ".benchmark.doctor", ".benchmark.machine", ".benchmark.workloads"])
def test_what_is_asked_before_any_model_loads_neither_torch_nor_transformers(module):
    code = f"import sys, fastcompat{module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_help_loads_neither_torch_nor_pyarrow():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom fastcompat.cli.application import app\n"
        "result = CliRunner().invoke(app, ['--help'])\nassert result.exit_code == 0, result.output\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


def test_kernels_import_nothing_of_fastcompat():
    for path in (SOURCE.parents[1] / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "fastcompat" for name in names), path


def test_every_public_name_is_there():
    import fastcompat

    assert all(getattr(fastcompat, name) is not None for name in fastcompat.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastcompat.nothing
