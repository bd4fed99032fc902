"""The checks of ``make check`` fail when they should, and the house rules hold."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import layertap
from layertap.selection import Extractor

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "server"
GENERATOR = ROOT / ".venv-gen" / "bin" / "python"


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on a copy of the tree."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "server")},
        capture_output=True,
        text=True,
        check=False,
    )


def check_generated(tree: Path, python: Path = GENERATOR) -> subprocess.CompletedProcess[str]:
    """Run the check of generated code on a copy of the tree."""
    return subprocess.run(
        [python, ROOT / "tools" / "gen_proto.py", "--check", "--root", tree],
        capture_output=True,
        text=True,
        check=False,
    )


def copy_of_what_guards_read(folder: Path) -> Path:
    """Copy what the guards read into a folder, so that a test may break it."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "proto", folder / "proto")
    shutil.copytree(SERVER, folder / "server", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the guards read."""
    return copy_of_what_guards_read(tmp_path)


def test_layers_hold(tree: Path) -> None:
    """The tree keeps every import contract."""
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


PLANTED = [
    ("wire", "import layertap.engine", "Imports point down only"),
    ("wire", "import layertap.shm", "Imports point down only"),
    ("engine", "from layertap.services import status", "Imports point down only"),
    ("services", "import layertap.client", "Imports point down only"),
    ("client", "import torch", "The client is made of wire, shm and generated stubs"),
    ("client", "import layertap.engine", "The client is made of wire, shm and generated stubs"),
    ("engine", "import grpc", "gRPC lives in the adapter of services, app, client and cli"),
    ("shm", "import grpc", "gRPC lives in the adapter of services, app, client and cli"),
    ("shm", "import torch", "PyTorch lives in models, extraction and engine"),
    ("services", "import torch", "PyTorch lives in models, extraction and engine"),
    ("extraction", "import layertap.v1.tensor_pb2", "Generated messages stay out of engine"),
]
"""A package, a statement that a module of it must not contain, and the contract that forbids it."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the linter says of each broken contract, with every statement of PLANTED in a file."""
    tree = copy_of_what_guards_read(tmp_path_factory.mktemp("tree"))
    for number, (module, statement, _) in enumerate(PLANTED):
        planted = tree / "server" / "layertap" / module / f"planted{number}.py"
        planted.write_text(f'"""Planted."""\n\n{statement}\n', encoding="utf-8")
    shared = tree / "server" / "layertap" / "services" / "error_codes.py"
    shared.write_text(shared.read_text("utf-8") + "\nimport grpc\n", encoding="utf-8")
    result = lint_imports(tree)
    assert result.returncode == 1
    _, details = result.stdout.split("Broken contracts\n")
    # A contract's name stands above a line of dashes; what breaks it stands below.
    parts = re.split(r"^(.+)\n-{4,}\n", details, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def said_of(broken: dict[str, str], contract: str) -> str:
    """Return what the linter says of the contract whose name begins so."""
    return next((text for name, text in broken.items() if name.startswith(contract)), "")


@pytest.mark.parametrize("number", range(len(PLANTED)), ids=lambda number: PLANTED[number][1])
def test_forbidden_import_is_named(broken: dict[str, str], number: int) -> None:
    """An import that breaks a contract is reported, with the contract and the file."""
    module, _, contract = PLANTED[number]
    assert f"layertap.{module}.planted{number} " in said_of(broken, contract)


def test_every_file_of_services_is_under_the_contract() -> None:
    """A file that is added to services is kept from gRPC as the others are."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    [contract] = [each for each in contracts["contracts"] if each["id"] == "use-case"]
    listed = {name.removeprefix("layertap.services.") for name in contract["source_modules"]}
    found = {path.stem for path in (SERVER / "layertap" / "services").glob("[!_]*")}
    assert listed == found - {"grpc_adapter"}


def test_the_use_case_knows_no_transport(broken: dict[str, str]) -> None:
    """An import of gRPC by a file that all transports share breaks a contract."""
    assert "layertap.services.error_codes " in said_of(
        broken, "Services know no transport; only their adapter for gRPC does"
    )


def test_generated_code_is_fresh(tree: Path) -> None:
    """The committed code equals what the pinned generator makes of ``proto/``."""
    result = check_generated(tree)
    assert result.returncode == 0, result.stdout


def test_changed_proto_makes_generated_code_stale(tree: Path) -> None:
    """A .proto that changed without ``make gen`` is reported, and the others are not."""
    proto = tree / "proto" / "layertap" / "v1" / "tensor.proto"
    proto.write_text(proto.read_text("utf-8") + "\nmessage Planted {}\n", encoding="utf-8")
    result = check_generated(tree)
    assert result.returncode == 1
    assert "tensor_pb2.py\n" in result.stdout
    assert "tensor_pb2.pyi\n" in result.stdout
    assert "catalogue_pb2" not in result.stdout
    assert "make gen" in result.stdout


def test_left_over_generated_file_is_stale(tree: Path) -> None:
    """Generated code without its .proto is reported."""
    left_over = tree / "server" / "layertap" / "v1" / "gone_pb2.py"
    left_over.write_text("", encoding="utf-8")
    result = check_generated(tree)
    assert result.returncode == 1
    assert f"stale: {left_over}" in result.stdout


def test_other_generators_are_refused(tree: Path) -> None:
    """Without the pinned generator, generated code is neither written nor checked."""
    result = check_generated(tree, Path(sys.executable))
    assert result.returncode == 1
    assert "the generator is grpcio-tools" in result.stdout


@pytest.mark.long
def test_unmapped_error_is_named(tree: Path) -> None:
    """An error class without a status fails ``make check``, which names it."""
    planted = tree / "server" / "layertap" / "errors.py"
    text = planted.read_text("utf-8")
    planted.write_text(f"{text}\n\nclass PlantedError(LayertapError):\n    pass\n", "utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", ROOT / "tests" / "services" / "test_error_codes.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tree / "server")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "test_every_error_is_mapped[PlantedError]" in result.stdout


def modules() -> Iterator[str]:
    """Name every module of the package that is written by hand."""
    for found in pkgutil.walk_packages(layertap.__path__, "layertap."):
        # A compiled module and its plain twin have a .pyi for a list, and __main__ runs when
        # imported.
        private = found.name.rpartition(".")[2].startswith("_")
        if not private and not found.name.startswith(("layertap.v1", "layertap.inference")):
            yield found.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_all_is_true(name: str) -> None:
    """``__all__`` names existing things, and every public function and class defined there."""
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert len(listed) == len(set(listed))
    assert [item for item in listed if not hasattr(module, item)] == []
    defined = {
        item
        for item, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
        and not item.startswith("_")
    }
    assert sorted(defined - set(listed)) == []


@pytest.mark.parametrize("module", ["layertap", "layertap.client"])
def test_client_needs_no_torch(module: str) -> None:
    """Importing the client does not import torch."""
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_client_leaves_the_inference_protocol_to_others() -> None:
    """Importing it does not register messages of package inference, which tritonclient has too."""
    code = "import layertap.client, sys; sys.exit('layertap.inference' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def constraints() -> dict[str, str]:
    """Read constraints.txt: versions by normalised name."""
    pairs = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.]*)", line)
        assert match, f"not name==version: {line!r}"
        pairs[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return pairs


def test_constraints_are_names_and_versions() -> None:
    """constraints.txt has one ``name==version`` per line: no addresses, paths or duplicates."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert len(constraints()) == len(lines) > 0


def test_constraints_cover_the_dependencies() -> None:
    """Every direct dependency, of users and developers, is pinned within its range."""
    pinned = constraints()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = chain.from_iterable(project["optional-dependencies"].values())
    needed = [*project["dependencies"], *extras]
    for need in map(Requirement, needed):
        if need.name == project["name"]:  # One extra of ours in another.
            continue
        name = re.sub(r"[-_.]+", "-", need.name).lower()
        assert name in pinned, f"{name} is not pinned"
        assert need.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is out of range"


SERVED = sorted(each.name for each in Extractor if each is not Extractor.AUTO)


def extractors_named(code: str) -> list[str]:
    """Return where code depends on which extractor it has to do with, a line each.

    That is any use of a value of ``Extractor`` other than AUTO, and any comparison with its name.
    """
    members = {f"Extractor.{name}" for name in SERVED} | {f"EXTRACTOR_{name}" for name in SERVED}
    texts = {*SERVED, *(Extractor[name].value for name in SERVED)}
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            if any(re.search(rf"(^|\.){member}$", whole) for member in members):
                found.append(f"{node.lineno} {whole}")
        elif isinstance(node, ast.Compare | ast.MatchValue):
            found += [
                f"{each.lineno} {each.value!r}"
                for each in ast.walk(node)
                if isinstance(each, ast.Constant) and each.value in texts
            ]
    return found


def test_only_a_kinds_own_file_depends_on_it() -> None:
    """No code of the package checks which extractor it has; it uses the kind's properties."""
    package = SERVER / "layertap"
    kinds = package / "extraction" / "kinds"
    named = {
        f"{file.relative_to(package)}:{place}"
        for file in package.rglob("*.py")
        if not file.stem.endswith("_pb2") and file != package / "selection.py"
        for place in extractors_named(file.read_text("utf-8"))
        # Each kind names itself, once.
        if not (file.parent == kinds and place.endswith(f"Extractor.{file.stem.upper()}"))
    }
    assert named == set()


@pytest.mark.parametrize(
    "code",
    [
        "x = kind.id is Extractor.HOOK",
        "x = LETTERS[Extractor.FX]",
        "match e:\n    case Extractor.CHILDREN:\n        pass",
        "x = extractor in (Extractor.AUTO, selection.Extractor.TORCHSCRIPT)",
        "x = kind.name == 'TORCHSCRIPT'",
        "x = str(extractor) == 'layer_getter'",
        "x = catalogue_pb2.EXTRACTOR_HOOK",
    ],
)
def test_code_that_tells_extractors_apart_is_found(code: str) -> None:
    """The check above detects comparisons, tables and matches, by the enum or by text."""
    assert len(extractors_named(code)) == 1
    assert extractors_named("x = extractor is Extractor.AUTO\ny = kind.compiled") == []


def test_tests_have_docstrings() -> None:
    """Every test says which behaviour it tests."""
    silent = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for kind in ("test", "check")
        for file in sorted((ROOT / "tests").rglob(f"{kind}_*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []
