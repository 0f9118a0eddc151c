"""What the package uses of TensorRT, found in its source: attributes, calls, methods that it overrides."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

MODULE = "trt"

# Which expressions are TensorRT's objects, by file and function ("" is every function of the file).
OBJECTS: dict[str, dict[str, dict[str, str]]] = {
    "engines/flavor.py": {
        "": {"trt": MODULE, "self.trt": MODULE},
        "invalidity": {"runtime": "Runtime", "kinds": "EngineInvalidityDiagnostics"},
    },
    "engines/builder.py": {
        "": {
            "trt": MODULE,
            "flavor.trt": MODULE,
            "builder": "Builder",
            "network": "INetworkDefinition",
            "parser": "OnnxParser",
            "config": "IBuilderConfig",
            "tensor": "ITensor",
            "layer": "ILayer",
            "profile": "IOptimizationProfile",
            "cache": "ITimingCache",
        },
        "_network": {"e": "ParserError"},
    },
    "benchmarks/first_contact/device_stages.py": {"": {"flavor.trt": MODULE}},
    "runtime/backends/tensorrt.py": {
        "": {
            "trt": MODULE,
            "flavor.trt": MODULE,
            "self._engine": "ICudaEngine",
            "self._cache": "IRuntimeCache",
            "backend._runtime": "Runtime",
            "self._runtime": "Runtime",
        },
        "_new_context": {"config": "IRuntimeConfig", "context": "IExecutionContext"},
    },
    "runtime/backends/tensorrt_launch.py": {
        "Context.__init__": {"context": "IExecutionContext"},
        "require_capturable": {"self._context.context": "IExecutionContext"},
        "_enqueue": {"context.context": "IExecutionContext"},
    },
}


@dataclass(frozen=True)
class Use:
    """One place where the package uses something of TensorRT.

    Attributes:
        owner: the class, as in `ILogger.Severity`; `trt` for the module.
        name: the attribute.
        how: `read`, `written`, `called`, or `overridden` by a method of a subclass.
        positional: how many arguments are passed, or taken by an override; without `self`.
        keywords: those passed by name.
        optional: read by `getattr` with a default.
        truth: what a call returns is taken as true or false.
        line: as in `engines/builder.py:60`.
    """

    owner: str
    name: str
    how: str
    positional: int
    keywords: tuple[str, ...]
    optional: bool
    truth: bool
    line: str


def uses(package: Path) -> list[Use]:
    """Every use in the files of OBJECTS, in their order."""
    return [use for file in OBJECTS for use in _File(package, file).uses()]


def unknown(package: Path, members: Mapping[str, set[str]]) -> list[str]:
    """Attributes that TensorRT's classes have, of expressions that OBJECTS does not know.

    Only names with an underscore are looked at: others, as `name`, are everyone's.

    Args:
        package: its folder.
        members: of TensorRT's classes, by class.
    """
    theirs = {name for names in members.values() for name in names}
    return [line for file in OBJECTS for line in _File(package, file).unknown(theirs)]


class _File:
    def __init__(self, package: Path, file: str) -> None:
        self.file = file
        self.tree = ast.parse((package / file).read_text("utf-8"))
        self.parents = {child: parent for parent in ast.walk(self.tree) for child in ast.iter_child_nodes(parent)}

        # What `Flavor.create` calls: an attribute, and in one place a function of the package's own.
        self.factories = {_factory(node) for node in ast.walk(self.tree) if isinstance(node, ast.Call)} - {None}

    def uses(self) -> Iterator[Use]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and node not in self.factories and (owner := self.owner(node.value)):
                yield self.use(node, owner)
            elif isinstance(node, ast.Call):
                yield from self.indirect(node)
            elif isinstance(node, ast.ClassDef):
                yield from self.overrides(node)

    def use(self, node: ast.Attribute, owner: str) -> Use:
        call = self.parents[node]
        if not isinstance(call, ast.Call) or call.func is not node:
            how = "written" if isinstance(node.ctx, ast.Store) else "read"
            return Use(owner, node.attr, how, 0, (), False, False, self.line(node))
        positional = len(call.args)
        if node.attr == "__init__":
            positional -= 1  # its `self` is passed
        name, owner = (node.attr, owner) if owner != MODULE else ("__init__", node.attr)
        above = self.parents[call]
        either = isinstance(above, ast.BoolOp) and isinstance(above.op, ast.And)  # `or` gives the value itself
        truth = either or isinstance(above, ast.UnaryOp) or (isinstance(above, ast.If) and above.test is call)
        return Use(owner, name, "called", positional, self.keywords(call), False, truth, self.line(node))

    def indirect(self, call: ast.Call) -> Iterator[Use]:
        """`getattr(object, "name", default)`, and factories that `Flavor.create` calls."""
        called = ast.unparse(call.func)
        if called == "getattr" and isinstance(call.args[1], ast.Constant) and (owner := self.owner(call.args[0])):
            yield Use(owner, str(call.args[1].value), "read", 0, (), len(call.args) > 2, False, self.line(call))
        if (factory := _factory(call)) is not None:
            owner = self.owner(factory.value)
            assert owner, f"{self.line(call)}: OBJECTS does not say what {ast.unparse(factory.value)} is"
            if owner == MODULE:
                yield Use(owner, factory.attr, "read", 0, (), False, False, self.line(call))
            name, owner = (factory.attr, owner) if owner != MODULE else ("__init__", factory.attr)
            yield Use(owner, name, "called", len(call.args) - 2, (), False, False, self.line(call))

    def overrides(self, node: ast.ClassDef) -> Iterator[Use]:
        for base in node.bases:
            if isinstance(base, ast.Attribute) and self.owner(base.value) == MODULE:
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                        taken = len(method.args.args) - 1
                        yield Use(base.attr, method.name, "overridden", taken, (), False, False, self.line(method))

    def owner(self, node: ast.expr) -> str | None:
        """TensorRT's class of an expression; None where it is not TensorRT's."""
        text = ast.unparse(node)
        functions = list(self.functions(node))
        for function, objects in OBJECTS[self.file].items():
            if text in objects and (not function or function in functions):
                return objects[text]
        if isinstance(node, ast.Attribute) and (owner := self.owner(node.value)) and node.attr[0].isupper():
            return node.attr if owner == MODULE else f"{owner}.{node.attr}"
        return None

    def functions(self, node: ast.AST) -> Iterator[str]:
        """The functions around a node: the name of each, and that with its class before it."""
        around = []
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                around.append(node.name)
        yield from around
        yield from (f"{outer}.{inner}" for inner, outer in pairwise(around))

    def unknown(self, theirs: set[str]) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Attribute) or "_" not in node.attr.strip("_") or node.attr not in theirs:
                continue
            if not self.owner(node.value):
                yield f"{self.line(node)}: {ast.unparse(node)}"

    def keywords(self, call: ast.Call) -> tuple[str, ...]:
        return tuple(keyword.arg or "**" for keyword in call.keywords)

    def line(self, node: ast.expr | ast.FunctionDef) -> str:
        return f"{self.file}:{node.lineno}"


def _factory(call: ast.Call) -> ast.Attribute | None:
    named = ast.unparse(call.func) in ("flavor.create", "self.create")
    return call.args[1] if named and isinstance(call.args[1], ast.Attribute) else None
