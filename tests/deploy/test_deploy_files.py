"""Files for containers and clusters: valid by the schemas of those that read them, and true of this package."""

# Packages of extras that a checkout need not have.
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cnpp_trt
import pytest
import yaml

ROOT = Path(cnpp_trt.__file__).parent
EXAMPLES = ROOT / "examples" / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def load(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install 'cnpp-trt[manifests]'")
    ended = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout


def test_the_dockerfile_installs_extras_that_there_are() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"^ARG (?:DEVICE|EXTRAS)=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert len(named) == 2
    assert {word for text in named for word in text.split(",")} <= set(extras)


def test_what_is_copied_is_what_the_wheel_holds() -> None:
    """A folder that .dockerignore leaves out would be missing in the image."""
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE))
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {name.lstrip("/") for name in wheel["include"]} <= kept
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= kept


def test_nothing_runs_as_root() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    [server] = [load(ROOT / "compose.yaml")[0]["services"]["server"]]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    pod = load(EXAMPLES / "kubernetes.yaml")[0]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    [container] = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_commands_are_the_packages(command: Any) -> None:
    """The arguments of compose and Kubernetes are options that `serve` has, and probes are its paths."""
    outcome = command("serve", "--help")
    pod = load(EXAMPLES / "kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    words = [*pod["args"], *load(ROOT / "compose.yaml")[0]["services"]["server"]["command"][:3]]
    assert words[0] == "serve"
    for word in words:
        if word.startswith("--"):
            assert word in outcome.out
    from cnpp_trt.service import gate

    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert pod[probe]["httpGet"]["path"] in gate._OPEN
    [health] = re.findall(r"127\.0\.0\.1:8000(/\w+)", DOCKERFILE)
    assert health in gate._OPEN


def test_prometheus_finds_the_server() -> None:
    [config] = load(EXAMPLES / "prometheus.yaml")
    services = load(ROOT / "compose.yaml")[0]["services"]
    [target] = config["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "server:8000"
    assert "server" in services
    assert any("examples/deploy/prometheus.yaml" in volume for volume in services["prometheus"]["volumes"])


def test_the_kubernetes_manifest() -> None:
    if find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed: pip install 'cnpp-trt[manifests]'")
    import kubernetes_validate

    for document in load(EXAMPLES / "kubernetes.yaml"):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_kubernetes_objects_fit_together() -> None:
    deployment, service = load(EXAMPLES / "kubernetes.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert service["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_ray_cluster() -> None:
    """By the schema that `ray up` reads it with."""
    spec = find_spec("ray")
    if spec is None or spec.origin is None or find_spec("jsonschema") is None:
        pytest.skip("ray is not installed: pip install 'cnpp-trt[ray]'")
    import jsonschema

    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text("utf-8"))
    [cluster] = load(EXAMPLES / "ray-cluster.yaml")
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
