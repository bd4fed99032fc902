"""A path given as weights is a file, an index of shards, or a folder; no code in it is run."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from layertap.errors import WeightsUnavailableError
from layertap.models.checkpoint_files import (
    config_folder,
    files_of_weights,
    read_checkpoint,
)
from layertap.models.stand_ins import StandIn
from layertap.settings.paths import is_path

Save = Callable[[dict[str, torch.Tensor], Path], None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DEFAULT", False),
        ("IMAGENET1K_V1", False),
        ("ResNet18_Weights.IMAGENET1K_V1", False),
        ("random", False),
        ("w.pth", True),
        ("w.safetensors", True),
        ("model_best.pth.tar", True),
        ("model.safetensors.index.json", True),
        ("./w", True),
        ("/data/w", True),
    ],
)
def test_paths_are_told_from_names(text: str, expected: bool) -> None:
    """A weights file's suffix or a slash makes it a path; anything else is a name."""
    assert is_path(text) is expected


def test_torch_and_safetensors_files_hold_the_same(tiny_net: nn.Module, tmp_path: Path) -> None:
    """Both file formats return the saved tensors."""
    state = tiny_net.state_dict()
    torch.save(state, tmp_path / "w.pth")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")

    for name in ("w.pth", "w.safetensors"):
        read = read_checkpoint(str(tmp_path / name)).contents
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The message names the missing file."""
    with pytest.raises(WeightsUnavailableError, match=r"nothing\.pth: no such file"):
        read_checkpoint(str(tmp_path / "nothing.pth"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x02.", b"PK\x03\x04zip"])
def test_foreign_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    """A file of another kind is refused with what was expected, whatever error its reader has."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(WeightsUnavailableError, match="expected a state dict"):
        read_checkpoint(str(tmp_path / name))


class Trap:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


class Setter:
    """Pickles as an object whose class would create a file when its state is set."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, Path]) -> None:
        state["path"].touch()


@pytest.mark.parametrize("kind", [Trap, Setter])
def test_nothing_in_a_file_is_run(kind: type, tmp_path: Path) -> None:
    """A file that calls a function or sets an object's state is read without doing so."""
    contents = {"weight": torch.ones(1), "other": kind(tmp_path / "trapped")}
    torch.save(contents, tmp_path / "w.pth")

    read = read_checkpoint(str(tmp_path / "w.pth")).contents

    assert torch.equal(read["weight"], torch.ones(1))
    assert isinstance(read["other"], StandIn)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("kind", [Trap, Setter])
def test_nothing_in_a_file_of_the_old_format_is_run(kind: type, tmp_path: Path) -> None:
    """Files older than torch 1.6 don't list their classes, so those with classes are refused."""
    contents = {"weight": torch.ones(1), "other": kind(tmp_path / "trapped")}
    torch.save(contents, tmp_path / "w.pth", _use_new_zipfile_serialization=False)

    with pytest.raises(WeightsUnavailableError, match="expected a state dict"):
        read_checkpoint(str(tmp_path / "w.pth"))
    assert not (tmp_path / "trapped").exists()


class Settings(dict):
    """An instance of a dict subclass, as in configuration libraries."""


def test_objects_beside_the_weights_are_stood_in_for(tmp_path: Path) -> None:
    """Settings, counters and paths of training scripts don't prevent reading the weights."""
    torch.save(
        {
            "state_dict": {"weight": torch.ones(2)},
            "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a/b")),
            "best": np.float64(0.5),
            "history": np.arange(3),
            "counts": defaultdict(int, {"a": 1}),
            "settings": Settings(lr=1, nested=Settings(a=2)),
        },
        tmp_path / "w.pth",
    )

    before = set(torch.serialization.get_safe_globals())

    read = read_checkpoint(str(tmp_path / "w.pth")).contents

    assert torch.equal(read["state_dict"]["weight"], torch.ones(2))
    assert read["args"].origin == "argparse.Namespace"
    assert read["args"].content["lr"] == 0.1
    assert isinstance(read["history"], StandIn)
    assert set(torch.serialization.get_safe_globals()) == before


def shards(folder: Path, name: str, save: Save) -> dict[str, torch.Tensor]:
    """Write a state dict in two shards with their index, and return it."""
    state = {"a.weight": torch.rand(2), "a.bias": torch.rand(1), "b.weight": torch.rand(3)}
    stem, suffix = name.split(".")
    weight_map = {}
    for number, keys in enumerate((["a.weight"], ["a.bias", "b.weight"]), 1):
        shard = f"{stem}-{number:05d}-of-00002.{suffix}"
        save({key: state[key] for key in keys}, folder / shard)
        weight_map |= dict.fromkeys(keys, shard)
    index = {"metadata": {"total_size": 24}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    return state


FORMATS: dict[str, Save] = {
    "model.safetensors": safetensors.torch.save_file,
    "pytorch_model.bin": torch.save,
    "net.safetensors": safetensors.torch.save_file,
}


@pytest.mark.parametrize("name", FORMATS)
def test_shards_are_read_by_their_index_or_folder(name: str, tmp_path: Path) -> None:
    """An index, or a folder with one, gives the tensors of all its shards."""
    state = shards(tmp_path, name, FORMATS[name])

    for path in (tmp_path, tmp_path / f"{name}.index.json"):
        read = read_checkpoint(str(path))
        assert read.name == path.name
        assert read.contents.keys() == state.keys()
        assert all(torch.equal(read.contents[key], state[key]) for key in state)
        assert {file.name for file in files_of_weights(str(path))} >= {
            f"{name}.index.json",
            *(file.name for file in tmp_path.glob("*-of-*")),
        }


def test_a_shard_alone_is_refused(tmp_path: Path) -> None:
    """A single shard has only a part of the weights; the message says what to give instead."""
    shards(tmp_path, "model.safetensors", safetensors.torch.save_file)

    with pytest.raises(
        WeightsUnavailableError, match=r"it is shard 2 of 2; .* \(model.safetensors.index.json\)"
    ):
        read_checkpoint(str(tmp_path / "model-00002-of-00002.safetensors"))


def test_an_only_shard_is_a_file(tmp_path: Path) -> None:
    """A model that is saved as one shard is complete."""
    file = tmp_path / "model-00001-of-00001.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, file)

    assert list(read_checkpoint(str(file)).contents) == ["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(), "is not there"),
        (
            lambda folder: safetensors.torch.save_file(
                {"x": torch.ones(1)}, folder / "model-00001-of-00002.safetensors"
            ),
            r"lacks 'a\.weight'",
        ),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "Expecting"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
            "expected a 'weight_map'",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}})
            ),
            "expected a 'weight_map' .* beside the index",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": 3}})
            ),
            "expected a 'weight_map'",
        ),
    ],
)
def test_a_broken_index_is_refused(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    """Missing shards and tensors, and an index that points elsewhere, are named."""
    shards(tmp_path, "model.safetensors", safetensors.torch.save_file)
    change(tmp_path)

    with pytest.raises(WeightsUnavailableError, match=message):
        read_checkpoint(str(tmp_path))


def test_a_folder_is_read_as_hugging_face_reads_it(tmp_path: Path) -> None:
    """If a folder has a safetensors file and a pickled one, the safetensors file is used."""
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(read_checkpoint(str(tmp_path)).contents) == ["b"]

    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read_checkpoint(str(tmp_path)).contents) == ["a"]
    assert files_of_weights(str(tmp_path))[0] == tmp_path / "model.safetensors"
    assert tmp_path / "preprocessor_config.json" in files_of_weights(str(tmp_path))
    assert files_of_weights("./gone.pth") == (Path("gone.pth"),)


def test_a_folder_without_one_choice_is_refused(tmp_path: Path) -> None:
    """A folder with no weights, or with several, is refused with what it holds."""
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        WeightsUnavailableError, match=r"expected one weights file .*it holds notes"
    ):
        read_checkpoint(str(tmp_path))

    for name in ("first.pth", "last.pth"):
        torch.save({}, tmp_path / name)
    with pytest.raises(WeightsUnavailableError, match=r"it holds first\.pth, last\.pth; name one"):
        read_checkpoint(str(tmp_path))


def test_the_configuration_beside_published_weights_counts(tmp_path: Path) -> None:
    """The configuration in a weights folder is used; one next to a single file is not."""
    for name in ("model.safetensors", "mine.safetensors"):
        (tmp_path / name).touch()

    assert config_folder(str(tmp_path)) == tmp_path
    assert config_folder(str(tmp_path / "model.safetensors")) == tmp_path
    assert config_folder(str(tmp_path / "mine.safetensors")) is None
    assert config_folder("DEFAULT") is None
