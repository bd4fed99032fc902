"""Check the Helm chart and the alert rules with the programs that their users run.

Run it by ``make check-deploy``. ``helm lint`` and ``helm template`` run with several sets of
values; kubeconform validates what comes out against the schemas of Kubernetes and of the operators'
own resources; promtool checks the alert rules and runs their tests. The first two are built from
their Go modules into ``build/deploy``, which takes some minutes the first time; promtool comes from
Debian. The schemas come from the package kubernetes-validate and from the Go modules of the
operators.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from layertap.app.config_file import load_config
from layertap.app.tracing import FLUSH_SECONDS

HOME = Path(__file__).resolve().parent.parent
BUILD = HOME / "build" / "deploy"
CHART = HOME / "examples" / "deploy" / "helm" / "layertap"
MANIFEST = HOME / "examples" / "deploy" / "kubernetes" / "layertap.yaml"

PROGRAMS = {
    "helm": "helm.sh/helm/v3/cmd/helm@v3.22.0",
    "kubeconform": "github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0",
}
DEBIAN_PACKAGE = "prometheus"
"""It has promtool, whose Go module depends on so many others that building it takes long."""

SCHEMAS = "kubernetes-validate==1.37.0"
KUBERNETES = ("1.31.0", "1.37.0")
RESOURCES = {
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": (
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
        "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
    ),
    "github.com/kedacore/keda/v2@v2.21.0": ("config/crd/bases/keda.sh_scaledobjects.yaml",),
}
"""The files of each Go module that define resources of an operator."""

VALUES: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "everything switched on": {
        "threads": 8, "memory": "16Gi", "gpus": 1, "server": 'mode = "throughput"',
        "tls": {"secret": "tls", "clientCa": True}, "tokens": {"secret": "tokens", "admin": True},
        "cache": {"claim": "cache"}, "networkPolicy": {"enabled": True},
        "monitoring": {"serviceMonitor": True, "rules": True, "labels": {"release": "prometheus"}},
        "autoscaling": {"kind": "keda"}, "imagePullSecrets": [{"name": "registry"}],
        "extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "1"}], "podAnnotations": {"a": "b"},
        "nodeSelector": {"a": "b"}, "tolerations": [{"key": "a", "operator": "Exists"}],
    },
    "autoscaling by the HPA": {"autoscaling": {"kind": "hpa"}, "maxUnavailable": "25%"},
    "no disruption budget": {"maxUnavailable": "", "tls": {"secret": "tls"}},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "a typo": {"replica": 3},
    "no model": {"models": "[limits]"},
    "another kind of autoscaling": {"autoscaling": {"kind": "vpa"}},
}


_REFERENCE = re.compile(r'"#/[$]defs/([^"]+)"')


def program(name: str) -> Path:
    """Return a program, which is built if it is not there."""
    file = BUILD / "bin" / name
    if not file.exists():
        print(f"building {PROGRAMS[name]}", flush=True)
        env = {**os.environ, "GOBIN": str(BUILD / "bin"), "CGO_ENABLED": "0"}
        subprocess.run(["go", "install", PROGRAMS[name]], env=env, check=True)  # noqa: S607
    return file


def promtool() -> Path:
    """Return promtool, from this machine or from Debian's package."""
    if installed := shutil.which("promtool"):
        return Path(installed)
    home = BUILD / "prometheus"
    if not (home / "usr" / "bin" / "promtool").exists():
        home.mkdir(parents=True, exist_ok=True)
        download = ["apt-get", "download", "--quiet", DEBIAN_PACKAGE]
        subprocess.run(download, cwd=home, check=True, capture_output=True)
        (package,) = home.glob("*.deb")
        subprocess.run(["dpkg", "-x", package, home], check=True)  # noqa: S607
    return home / "usr" / "bin" / "promtool"


def schemas() -> Path:
    """Return a folder with the JSON schemas of Kubernetes and of the operators' resources."""
    folder = BUILD / "schemas"
    if not (folder / ".complete").exists():
        target = ["--target", str(folder / "kubernetes")]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps"]
        subprocess.run([*pip, *target, SCHEMAS], check=True)
        for version in KUBERNETES:
            _stand_alone(_of_kubernetes(folder, version))
        for module, files in RESOURCES.items():
            for name, schema in _operator_schemas(module, files):
                (folder / name).write_text(json.dumps(schema), "utf-8")
        (folder / ".complete").touch()
    return folder


def _of_kubernetes(folder: Path, version: str) -> Path:
    """Return the folder of the strict schemas of one version of Kubernetes."""
    home = folder / "kubernetes" / "kubernetes_validate" / "kubernetes-json-schema"
    return home / f"v{version}-local-strict"


def _stand_alone(home: Path) -> None:
    """Put the definitions that each schema refers to into its own file, as kubeconform needs them.

    The package's schemas refer to ``/api/_definitions.json``, which code of its own finds.
    """
    common = json.loads((home / "_definitions.json").read_text("utf-8"))["$defs"]
    for file in home.glob("*-*.json"):
        text = file.read_text("utf-8").replace("/api/_definitions.json#", "#")
        schema, needed = json.loads(text), dict[str, Any]()
        left = _REFERENCE.findall(text)
        while left:
            name = left.pop()
            if name not in needed:
                needed[name] = common[name]
                left += _REFERENCE.findall(json.dumps(common[name]))
        file.write_text(json.dumps({**schema, "$defs": needed}), "utf-8")


def _operator_schemas(module: str, files: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    download = ["go", "mod", "download", "-json", module]
    with tempfile.TemporaryDirectory() as elsewhere:  # Not in a module of ours.
        done = subprocess.run(download, cwd=elsewhere, capture_output=True, check=True)
    home = Path(json.loads(done.stdout)["Dir"])
    for file in files:
        resource = yaml.safe_load((home / file).read_text("utf-8"))["spec"]
        kind = resource["names"]["kind"].lower()
        for version in resource["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            yield f"{kind}-{resource['group']}-{version['name']}.json", _strict(schema)


def _strict(schema: Any) -> Any:
    """Return a schema by which properties that it does not name are refused."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict


def run(*command: str | Path, given: str | None = None, fails: bool = False) -> str:
    """Run a command and return its output.

    Raises:
        SystemExit: If it fails, or does not although it should.
    """
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if (done.returncode != 0) is not fails:
        words = " ".join(map(str, command))
        sys.exit(f"{words}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def render(values: dict[str, Any], *, fails: bool = False) -> str:
    """Lint the chart with some values, and return its manifests.

    ``fails`` is for values that have to be refused.
    """
    helm = program("helm")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        common = ["--values", file.name, "--namespace", "models", "--kube-version", KUBERNETES[0]]
        run(helm, "lint", "--strict", "--quiet", CHART, *common, fails=fails)
        return run(helm, "template", "layertap", CHART, *common, fails=fails)


def conform(manifests: str) -> None:
    """Validate manifests against the schemas of the oldest and the newest version in KUBERNETES."""
    folder = schemas()
    own = f"{folder}/{{{{.ResourceKind}}}}-{{{{.Group}}}}-{{{{.ResourceAPIVersion}}}}.json"
    for version in KUBERNETES:
        home = _of_kubernetes(folder, version)
        kubernetes = f"{home}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
        run(
            program("kubeconform"), "-strict", "-verbose", "-kubernetes-version", version,
            "-schema-location", kubernetes, "-schema-location", own, given=manifests,
        )  # fmt: skip


def configures(manifests: str) -> None:
    """Check that the server accepts the rendered configuration, and outlives its own grace.

    Raises:
        ConfigError: If the server refuses the configuration.
        SystemExit: If Kubernetes would kill a pod before its calls have ended.
    """
    parts = {each["kind"]: each for each in yaml.safe_load_all(manifests)}
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(parts["ConfigMap"]["data"]["layertap.toml"])
        file.flush()
        server = load_config(Path(file.name)).server
    pod = parts["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    if pod["terminationGracePeriodSeconds"] < drain + server.grace_seconds + FLUSH_SECONDS + 5:
        sys.exit(f"terminationGracePeriodSeconds {pod['terminationGracePeriodSeconds']}: too short")
    if container["resources"]["requests"]["cpu"] != str(server.threads):
        sys.exit("the CPU request is not the number of threads")


def main() -> None:
    """Check everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    for words, values in VALUES.items():
        manifests = render(values)
        conform(manifests)
        configures(manifests)
        print(f"ok: the chart with {words}")
    for words, values in REFUSED.items():
        render(values, fails=True)
        print(f"ok: {words} is refused")
    conform(MANIFEST.read_text("utf-8"))
    print("ok: the manifest without Helm")
    rules = CHART / "files" / "alerts.yaml"
    run(promtool(), "check", "rules", "--lint=all", "--lint-fatal", rules)
    run(promtool(), "test", "rules", CHART / "alerts_test.yaml")
    print("ok: the alert rules and their tests")


if __name__ == "__main__":
    main()
