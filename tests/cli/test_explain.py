"""``layertap explain`` draws the same map from a model in this process and from a server."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from kept import kept
from layertap import Client, LayerSelection, MapForm, Method
from layertap.cli.main import main
from layertap.cli.png import png
from layertap.engine import Engine
from layertap.models import ModelSpec
from serving import running_server

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--weights", "random", "--item-shape", "3,64,64")


def explain(*args: str) -> Result:
    return CliRunner().invoke(main, ["explain", *args])


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A picture that is not square."""
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server with a small resnet18."""
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec("resnet18", weights="random", item_shape=(3, 64, 64)))
    with running_server(engine) as address:
        yield address
    engine.close()


@pytest.mark.long
def test_a_server_and_this_process_draw_the_same_overlay(
    address: str, photo: str, tmp_path: Path
) -> None:
    """The PNG has the pixels of the overlay, and the objective is printed."""
    options = ("--objective", "fc[argmax]", "--layer", "layer4", "--method", "grad-cam")
    near, far = tmp_path / "near.png", tmp_path / "far.png"
    for result in (
        explain("resnet18", photo, *options, "-o", str(near), *TINY),
        explain("resnet18", photo, *options, "-o", str(far), "--server", address),
    ):
        assert result.exit_code == 0, result.output
        assert "64 x 64, objective " in result.output
        assert "at index " in result.output
    assert near.read_bytes() == far.read_bytes()
    selection = LayerSelection(
        "layer4",
        "gradient",
        method=Method.GRAD_CAM,
        map_form=MapForm.OVERLAY,  # type: ignore[arg-type]
    )
    with Client(address) as client:
        found = client.extract("resnet18", photo, selection, objective="fc[argmax]")
    with Image.open(near) as image:
        drawn = np.asarray(image.convert("RGB"))
    assert np.array_equal(drawn, found["layer4:grad_cam"][0])
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 100


def test_numbers_instead_of_a_picture(address: str, photo: str, tmp_path: Path) -> None:
    """A .npy file has the resized map, of the layer's input on request, and eigen-cam no score."""
    file = tmp_path / "map.npy"
    result = explain(
        "resnet18", photo, "-l", "layer4:input", "--method", "eigen-cam", "-o", str(file),
        "--server", address,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "objective" not in result.output
    with Client(address) as client:
        found = client.extract("resnet18", photo, "layer3:eigen_cam:map=resized")
    assert np.load(file).shape == (64, 64)
    assert np.allclose(np.load(file), found["layer3:eigen_cam"][0], atol=1e-4)


def test_the_score_is_that_of_the_best_class_if_none_is_named(
    address: str, photo: str, tmp_path: Path
) -> None:
    """Without an objective it is the largest element of the model's result."""
    files = tmp_path / "a.npy", tmp_path / "b.npy"
    for file, more in zip(files, ((), ("--objective", "fc[maximum]")), strict=True):
        result = explain(
            "resnet18", photo, "-l", "layer4", "-o", str(file), "--server", address, *more
        )
        assert result.exit_code == 0, result.output
    assert np.array_equal(np.load(files[0]), np.load(files[1]))


def test_the_commands_of_the_docs_run(
    address: str, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for resnet18 on the pages of gradients and interventions write the files they name."""
    pages = (ROOT / "docs" / f"{name}.md" for name in ("gradients", "interventions"))
    lines = [
        line
        for page in pages
        for line in page.read_text("utf-8").splitlines()
        if re.match("layertap (explain|extract) resnet18 photo.jpg ", line)
    ]
    assert len(lines) == 4
    shutil.copy(photo, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        _, *args = shlex.split(line.replace("127.0.0.1:8001", address))
        local = [] if "--server" in args else TINY
        result = CliRunner().invoke(main, [*args, *local])
        assert result.exit_code == 0, result.output
        written = Path(args[args.index("-o") + 1])
        assert written.stat().st_size > 100
        written.unlink()


@pytest.mark.parametrize("suffix", [".npy", ".png"])
def test_a_map_of_zeros_is_a_warning(photo: str, tmp_path: Path, suffix: str) -> None:
    """The patches of a vision transformer's last block don't count for the score; others do."""
    made = tmp_path / f"map{suffix}"
    for block, zeros in ((0, False), (1, True)):
        result = explain(
            "gradnets:tiny_vit", photo, "-l", f"encoder.layers.encoder_layer_{block}",
            "-o", str(made), "--item-shape", "3,32,32", "--image-mean", "0.5", "--image-std", "0.5",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert made.exists()
        assert ("the map is 0 everywhere" in result.output) == zeros


def test_a_map_of_the_changed_model(address: str, photo: str, tmp_path: Path) -> None:
    """``--set`` changes values on the way to the score, and a line says what each one changed."""
    near, far, plain = (tmp_path / f"{name}.npy" for name in ("near", "far", "plain"))
    changes = ("--set", "layer4:channel=0..256:zero", "--set", "layer2:scale=3")
    for result in (
        explain("resnet18", photo, "-l", "layer3", "-o", str(near), *changes, *TINY),
        explain("resnet18", photo, "-l", "layer3", "-o", str(far), *changes, "--server", address),
    ):
        assert result.exit_code == 0, result.output
        zero, scale = result.output.splitlines()[1:]
        assert zero.startswith("layer4:channel=0..256:zero: 1,024 elements in 1 call, ")
        assert zero.endswith(" and is 0")
        assert scale.startswith("layer2:scale=3: 8,192 elements in 1 call, ")
    explain("resnet18", photo, "-l", "layer3", "-o", str(plain), "--server", address)
    assert np.array_equal(np.load(near), np.load(far))
    assert not np.allclose(np.load(near), np.load(plain), rtol=0.1)
    with Client(address) as client:
        found = client.extract(
            "resnet18", photo, "layer3:grad_cam:map=resized", objective="fc[maximum]",
            interventions=changes[1::2],
        )  # fmt: skip
    assert np.array_equal(np.load(far), found["layer3:grad_cam"][0])


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("-l layer4 -o map.jpg", 1, "ends in .png or .npy"),
        ("-l layer4 -o nowhere/map.png", 1, "there is no folder"),
        ("-l layer4:gradient -o map.png", 2, "expected LAYER or LAYER:input"),
        ("-l layer4 -o map.png --method gradient", 2, "grad-cam"),
        ("-l layer4 -o map.png --objective fc", 1, "expected LAYER[INDEX]"),
        ("-l layer4 -o map.png --method eigen-cam --objective fc[1]", 2, "eigen-cam takes none"),
        ("-l fc -o map.png", 1, "takes patch tokens"),
        ("-l layer9 -o map.png", 1, "layer9"),
        ("-l layer4 -o map.png --set layer4:chanel=3:zero", 1, "AXIS=INDICES"),
        ("-l layer4 -o map.png --set layer4:channel=3", 1, "after the last colon"),
        ("-l layer4 -o map.png --set layer4:add=@nothing.npy", 1, "can't be read"),
    ],
)
def test_mistakes_have_a_message(
    request: pytest.FixtureRequest, line: str, code: int, message: str, tmp_path: Path
) -> None:
    """A wrong command line exits with 2, a wrong request with 1, and nothing is written."""
    request.getfixturevalue("monkeypatch").chdir(tmp_path)
    photo, address = map(request.getfixturevalue, ("photo", "address"))
    result = explain("resnet18", photo, *line.split(), "--server", address)
    assert result.exit_code == code, result.output
    assert message in result.output.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_png_files_are_read_by_others(tmp_path: Path) -> None:
    """Pillow reads the pixels that were written."""
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    file = tmp_path / "a.png"
    file.write_bytes(png(pixels))
    with Image.open(file) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)


def test_the_picture_of_the_docs_is_what_the_example_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example draws red over the orange disc, blue over the square, and gray elsewhere."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "python")
    overlay = importlib.import_module("overlay")
    monkeypatch.setattr(sys, "argv", ["overlay.py", str(tmp_path / "made.png")])
    overlay.main()
    files = tmp_path / "made.png", ROOT / "docs" / "gradients_overlay.png"
    made, shown = (np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files)
    assert np.abs(made - shown).max() <= 2
    right = made[:, overlay.SIDE :]
    disc, square, corner = right[65, 59], right[133, 139], right[5, 5]
    assert disc[0] > disc[2] + 100
    assert square[2] > square[0] + 100
    assert len(set(corner.tolist())) == 1
    assert files[1].stat().st_size <= 100 << 10
