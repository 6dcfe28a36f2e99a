"""The house stands on its floors: imports go down only, and importing the package loads none of its parts."""

from __future__ import annotations

import ast
import pydoc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import slidesparse_nb

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "slidesparse_nb"

FLOORS = (  # an import goes down, or to the left on its own floor
    ("errors", "env"),
    ("core",),
    ("arch",),
    ("cpu", "cuda"),
    ("packing", "checkpoint", "ops"),
    ("convert", "pruning", "tuning", "doctor"),
    ("integrations", "tools", "examples"),
)

APART = {("cuda", "cpu"), ("ops", "checkpoint"), ("ops", "packing"), ("checkpoint", "packing")}
"""Neighbours that know nothing of each other."""

THIRD_PARTY = {  # and NumPy, everywhere
    "checkpoint": {"gguf"},
    "core": {"ml_dtypes"},
    "cpu": {"numba"},
    "cuda": {"numba", "cupy", "llvmlite", "cuda", "numba_cuda"},
    "pruning": {"torch", "transformers"},
    "tuning": {"cupy"},
    "tools": {"click", "rich", "matplotlib", "slidesparse_nb", "torch", "transformers"},
    "examples": {"gguf", "language_model", "matplotlib", "slidesparse_nb", "tokenizers", "torch"},
    "integrations": {"slidesparse_nb", "torch", "vllm", "transformers", "safetensors", "cupy", "ml_dtypes"},
}
"""What each part may import that is neither its own package nor the standard library."""

MODULES = ("convert.kinds", "env", "integrations", "pruning", "tuning.clock")
"""What is public as modules: what tells linear layers by their names, settings of adapters, the adapters, the mathematics of
pruning, and the clock of tuning."""

PLACE = {name: (floor, column) for floor, row in enumerate(FLOORS) for column, name in enumerate(row)}
BESIDE = ("tools", "examples")
FILES = sorted({f for name in (PACKAGE.name, *BESIDE) for f in (ROOT / name).rglob("*.py")} - {PACKAGE / "__init__.py"})


def part_of(file: Path) -> str:
    """The name in FLOORS that `file` belongs to: a module, or the folder it stands in."""
    relative = file.relative_to(PACKAGE if file.is_relative_to(PACKAGE) else ROOT)
    return relative.parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """What `file` imports, absolute dotted names; for `from a import b` both a and a.b."""
    package = ["slidesparse_nb", *file.parent.relative_to(ROOT if part_of(file) in BESIDE else PACKAGE).parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module or ""]
            )
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def test_every_part_has_a_floor() -> None:
    assert {part_of(file) for file in FILES} <= PLACE.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    part = part_of(file)
    for name in imports(file):
        root, _, rest = name.partition(".")
        if root != "slidesparse_nb" or not rest:
            continue
        target = rest.split(".")[0]
        if target == part or target not in PLACE:  # its own folder, or a name in the package's __init__
            continue
        floor, column = PLACE[part]
        below, left = PLACE[target]
        assert below < floor or (below == floor and left < column), f"{part} must not import {target}"
        assert (part, target) not in APART, f"{part} must not import {target}"
        public = part not in FLOORS[-1] or any(f"{rest}.".startswith(f"{module}.") for module in MODULES)
        assert public, f"{part} may use the public API only, not slidesparse_nb.{target}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_third_party_imports(file: Path) -> None:
    allowed = {"slidesparse_nb", "numpy", *sys.stdlib_module_names, *THIRD_PARTY.get(part_of(file), ())}
    assert {name.partition(".")[0] for name in imports(file)} <= allowed


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) in FLOORS[-1]], ids=lambda f: str(f.relative_to(ROOT)))
def test_top_floor_uses_public_names(file: Path) -> None:
    tree = ast.parse(file.read_text())
    alias = {
        a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name == "slidesparse_nb"
    }
    used = {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in alias
    }
    assert used <= {*slidesparse_nb.PUBLIC, "__version__"}


def test_public_names() -> None:
    for name in slidesparse_nb.PUBLIC:
        assert getattr(slidesparse_nb, name) is getattr(slidesparse_nb, name)
        assert name in dir(slidesparse_nb)
    modules = {file.stem for file in PACKAGE.glob("*.py")} | {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert not modules & {*slidesparse_nb.PUBLIC}, "the lazy export of a name would turn into the module"
    with pytest.raises(AttributeError, match="'slidesparse_nb' has no attribute 'slide'"):
        _ = slidesparse_nb.slide


def test_help_fits_a_reader() -> None:
    """help(slidesparse_nb) prints functions, each whole, and the names of all others and of the classes, on a few screens."""
    lines = pydoc.plain(pydoc.render_doc(slidesparse_nb)).splitlines()
    assert "CLASSES" not in lines
    assert (len(lines) < 300, max(map(len, lines)) < 400) == (True, True)
    head = "\n".join(lines[: lines.index("FUNCTIONS")])
    assert not [name for name in {*slidesparse_nb.PUBLIC} - {*slidesparse_nb.__all__} if name.removesuffix("Error") not in head]


def test_import_loads_no_part_of_the_package() -> None:
    """So that it takes milliseconds: ml_dtypes, Numba and CuPy are imported by the modules that need them, when used."""
    code = "import sys; before = set(sys.modules); import slidesparse_nb; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    assert [name for name in loaded if name.startswith("slidesparse_nb")] == ["slidesparse_nb"]
    assert not {name.partition(".")[0] for name in loaded} & {"numba", "cupy", "ml_dtypes", "click", "rich"}


def test_the_specification_needs_no_compiler() -> None:
    code = "import sys; from slidesparse_nb import reference, PackedWeight, Pattern; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    assert not {"numba", "cupy"} & {*loaded}
