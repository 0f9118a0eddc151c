"""Dependencies of the package point one way, and its files stay small: read from the source, not from what runs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import cnpp_trt
import pytest

ROOT = Path(cnpp_trt.__file__).parent
# Each may import those before it. Folders of `runtime`, `benchmarks` and `developer` count by themselves.
LAYERS = [
    {"errors", "conditions", "versions", "interrupts", "gpu", "miniature"},
    {"messages"},
    {"files", "schema", "places", "install"},
    {"telemetry", "bundles"},
    {"engines"},
    {"runtime.images", "runtime.sampling"},
    {"runtime.settings"},
    {"runtime.text", "runtime.backends", "runtime.output"},
    {"runtime.control"},
    {"runtime"},
    {"export", "doctor", "batch", "service", "deploy"},
    {"benchmarks", "demo"},
    {"benchmarks.latency", "benchmarks.report"},
    {"benchmarks.parity"},
    {"benchmarks.consistency", "benchmarks.first_contact", "developer.miniature"},
    {"tuning"},
    {"quantization"},
    {"developer.random_models"},
    {"developer"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LAYER_OF = {package: i for i, layer in enumerate(LAYERS) for package in layer}
MAX_LINES = 400


def sources() -> dict[str, Path]:
    """Every module of the package by its name below it; a package by its own."""
    found = {}
    for package in sorted({package.partition(".")[0] for package in LAYER_OF}):
        for path in [ROOT / f"{package}.py", *(ROOT / package).rglob("*.py")]:
            if path.is_file():
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = sources()


def imports(module: str, *, lazy: bool) -> Iterator[str]:
    """What a module imports of the package: all of it, or without what only functions and type checkers import."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    nodes = list(ast.walk(tree)) if lazy else tree.body
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing_only:
            parts = package.split(".") if package else []
            base = ".".join([*parts[: len(parts) - (node.level - 1)], *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}" if base else alias.name
                yield full if full in MODULES else base


def package_of(module: str) -> str:
    """The longest name in `LAYERS` that the module lies under."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(name for name in names if name in LAYER_OF)


def test_every_module_has_a_layer() -> None:
    there = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "hatch_build"}
    there |= {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert there == {package.partition(".")[0] for package in LAYER_OF}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    own = package_of(module)
    for imported in imports(module, lazy=True):
        other = package_of(imported)
        assert other == own or LAYER_OF[other] < LAYER_OF[own], f"{module} imports {imported}"


def test_no_modules_import_each_other() -> None:
    """In a circle, however long; imports within functions count too."""
    graph = {module: set(imports(module, lazy=True)) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " → ".join([*above[above.index(module) :], module])
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_runtime_and_engines_import_nothing_of_the_exporter() -> None:
    """Also within functions: what serves is installed without it."""
    for module in MODULES:
        if module.partition(".")[0] in ("runtime", "engines", "bundles"):
            assert not any(
                name.startswith(("export", "benchmarks", "developer")) for name in imports(module, lazy=True)
            )
    assert "engines.builder" not in set(imports("runtime.backends.tensorrt", lazy=True))
    assert "engines.builder" not in set(imports("engines.store", lazy=True))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_are_small(module: str) -> None:
    assert len(MODULES[module].read_text("utf-8").splitlines()) <= MAX_LINES
