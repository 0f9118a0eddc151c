"""What the package uses of TensorRT is in TensorRT's real Python bindings, and they take what it gives them.

TensorRT 10 and 11 are bindings of a megabyte each over a library in TensorRT's own place (tests/tensorrt_stub), which
computes nothing; TensorRT-RTX is the real one, where it is installed.
"""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cnpp_trt
import pytest
import wheels
from tensorrt_stub import library
from tensorrt_stub.signatures import short, signatures
from tensorrt_stub.usage import MODULE, OBJECTS, Use, unknown, uses

PACKAGE = Path(cnpp_trt.__path__[0])
TESTS = Path(__file__).resolve().parents[1]
PROGRAM = TESTS / "programs" / "real_tensorrt.py"
RTX = "tensorrt_rtx"

# Everything that is used of either flavor, by class.
USED = {
    MODULE: "__version__ Builder BuilderFlag ExecutionContextAllocationStrategy ILogger IProgressMonitor LayerType "
    "NetworkDefinitionCreationFlag OnnxParser ProfilingVerbosity Runtime TilingOptimizationLevel",
    "Builder": "__init__ build_serialized_network create_builder_config create_network create_optimization_profile",
    "BuilderFlag": "TF32",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "IBuilderConfig": "add_optimization_profile avg_timing_iterations builder_optimization_level clear_flag "
    "create_timing_cache get_timing_cache max_aux_streams profiling_verbosity progress_monitor set_flag "
    "set_timing_cache tiling_optimization_level",
    "ICudaEngine": "create_execution_context create_runtime_config device_memory_size_v2 "
    "get_device_memory_size_for_profile_v2 num_optimization_profiles",
    "IExecutionContext": "execute_async_v3 set_device_memory set_input_shape set_optimization_profile_async "
    "set_tensor_address update_device_memory_size_for_shapes",
    "ILayer": "name type",
    "ILogger": "Severity __init__ log",
    "ILogger.Severity": "ERROR WARNING",
    "INetworkDefinition": "get_input get_layer num_inputs num_layers",
    "IOptimizationProfile": "set_shape",
    "IProgressMonitor": "__init__ phase_finish phase_start step_complete",
    "IRuntimeConfig": "set_execution_context_allocation_strategy",
    "ITensor": "name shape",
    "ITimingCache": "serialize",
    "LayerType": "CAST NORMALIZATION SOFTMAX",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "OnnxParser": "__init__ get_error num_errors parse_from_file",
    "ParserError": "desc node_name node_operator",
    "ProfilingVerbosity": "DETAILED",
    "Runtime": "__init__ deserialize_cuda_engine",
}
# What TensorRT-RTX alone has.
RTX_ONLY = {
    MODULE: "ComputeCapability CudaGraphStrategy DynamicShapesKernelSpecializationStrategy EngineInvalidityDiagnostics "
    "EngineValidity",
    "BuilderFlag": "REQUIRE_USER_ALLOCATION",
    "CudaGraphStrategy": "DISABLED",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "EngineValidity": "INVALID",
    "IBuilderConfig": "num_compute_capabilities set_compute_capability",
    "IExecutionContext": "is_stream_capturable",
    "IRuntimeCache": "deserialize serialize",
    "IRuntimeConfig": "create_runtime_cache cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy "
    "set_runtime_cache",
    "Runtime": "engine_header_size get_engine_validity",
}

Classes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Bindings:
    """One version of the bindings, with the libraries that stand for TensorRT's."""

    version: str
    folder: Path
    libraries: Path

    def environment(self, gives: str, base: dict[str, str] | None = None) -> dict[str, str]:
        return library.environment(self.folder, self.libraries, gives, base)

    def program(self, function: str, *arguments: str, gives: str) -> list[str]:
        return program(function, *arguments, environment=self.environment(gives))


def program(function: str, *arguments: str, environment: dict[str, str] | None = None) -> list[str]:
    """The lines that a function of real_tensorrt.py prints."""
    line = [sys.executable, str(PROGRAM), function, *arguments]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 0, f"exit status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout.splitlines()


@pytest.fixture(scope="session")
def bindings_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bindings]:
    if not sys.platform.startswith("linux"):
        pytest.skip("the stub is a Linux library")
    missing = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the stub is built with {', '.join(missing)}, which is not installed")
    if int(Path("/proc/sys/vm/mmap_min_addr").read_text()) > library.PLACE:
        pytest.skip("the stub needs memory at an address that this machine gives to nobody")

    @cache
    def make(version: str) -> Bindings | str:
        try:
            folder = wheels.fetch(library.VERSIONS[version])
        except wheels.Unavailable as e:
            return str(e)  # once: without a network every try takes its time
        libraries = tmp_path_factory.mktemp(f"tensorrt-{version}")
        library.build(folder, libraries)
        return Bindings(version, folder, libraries)

    def made(version: str) -> Bindings:
        found = make(version)
        return pytest.skip(found) if isinstance(found, str) else found

    return made


@pytest.fixture(params=sorted(library.VERSIONS))
def bindings(request: pytest.FixtureRequest, bindings_of: Callable[[str], Bindings]) -> Bindings:
    return bindings_of(request.param)


@pytest.fixture(scope="session")
def described(request: pytest.FixtureRequest) -> Callable[[str], Classes]:
    """The classes of a version, or of TensorRT-RTX."""

    @cache
    def describe(version: str) -> Classes:
        if version == RTX:
            pytest.importorskip(RTX, reason="tensorrt-rtx is not installed")
            [line] = program("describe", RTX)
        else:
            made: Bindings = request.getfixturevalue("bindings_of")(version)
            [line] = made.program("describe", "tensorrt", gives="nothing")
        found = json.loads(line)
        classes: Classes = found["classes"]
        # The module itself is one more: its classes are what is used of it.
        return {**classes, MODULE: {name: {"kind": "class"} for name in classes} | {"__version__": {"kind": "other"}}}

    return describe


each_version = pytest.mark.parametrize("version", [*sorted(library.VERSIONS), RTX])


# ------------------------------------------------------------------------------------------ the table and the source


def test_the_table_is_what_the_source_uses() -> None:
    found: dict[str, set[str]] = {}
    for use in uses(PACKAGE):
        found.setdefault(use.owner, set()).add(use.name)
    table = {owner: {*USED.get(owner, "").split(), *RTX_ONLY.get(owner, "").split()} for owner in {**USED, **RTX_ONLY}}
    assert found == table


@pytest.mark.slow
def test_no_object_of_tensorrt_is_overlooked(described: Callable[[str], Classes]) -> None:
    """No other file touches the module, and in these no other expression has an attribute that its classes have."""
    rooms = ["benchmarks", "bundles", "commands", "developer", "engines", "export", "miniature", "runtime"]
    files = [*PACKAGE.glob("*.py"), *(p for room in rooms for p in (PACKAGE / room).rglob("*.py"))]
    nodes = {p.relative_to(PACKAGE).as_posix(): ast.walk(ast.parse(p.read_text("utf-8"))) for p in files}
    touched = {p for p, found in nodes.items() for n in found if isinstance(n, ast.Attribute) and n.attr == "trt"}
    assert touched | {"runtime/backends/tensorrt_launch.py"} == set(OBJECTS)  # which is handed contexts
    members = {name: {m for m in found if not m.startswith("_")} for name, found in described(RTX).items()}
    del members[MODULE]
    assert "create_network" in members["Builder"]
    assert unknown(PACKAGE, members) == []


# ------------------------------------------------------------------------------------------------- the real bindings


@pytest.mark.slow
@each_version
def test_everything_that_is_used_is_there(described: Callable[[str], Classes], version: str) -> None:
    classes = described(version)
    wrong = []
    for use in uses(PACKAGE):
        if version != RTX and use.name in RTX_ONLY.get(use.owner, "").split():
            continue
        if reason := misfit(use, classes):
            wrong.append(f"{use.line}: {use.owner}.{use.name} {reason}")
    assert wrong == []


def misfit(use: Use, classes: Classes) -> str | None:
    """Why a use is wrong in these bindings; None where it is right."""
    if use.owner not in classes:
        return "is of a class that is not there"
    if use.name not in classes[use.owner]:
        return "is not there"
    member = classes[use.owner][use.name]
    kind = member["kind"]
    if use.how == "written":
        return None if kind == "writable" else f"is a {kind} that cannot be set"
    if use.how == "read":
        return "is a method" if kind == "method" and not use.optional else None
    if kind != "method":
        return f"is a {kind}, no method"
    overloads = signatures(use.name, member["text"])
    if use.how == "overridden":
        taken = [len(s.parameters) for s in overloads]
        return None if use.positional in taken else f"takes {taken} arguments, and is overridden with {use.positional}"
    fitting = [s for s in overloads if s.takes(use.positional, use.keywords)]
    if not fitting:
        return f"takes no {use.positional} arguments and {use.keywords}: {member['text']}"
    if use.truth and any(s.returns != "bool" for s in fitting):
        return f"returns {[s.returns for s in fitting]}, which is taken as true or false"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("version", sorted(library.VERSIONS))
def test_what_tensorrt_rtx_alone_has(described: Callable[[str], Classes], version: str) -> None:
    """Should TensorRT get one of these, the code that asks for the flavor can be asked again."""
    classes = described(version)
    there = [f"{o}.{name}" for o, names in RTX_ONLY.items() for name in names.split() if name in classes.get(o, {})]
    assert there == []


@pytest.mark.slow
def test_what_tensorrt_says_when_it_does_not_start(bindings: Bindings) -> None:
    cuda, runtime, builder = bindings.program("factories", gives="nothing")
    assert cuda == ("13" if bindings.version == "11.4" else "12")
    for line, what in ((runtime, "runtime"), (builder, "builder")):
        assert line.startswith(f"tensorrt {bindings.version}.")
        assert line.endswith(f" cannot start its {what}: CUDA initialization failure with error: 35")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gives", "said"),
    [
        ("empty", "cannot make a network: it gave no reason"),
        ("no parser", "cannot start its ONNX parser: CUDA initialization failure with error: 35"),
    ],
)
def test_a_builder_that_makes_nothing(bindings: Bindings, gives: str, said: str) -> None:
    [line] = bindings.program("refused_build", gives=gives)
    assert line.startswith(f"tensorrt {bindings.version}.") and line.endswith(said)


@pytest.mark.slow
def test_what_tensorrt_logs(bindings: Bindings) -> None:
    bindings.program("severities", gives="nothing")


@pytest.mark.slow
def test_a_whole_build_is_called_as_tensorrt_wants_it(bindings: Bindings) -> None:
    bindings.program("whole_build", gives="all")


@pytest.mark.slow
def test_a_whole_request_is_called_as_tensorrt_wants_it(
    bindings: Bindings, simulated_gpu: Any, tiny: Any, tmp_path: Path
) -> None:
    environment = bindings.environment("all", simulated_gpu.environment())
    program("whole_request", str(tiny.bundle), str(tmp_path / "plans"), environment=environment)


# ------------------------------------------------------------------------------------- the stand-in of other tests

# The classes of tests/simulated_gpu/fake_tensorrt.py, which stands for TensorRT-RTX, by those that they stand for.
STAND_INS = {
    "ILogger": "Logger",
    "ILogger.Severity": "Severity",
    "IRuntimeCache": "Cache",
    "IRuntimeConfig": "Config",
    "IExecutionContext": "Context",
    "ICudaEngine": "Engine",
    "Runtime": "Runtime",
}


@pytest.fixture(scope="module")
def stand_in() -> dict[str, ast.ClassDef]:
    tree = ast.parse((TESTS / "simulated_gpu" / "fake_tensorrt.py").read_text("utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def test_a_stand_in_stands_for_every_class(stand_in: dict[str, ast.ClassDef]) -> None:
    assert sorted(stand_in) == sorted(STAND_INS.values())


@pytest.mark.parametrize("owner", sorted(STAND_INS))
def test_the_stand_in_has_nothing_that_tensorrt_has_not(
    stand_in: dict[str, ast.ClassDef], described: Callable[[str], Classes], owner: str
) -> None:
    real = described(RTX)[owner]
    looked = 0
    for node in stand_in[STAND_INS[owner]].body:
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            # An engine and a context are made by what makes them: nobody else calls their __init__.
            if node.name != "__init__" or owner in ("Runtime", "ILogger"):
                assert real[node.name]["kind"] == "method"
                compare(node, real[node.name]["text"], owner)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            assert isinstance(target, ast.Name)
            member = real[target.id]
            assert member["kind"] in ("property", "writable", "value")
            if member["kind"] == "value":
                assert isinstance(node.value, ast.Constant) and node.value.value == member["value"], target.id
        else:
            continue
        looked += 1
    assert looked


def compare(method: ast.FunctionDef, text: str, owner: str) -> None:
    """A method of the stand-in takes as many arguments as an overload of the real one, and returns the same."""
    classes = {f"{stand_in}": real for real, stand_in in STAND_INS.items()} | {"bytes": "IHostMemory"}
    returned = ast.unparse(method.returns).removesuffix(" | None") if method.returns else ""
    overloads = signatures(method.name, text)
    taken = len(method.args.args) - 1
    fitting = {s.returns for s in overloads if len(s.parameters) == taken}
    assert classes.get(returned.strip("'"), returned) in fitting, f"{owner}.{method.name}: {text}"


def test_the_stand_ins_values_are_tensorrts(described: Callable[[str], Classes]) -> None:
    """Of the enumerations that it puts in the module, and of those that tests replace."""
    compared = set()
    for file in ("simulated_gpu/fake_tensorrt.py", "programs/gpu_faults.py"):
        for node in ast.walk(ast.parse((TESTS / file).read_text("utf-8"))):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                name = node.targets[0].attr
                if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith("SimpleNamespace"):
                    for keyword in node.value.keywords:
                        assert isinstance(keyword.value, ast.Constant) and keyword.arg
                        assert described(RTX)[name][keyword.arg]["value"] == keyword.value.value
                        compared.add(name)
    assert compared == {
        "ExecutionContextAllocationStrategy",
        "DynamicShapesKernelSpecializationStrategy",
        "CudaGraphStrategy",
        "EngineValidity",
        "EngineInvalidityDiagnostics",
    }


# ------------------------------------------------------------------------------------------- signatures in docstrings


def test_signatures_are_read() -> None:
    text = """create(*args, **kwargs)
Overloaded function.

1. create(self: tensorrt_bindings.tensorrt.Engine, strategy: a.Strategy = <Strategy.STATIC: 0, x>) -> None
2. create(self: tensorrt_rtx_bindings.tensorrt_rtx.Engine, n: typing.SupportsInt, b: int) -> nvonnxparser::IParserError
3. create(self: E, arg0: int) -> bool
"""
    first, second, third = signatures("create", text)
    assert [(p.name, p.optional) for p in first.parameters] == [("strategy", True)]
    assert [(p.name, p.type, p.optional) for p in second.parameters] == [("n", "int", False), ("b", "int", False)]
    assert (first.returns, second.returns, third.returns) == ("None", "ParserError", "bool")
    assert first.takes(0) and first.takes(1) and first.takes(0, ("strategy",)) and not first.takes(2)
    assert second.takes(1, ("b",)) and not second.takes(1) and not second.takes(1, ("c",))
    assert third.takes(1) and not third.takes(0, ("arg0",))
    assert short("tensorrt_bindings.tensorrt.ILogger.Severity") == "ILogger.Severity"
