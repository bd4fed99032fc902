"""Deployment files agree with the server that they deploy."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import tomllib
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import layertap
from layertap import Client, LayertapError
from layertap.app.budget import default_mib
from layertap.app.config_file import load_config
from layertap.app.tracing import FLUSH_SECONDS
from layertap.cli.main import main
from layertap.settings import ServerOptions
from processes import serving

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "examples" / "deploy"
UNIT = DEPLOY / "systemd" / "layertap.service"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
KSERVE = DEPLOY / "kserve" / "layertap.yaml"
MANIFEST = DEPLOY / "kubernetes" / "layertap.yaml"
CHART = DEPLOY / "helm" / "layertap"
DASHBOARD = ROOT / "docs" / "grafana" / "layertap.json"
OPERATIONS = ROOT / "docs" / "operations.md"
PROBES = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
METRIC = re.compile(r"\b(?:layertap|process)_[a-z_]+\b")


@pytest.fixture(scope="module")
def shown() -> set[str]:
    """Return the names of all metrics on the page of a server that has answered and refused."""
    with (
        serving("tinynets:residual", "--item-shape", "3,8,8", "--metrics-port", "0") as server,
        Client(server.address) as client,
    ):
        batch = np.zeros((1, 3, 8, 8), np.float32)
        client.extract("residual", batch, "layer1")
        with pytest.raises(LayertapError):
            client.extract("residual", batch, "layer9")
        url = server.line(r"metrics on (\S+)$")[1]
        with urllib.request.urlopen(url) as reply:  # noqa: S310 - our own page
            text = reply.read().decode()
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}


def manifest() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text("utf-8"))}


def pod() -> dict[str, Any]:
    return manifest()["Deployment"]["spec"]["template"]["spec"]


def unit() -> dict[str, str]:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT, "utf-8")
    return dict(parser["Service"])


def options(verb: str) -> set[str]:
    return {name for option in main.commands[verb].params for name in option.opts}


def test_dashboard_asks_for_metrics_that_exist(shown: set[str]) -> None:
    """Every metric of the dashboard is on a server's page."""
    board = json.loads(DASHBOARD.read_text("utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [each["query"] for each in board["templating"]["list"]]
    asked = {name for query in queries for name in METRIC.findall(query)}
    assert len(asked) > 8
    assert asked - shown == set()


def test_every_query_of_the_dashboard_is_of_the_chosen_jobs() -> None:
    """Each metric of each query is filtered by ``$job``, so other servers are not included."""
    board = json.loads(DASHBOARD.read_text("utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    job, model = (each for each in board["templating"]["list"] if each["name"] != "datasource")
    for query in [*queries, model["query"]]:
        for match in METRIC.finditer(query):
            assert query[match.end() :].startswith('{job=~"$job"'), query
    # "All" means the jobs of layertap, not every process that Prometheus knows.
    assert "allValue" not in job


def test_alerts_ask_for_metrics_that_exist(shown: set[str]) -> None:
    """Every metric of the alert rules is on a server's page, and every rule has a test."""
    (group,) = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text("utf-8"))["groups"]
    for rule in group["rules"]:
        asked = set(METRIC.findall(rule["expr"]))
        assert asked
        assert asked - shown == set()
    tests = yaml.safe_load((CHART / "alerts_test.yaml").read_text("utf-8"))["tests"]
    tested = {
        each["alertname"]
        for test in tests
        for each in test["alert_rule_test"]
        if each["exp_alerts"]
    }
    assert tested == {rule["alert"] for rule in group["rules"]}


def test_the_charts_schema_knows_every_value() -> None:
    """A value that the chart has is not refused as a typo, and one of the schema has a default."""
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    assert values.keys() == schema["properties"].keys()
    for name, part in schema["properties"].items():
        if "properties" in part:
            assert values[name].keys() == part["properties"].keys(), name


def test_the_charts_models_are_a_valid_configuration(tmp_path: Path) -> None:
    """The default models load, and the chart's version is the package's."""
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    file = tmp_path / "layertap.toml"
    file.write_text(values["models"], "utf-8")
    assert [model.name for model in load_config(file).models] == ["resnet18"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert chart["appVersion"] == layertap.__version__


@pytest.mark.parametrize("file", [MANIFEST, KSERVE])
def test_the_memory_limit_is_above_the_servers_own(file: Path) -> None:
    """The server's own limits leave a quarter of the pod's memory to the models."""
    parts = {each["kind"]: each for each in yaml.safe_load_all(file.read_text("utf-8"))}
    given: dict[str, int] = {}
    if "ConfigMap" in parts:
        config = tomllib.loads(parts["ConfigMap"]["data"]["layertap.toml"])
        given = config.get("limits", {})
        (container,) = parts["Deployment"]["spec"]["template"]["spec"]["containers"]
    else:
        (container,) = parts["ServingRuntime"]["spec"]["containers"]
    memory = container["resources"]["limits"]["memory"]
    assert memory.endswith("Gi")
    nbytes = int(memory[:-2]) << 30
    names = ("pending_mib", "plan_mib", "keep_memory_mib", "shared_memory_mib")
    most = {name: given.get(name) or default_mib(name, nbytes) for name in names}
    assert sum(most.values()) << 20 <= nbytes * 0.75


def test_documented_metrics_are_those_that_exist(shown: set[str]) -> None:
    """docs/operations.md lists exactly layertap's metrics on the page."""
    families = {
        re.sub(r"_(bucket|count|sum|created)$", "", n) if "_seconds_" in n else n for n in shown
    }
    table = re.findall(r"^\| `(layertap_[a-z_]+)", OPERATIONS.read_text("utf-8"), re.MULTILINE)
    created = {name for name in families if name.endswith("_created")}
    assert {n for n in families - created if n.startswith("layertap_")} == set(table)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_unit_is_valid(tmp_path: Path) -> None:
    """systemd finds no fault in the unit, if its program exists."""
    program = shutil.which("true")
    text = UNIT.read_text("utf-8").replace("/opt/layertap/bin/layertap", str(program))
    (tmp_path / UNIT.name).write_text(text, "utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / UNIT.name],  # noqa: S607 - wherever it is
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_unit_gives_the_grace() -> None:
    """systemd waits longer than the grace and the last spans, and the unit waits for READY=1."""
    service = unit()
    grace = load_config(ROOT / "examples" / "layertap.toml").server.grace_seconds
    assert float(service["TimeoutStopSec"]) > grace + FLUSH_SECONDS
    assert service["Type"] == "notify"


def test_commands_have_the_options_that_are_given() -> None:
    """The commands and options in unit, image and manifest exist on the command line."""
    container = pod()["containers"][0]
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if "CMD [" in line]
    commands = [json.loads(line[line.index("[") :]) for line in lines]
    commands += [container["args"], unit()["ExecStart"].split()[1:]]
    for command in commands:
        verb, *args = command[1:] if command[0] == "layertap" else command
        assert {arg for arg in args if arg.startswith("--")} <= options(verb), command
    assert {command[1] if command[0] == "layertap" else command[0] for command in commands} == {
        "health",
        "serve",
    }


def test_manifest_configures_the_server(tmp_path: Path) -> None:
    """The manifest's layertap.toml is valid, and its addresses are those of probes and service."""
    file = tmp_path / "layertap.toml"
    file.write_text(manifest()["ConfigMap"]["data"]["layertap.toml"], "utf-8")
    server = load_config(file).server
    assert server.host == "0.0.0.0"  # noqa: S104 - a pod's own address
    container = pod()["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": server.port, "metrics": server.metrics_port}
    for probe, path in PROBES.items():
        assert container[probe]["httpGet"] == {"path": path, "port": "metrics"}
    # Without a CPU limit a pod sees the node's cores.
    assert "cpu" not in container["resources"]["limits"]
    assert str(server.threads) == container["resources"]["requests"]["cpu"]
    assert [port["port"] for port in manifest()["Service"]["spec"]["ports"]] == list(ports.values())
    mounted = next(m for m in container["volumeMounts"] if m["name"] == "config")
    assert container["args"][-1] == f"{mounted['mountPath']}/layertap.toml"


def test_pod_lives_longer_than_the_grace() -> None:
    """Kubernetes waits for the preStop hook, the grace, the last spans and a margin."""
    config = tomllib.loads(manifest()["ConfigMap"]["data"]["layertap.toml"])
    (_, seconds) = pod()["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    least = int(seconds) + config["server"]["grace_seconds"] + FLUSH_SECONDS
    assert pod()["terminationGracePeriodSeconds"] >= least + 5


def test_selectors_find_the_pods() -> None:
    """Deployment and Service select the pods' labels."""
    parts = manifest()
    labels = parts["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert parts["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert parts["Service"]["spec"]["selector"] == labels


def test_image_is_built_from_files_that_exist() -> None:
    """Every file that the Dockerfile copies is in the repository and not ignored; ports agree."""
    text = DOCKERFILE.read_text("utf-8")
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text("utf-8").splitlines()
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert f"EXPOSE {ServerOptions().port} {ServerOptions().metrics_port}\n" in text
    assert re.search(r"^USER (?!0|root)", text, re.MULTILINE)


def test_kserve_runtime_fits_the_server() -> None:
    """Its options exist, its port is probed and called h2c, and KServe selects it."""
    runtime, service = yaml.safe_load_all(KSERVE.read_text("utf-8"))
    (container,) = runtime["spec"]["containers"]
    verb, model, *args = container["args"]
    assert {arg.partition("=")[0] for arg in args} <= options(verb)
    assert model.startswith("{{.Name}}=/mnt/models/")
    (port,) = container["ports"]
    assert f"--port={port['containerPort']}" in args
    assert port["name"] == "h2c"
    for probe in ("readinessProbe", "livenessProbe"):
        wanted = {"path": PROBES[probe], "port": ServerOptions().metrics_port}
        assert container[probe]["httpGet"] == wanted
    assert f"--threads={container['resources']['requests']['cpu']}" in args
    wanted = service["spec"]["predictor"]["model"]
    assert wanted["runtime"] == runtime["metadata"]["name"]
    assert wanted["protocolVersion"] in runtime["spec"]["protocolVersions"]
    formats = [each["name"] for each in runtime["spec"]["supportedModelFormats"]]
    assert wanted["modelFormat"]["name"] in formats
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == str(
        ServerOptions().metrics_port
    )
