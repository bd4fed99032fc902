"""The README's examples work as they are."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hfnets
import layertap as layertap_api
from layertap import LocalModel
from processes import layertap, serving

ROOT = Path(__file__).resolve().parent.parent
TRITON = ROOT / ".venv-triton" / "bin" / "python"
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def command(verb: str) -> list[str]:
    """Return the arguments of the README's first ``layertap VERB`` line."""
    line = next(
        line.partition("#")[0]
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith(f"layertap {verb} ")
    )
    return shlex.split(line)[1:]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server that the README's command has started, on a free port."""
    _, *args = command("serve")
    with serving(*args, "--port", "0", "--metrics-port", "-1", fresh=True) as server:
        yield server.address


@pytest.fixture(scope="module")
def loaded() -> Iterator[dict[tuple[Any, ...], LocalModel]]:
    """The models that examples have loaded, by the arguments of ``layertap.load``."""
    models: dict[tuple[Any, ...], LocalModel] = {}
    yield models
    for model in models.values():
        model.close()


@pytest.fixture
def load_once(loaded: dict[tuple[Any, ...], LocalModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give examples that load the same model in the same way one model, instead of one each."""
    load = layertap_api.load

    def once(source: str, **settings: Any) -> AbstractContextManager[LocalModel]:
        key = (source, *sorted(settings.items()))
        if key not in loaded:
            loaded[key] = load(source, **settings)
        return nullcontext(loaded[key])

    monkeypatch.setattr(layertap_api, "load", once)


def test_the_example_answers_with_the_shapes_that_it_claims(address: str) -> None:
    """The client's code gets the values that it claims from the README's server, for the photo."""
    code, *_ = blocks("python")
    photo = ROOT / "examples" / "images" / "grace_hopper.jpg"
    names: dict[str, object] = {}
    code = code.replace("127.0.0.1:8001", address).replace("photo.jpg", str(photo))
    exec(code, names)  # noqa: S102 - the README is ours
    features = names["features"]
    for name, shape in re.findall(r'features\["([^"]+)"\].*?(\(\d[\d, ]*\))', code):
        assert str(features[name].shape) == shape
    assert set(features.torch()) == {"layer1", "avgpool:input"}


@pytest.mark.usefixtures("load_once")
def test_the_examples_without_a_server_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of the README and docs/local.md has the shapes and output that it claims."""
    shutil.copy(ROOT / "examples" / "images" / "grace_hopper.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "local.md").read_text("utf-8")
    _, short, _ = blocks("python")
    (long,) = blocks("python", page)
    claims = re.findall(r"^ +(features\[.+\])  # .*?(\[\d[\d, ]*\])", long, re.MULTILINE)
    assert len(claims) == 2
    for value, shape in claims:
        long = long.replace(f"    {value} ", f"    assert list({value}.shape) == {shape} ")
    for code in (short, long):
        exec(code, {})  # noqa: S102 - the pages are ours
    printed = capsys.readouterr().out
    claimed = re.findall(r"print\(.*\)  # (?:what it takes: )?(.*[\]\d])$", long, re.MULTILINE)
    assert len(claimed) == 2
    assert all(line in printed for line in claimed)
    assert printed.count("\n") > 50


def test_the_examples_with_nvidias_client_run(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of the README and docs/protocol.md, in its environment, has the claimed shapes."""
    shutil.copy(ROOT / "examples" / "images" / "grace_hopper.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    *_, short = blocks("python")
    long, _ = blocks("python", (ROOT / "docs" / "protocol.md").read_text("utf-8"))
    for code in (short, long):
        run_with_tritonclient(code, address, tmp_path)


def run_with_tritonclient(code: str, address: str, folder: Path) -> None:
    """Run a block of code in the environment of NVIDIA's client, and check what it claims."""
    claims = re.findall(r"^(\w+\.as_numpy\(.+?\))  # .*?(\(\d[\d, ]*\))", code, re.MULTILINE)
    assert claims
    for value, shape in claims:
        code = code.replace(value, f"assert {value}.shape == {shape}")
    script = folder / "example.py"
    script.write_text(code.replace("127.0.0.1:8001", address), "utf-8")
    done = subprocess.run([TRITON, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_streaming_examples_run(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of docs/streaming.md works for a folder of photos, with good and bad items."""
    page = (ROOT / "docs" / "streaming.md").read_text("utf-8")
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(ROOT / "examples" / "images" / "grace_hopper.jpg", tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks("python", page):
        exec(code.replace("127.0.0.1:8001", address), names)  # noqa: S102 - the page is ours
    assert {name: value.shape for name, value in names["vectors"].items()} == {
        "a.jpg": (1, 512, 1, 1),
        "b.jpg": (1, 512, 1, 1),
    }
    assert set(names["outcomes"]["b"]) == {"avgpool", "fc"}


@pytest.mark.long
def test_layers_are_listed_as_shown() -> None:
    """The command that lists layers works."""
    listed = layertap(*command("layers"), fresh=False)
    assert listed.returncode == 0, listed.stderr
    assert "avgpool" in listed.stdout


def test_extracting_without_a_server_writes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command for one process writes the archive that it names."""
    shutil.copy(ROOT / "examples" / "images" / "grace_hopper.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    done = layertap(*command("extract"), fresh=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "features.npz") as features:
        assert features["layer1"].shape == (1, 64, 56, 56)
        assert features["avgpool:input"].shape == (1, 512, 7, 7)


@pytest.fixture(scope="module")
def folder_with_nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photo, a small BERT in ``nets/bert`` and a small CLIP in ``nets/clip``."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copy(ROOT / "examples" / "images" / "grace_hopper.jpg", folder / "photo.jpg")
    hfnets.wordpiece(hfnets.bert(folder / "nets" / "bert", num_hidden_layers=2))
    hfnets.clip(folder / "nets" / "clip")
    return folder


def claimed(code: str, shape: str) -> str:
    """Return the code with each value whose shape a comment claims turned into an assertion."""
    claims = re.findall(rf"^ +(.*\])  # .*?({shape})$", code, re.MULTILINE)
    assert len(claims) >= 3
    for value, size in claims:
        code = code.replace(f"    {value} ", f"    assert list({value}.shape) == list({size}) ")
    return code


def test_the_hugging_face_examples_run(
    folder_with_nets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/huggingface.md shows has the shapes that it claims."""
    page = (ROOT / "docs" / "huggingface.md").read_text("utf-8")
    monkeypatch.chdir(folder_with_nets)
    codes = [code for code in blocks("python", page) if "from peft" not in code]
    for code in codes:  # Adapters of PEFT are tested by tests/packages/adapted.py.
        exec(claimed(code, r"\[[\d, ]*\]"), {})  # noqa: S102 - the page is ours


def test_the_text_examples_run(folder_with_nets: Path, tmp_path: Path) -> None:
    """What docs/text.md and docs/protocol.md show of texts has the shapes that they claim."""
    page = (ROOT / "docs" / "text.md").read_text("utf-8")
    (code,) = blocks("python", page)
    source = f"hf:{folder_with_nets / 'nets' / 'bert'}"
    with serving(source, "--port", "0", "--metrics-port", "-1") as server:
        code = claimed(code, r"\([\d, ]*\)").replace("127.0.0.1:8001", server.address)
        exec(code, {})  # noqa: S102 - the page is ours
        _, triton = blocks("python", (ROOT / "docs" / "protocol.md").read_text("utf-8"))
        run_with_tritonclient(triton, server.address, tmp_path)


def test_the_intervention_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/interventions.md changes what it says, in the shapes that it claims."""
    shutil.copy(ROOT / "examples" / "images" / "grace_hopper.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python", (ROOT / "docs" / "interventions.md").read_text("utf-8"))
    code = code.replace(
        'found["layer4"][0, 3]', 'assert found["layer4"][0, 3].eq(0).all()', 1
    ).replace(
        'found["interventions.elements"]', 'assert found["interventions.elements"].tolist() == [49]'
    )
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102 - the page is ours
    swept, found, plain = names["swept"], names["found"], names["plain"]
    assert isinstance(swept, layertap_api.LocalFeatures)
    assert isinstance(found, layertap_api.LocalFeatures)
    assert isinstance(plain, layertap_api.LocalFeatures)
    assert found["interventions.calls"].tolist() == [1, 1]
    assert swept["fc"].shape == (8, 1000)
    changes = (swept["fc"] - plain["fc"]).abs().amax(1)
    assert (changes > 0).sum() > 4  # A channel may be 0 anyway.


@pytest.mark.usefixtures("load_once")
def test_the_gradient_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/gradients.md gives Grad-CAM of the photo, in the shapes that it claims."""
    shutil.copy(ROOT / "examples" / "images" / "grace_hopper.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code, *_ = blocks("python", (ROOT / "docs" / "gradients.md").read_text("utf-8"))
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102 - the page is ours
    found = names["found"]
    assert isinstance(found, layertap_api.LocalFeatures)
    assert found["layer4:gradient"].shape == (1, 512, 7, 7)
    assert found["objective.value"].shape == (1,)
    assert found["objective.index"].shape == (1, 1)
    assert found["layer4:grad_cam"].shape == (1, 7, 7)
    assert found["layer4:grad_cam"].abs().sum() > 0
