"""``layertap extract`` writes rows of images, the same from a local model and a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torchvision import transforms

import severalnets
from disks import small_disk
from kept import kept
from layertap import Client
from layertap.cli.main import main
from layertap.engine import Engine
from layertap.models import ModelSpec
from serving import running_server

MODEL = "squeezenet1_1"
SIDE = 64
"""Of the images that it takes, smaller than its own, so that it is loaded in less time."""
TINY = ("--item-shape", "3,16,16")
LAYERS = ("-l", "features.3", "-l", "features.0:input=pixels")


def extract(*args: str) -> Result:
    return CliRunner().invoke(main, ["extract", *args])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five different pictures."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    engine = Engine(plan_cache=kept())
    engine.load(ModelSpec(MODEL, weights="random", item_shape=(3, SIDE, SIDE)))
    with running_server(engine) as address:
        yield address
    engine.close()


@pytest.fixture
def remote(address: str, images: list[str], tmp_path: Path):
    """Extract from the server and load the file."""

    def run(*args: str) -> tuple[Result, dict[str, np.ndarray]]:
        out = tmp_path / "out.npz"
        result = extract(MODEL, *images, "-o", str(out), "--server", address, *args)
        assert result.exit_code == 0, result.output
        with np.load(out) as stored:
            return result, dict(stored)

    return run


def test_rows_in_the_order_of_the_images(remote, address: str, images: list[str]) -> None:
    """Each image's row equals the reply to a request for that image alone, for any batch size."""
    result, stored = remote(*LAYERS, "--batch-size", "2")
    assert list(stored) == ["ids", "features.3", "pixels"]
    assert stored["ids"].tolist() == images
    assert stored["pixels"].shape == (5, 3, SIDE, SIDE)
    with Client(address) as client:
        for index, image in enumerate(images):
            alone = client.extract(MODEL, image, ["features.3", "features.0:input=pixels"])
            np.testing.assert_array_equal(stored["pixels"][index], alone["pixels"][0])
            np.testing.assert_allclose(
                stored["features.3"][index], alone["features.3"][0], rtol=1e-4, atol=1e-5
            )
    assert "[5, 128, 15, 15]" in result.output
    assert "hook" in result.output


def test_same_here_and_from_a_server(remote, images: list[str], tmp_path: Path) -> None:
    """A model in this process gives the same values as a server."""
    _, stored = remote(*LAYERS)
    out = tmp_path / "local.npz"
    options = ("--weights", "random", "--item-shape", f"3,{SIDE},{SIDE}")
    result = extract(MODEL, *images, *LAYERS, "-o", str(out), *options)
    assert result.exit_code == 0, result.output
    with np.load(out) as local:
        assert list(local) == list(stored)
        np.testing.assert_array_equal(local["pixels"], stored["pixels"])
        # Convolutions may sum in another order in another engine's memory.
        np.testing.assert_allclose(local["features.3"], stored["features.3"], 1e-4, 1e-5)


def test_reduction_dtype_and_extractor(remote) -> None:
    """``--reduce``, ``--dtype`` and ``--extractor`` apply to every layer."""
    options = ("--reduce", "global_average_pool", "--dtype", "float16", "--extractor", "fx")
    result, stored = remote("-l", "features.3", *options)
    assert stored["features.3"].shape == (5, 128)
    assert stored["features.3"].dtype == np.float16
    assert "fx" in result.output


def test_a_variant_is_named_and_shown(remote) -> None:
    """The table tells which program captured the layers."""
    done, arrays = remote("-l", "features.3", "--extractor", "torchscript")
    named, its = remote(
        "-l",
        "features.3",
        "--extractor",
        "torchscript",
        "--variant",
        "channels_last",
        "--overwrite",
    )
    assert "torchscript channels_last" in named.stdout
    assert "channels_last" not in done.stdout
    np.testing.assert_allclose(its["features.3"], arrays["features.3"], 1e-4, 1e-5)


def test_bfloat16_is_stored_as_float32(remote) -> None:
    """bfloat16, which .npz lacks, is stored as float32, which holds all its values."""
    _, stored = remote("-l", "features.3", "--dtype", "bfloat16")
    values = stored["features.3"]
    assert values.dtype == np.float32
    assert values.any()
    assert not (values.view(np.uint32) & 0xFFFF).any()


def test_image_options_change_what_the_model_sees(images: list[str], tmp_path: Path) -> None:
    """The options determine the pixels; the reference is torchvision's own transform."""
    out = tmp_path / "out.npz"
    options = ("--image-mean", "0.5", "--image-std", "0.25,0.5,1", "--image-resize", "48")
    options += ("--image-crop", "40,44", "--image-interpolation", "bicubic")

    result = extract(
        *("tinynets:residual", images[0], "-l", "conv1:input", "-o", str(out)), *options
    )

    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    reference = transforms.Compose(
        [
            transforms.Resize(48, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop((40, 44)),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.25, 0.5, 1]),
        ]
    )
    with np.load(out) as stored, Image.open(images[0]) as image:
        np.testing.assert_array_equal(stored["conv1:input"][0], reference(image).numpy())


def test_assumed_preprocessing_is_warned_of(images: list[str], tmp_path: Path) -> None:
    """A factory that says nothing about images is served by assumptions, with a warning."""
    out = tmp_path / "out.npz"

    result = extract(
        *("tinynets:residual", images[0], "-l", "layer1", "-o", str(out), "--item-shape", "3,16,16")
    )

    assert result.exit_code == 0, result.output
    assert "warning: model residual: neither the model nor the configuration says" in result.output
    assert "image_mean, image_std, image_resize, image_crop" in result.output


def test_refusal_leaves_the_old_file(address: str, images: list[str], tmp_path: Path) -> None:
    """An unknown layer gives exit code 1 with close matches; the old file stays."""
    out = tmp_path / "out.npz"
    out.write_text("old")
    wrong = (MODEL, images[0], "-l", "featres.3", "-o", str(out), "--server", address)
    assert "--overwrite replaces it" in extract(*wrong).output
    result = extract(*wrong, "--overwrite")
    assert result.exit_code == 1
    assert "features.3" in result.output
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_missing_files_are_told_first(images: list[str], tmp_path: Path) -> None:
    """A missing image or folder is reported before any model is loaded."""
    out = str(tmp_path / "a.npz")
    result = extract("no_model", images[0], "gone.jpg", "-l", "a", "-o", out)
    assert (result.exit_code, "gone.jpg: no such file" in result.output) == (1, True)
    result = extract("no_model", images[0], "-l", "a", "-o", str(tmp_path / "no" / "a.npz"))
    assert (result.exit_code, "no such folder" in result.output) == (1, True)


def test_a_broken_image_is_named(address: str, images: list[str], tmp_path: Path) -> None:
    """The one broken file among many images is named, whatever batch it is in."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for order in ([*images[:4], str(broken)], [str(broken), *images[:2]]):
        command = (
            *(MODEL, *order, "-l", "features.3", "-o", str(tmp_path / f"{len(order)}.npz")),
            *("--server", address, "--batch-size", "2"),
        )
        result = extract(*command)
        assert result.exit_code == 1
        assert f"image {broken}: got 8 bytes of something else" in result.output
        result = extract(*command, "--on-error", "skip", "--overwrite")
        assert result.exit_code == 3, result.output
        with np.load(tmp_path / f"{len(order)}.npz") as stored:
            assert stored["ids"].tolist() == [path for path in order if path != str(broken)]
            assert len(stored["features.3"]) == len(order) - 1
        [line] = (tmp_path / f"{len(order)}.npz.failures.jsonl").read_text().splitlines()
        assert json.loads(line)["id"] == str(broken)
        assert "got 8 bytes of something else" in json.loads(line)["error"]


def test_a_place_that_takes_no_file_is_told(images: list[str], tmp_path: Path) -> None:
    """If a file can't be created, the error has no traceback."""
    out = tmp_path / ("a" * 251 + ".npz")
    result = extract("tinynets:residual", images[0], "-l", "layer1", "-o", str(out), *TINY)
    assert (result.exit_code, "File name too long" in result.output) == (1, True)


def test_a_disk_that_has_no_room_leaves_no_part_of_a_file(images: list[str], tmp_path) -> None:
    """The error names the output and the reason, and the old file is unchanged."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk.folder / "out.npz").write_bytes(b"before")
        disk.fill()
        result = extract(
            *("tinynets:residual", *images, "-l", "layer1", "-o", str(disk.folder / "out.npz")),
            *("--overwrite", *TINY),
        )
        assert result.exit_code == 1
        assert f"output {disk.folder / 'out.npz'}: No space left on device" in result.output
        assert disk.names() == ["out.npz"]
        assert (disk.folder / "out.npz").read_bytes() == b"before"


def test_a_folder_that_can_not_be_written_to_is_found_out_first(images, tmp_path) -> None:
    """A read-only disk is refused before the model is loaded: this model does not even exist."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        disk.forbid_writing()
        result = extract("no_model", images[0], "-l", "a", "-o", str(disk.folder / "a.npz"))
    assert (result.exit_code, "can't be written to" in result.output) == (1, True)


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Path]:
    """Five rows of ids and of a mask, as .npy files."""
    ids = np.random.default_rng(0).integers(1, 50, (5, 4))
    mask = np.ones_like(ids)
    mask[1::2, 2:] = 0
    files = {"input_ids": tmp_path / "ids.npy", "attention_mask": tmp_path / "mask.npy"}
    np.save(files["input_ids"], ids)
    np.save(files["attention_mask"], mask)
    return files


def test_arrays_for_each_input(rows: dict[str, Path], tmp_path: Path) -> None:
    """A row of the result for each row of the arrays, whatever the batch size."""
    out = tmp_path / "out.npz"
    inputs = [part for name, file in rows.items() for part in ("--input", f"{name}={file}")]
    result = extract(
        *("severalnets:masked", *inputs, "-l", "head", "-o", str(out), "--batch-size", "2"),
        *("--item-shape", "4", "--extractor", "hook"),
    )
    assert result.exit_code == 0, result.output
    given = {name: torch.from_numpy(np.load(file)) for name, file in rows.items()}
    with torch.inference_mode():
        expected = severalnets.masked()(**given).numpy()
    with np.load(out) as stored:
        assert np.allclose(stored["head"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give one of: INPUTs, texts by --text"),
        (["cat.jpg", "--input", "{ids}"], "give one of: INPUTs, texts by --text"),
        (["--input", "a={ids}", "--input", "a={ids}"], "--input: got 'a' twice"),
        (["--input", "a={ids}", "--input", "{ids}"], "without a name, expected NAME=FILE.npy"),
        (["--input", "missing.npy"], "input missing.npy: No such file"),
        (["--input", "{text}"], "got no .npy file of numbers"),
        (["--input", "a={ids}", "--input", "b={short}"], "rows of 5 of 'a', 2 of 'b'"),
    ],
)
def test_arrays_that_can_not_be_read_are_refused(
    rows: dict[str, Path], tmp_path: Path, arguments: list[str], text: str
) -> None:
    """Before any model is loaded, with the file and what was expected."""
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "short.npy", np.zeros((2, 4)))
    places = {"ids": rows["input_ids"], "text": tmp_path / "text.npy",
              "short": tmp_path / "short.npy"}  # fmt: skip
    filled = [argument.format(**places) for argument in arguments]
    result = extract("severalnets:masked", *filled, "-l", "head", "-o", str(tmp_path / "o.npz"))
    assert result.exit_code != 0
    assert text in result.output


def test_gradients_are_written_like_layers(remote, address: str, images: list[str]) -> None:
    """Gradients, maps and the objective have a row for each image, whatever the batch size."""
    layers = ["features.3:gradient", "features.3:grad_cam", "inputs.x:gradient"]
    flags = [text for layer in layers for text in ("-l", layer)]
    _, stored = remote(*flags, "--objective", "[maximum]", "--batch-size", "2")
    assert list(stored) == ["ids", *layers, "objective.value", "objective.index"]
    assert stored["features.3:grad_cam"].shape == (5, 15, 15)
    with Client(address) as client:
        for index, image in enumerate(images):
            alone = client.extract(MODEL, image, layers, objective="[maximum]")
            for name in alone:
                scale = np.abs(alone[name]).max()
                error = np.abs(stored[name][index] - alone[name][0]).max()
                assert error <= 1e-4 * scale


def test_an_objective_that_makes_no_sense_is_refused(images: list[str], tmp_path: Path) -> None:
    """The message says how objectives are written, before a model is loaded."""
    out = str(tmp_path / "out.npz")
    result = extract("nothing", images[0], "-l", "a:gradient", "--objective", "fc", "-o", out)
    assert result.exit_code != 0
    assert "expected LAYER[INDEX]" in result.output + str(result.exception)


def test_changes_are_applied_to_each_batch(
    remote, address: str, images: list[str], tmp_path: Path
) -> None:
    """``--set`` changes values for every image, in order, with arrays from files."""
    np.save(tmp_path / "steer.npy", np.float32(0.5))
    changes = ["features.3:channel=0..4:zero", f"features.3:add=2*@{tmp_path / 'steer.npy'}"]
    flags = [text for change in changes for text in ("--set", change)]
    result, stored = remote("-l", "features.3", *flags, "--batch-size", "2")
    assert list(stored) == ["ids", "features.3"]
    assert (stored["features.3"][:, :4] == 1).all()
    with Client(address) as client:
        for index, image in enumerate(images):
            plain = client.extract(MODEL, image, "features.3", extractor="hook")["features.3"][0]
            error = np.abs(stored["features.3"][index][4:] - (plain[4:] + 1)).max()
            assert error <= 1e-4 * np.abs(plain).max()
    *_, zero, add = filter(None, map(str.strip, result.output.splitlines()))
    places = stored["features.3"][0, 0].size
    assert zero.split()[:2] == [changes[0], f"{5 * 4 * places:,}"]
    assert add.split()[1:] == [f"{stored['features.3'].size:,}"] * 2
    assert "no element got another value" not in result.output


def test_a_change_that_changes_nothing_is_a_warning(remote) -> None:
    """An intervention after which every element of every item has its old value is named."""
    result, _ = remote("-l", "features.3", "--set", "features.3:scale=1")
    assert "--set features.3:scale=1: no element got another value" in result.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("layer4", "after the last colon"),
        ("layer4:add=@nothing.npy", "can't be read"),
        ("layer4:item=0:zero", "picks items"),
        ("layer4:chanel=0:zero", "AXIS=INDICES"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(
    images: list[str], tmp_path: Path, change: str, words: str
) -> None:
    """The message says how changes are written; a data set has no items with a place."""
    out = str(tmp_path / "out.npz")
    result = extract("tinynets:residual", images[0], "-l", "layer1", "--set", change, "-o", out)
    assert result.exit_code != 0
    assert words in result.output + str(result.exception)
