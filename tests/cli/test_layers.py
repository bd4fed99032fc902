"""``layertap layers`` shows what was measured, the same from a local model and a server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from google.protobuf.json_format import Parse
from rich.console import Console
from rich.table import Table

from kept import kept
from layertap.cli.main import main
from layertap.cli.render import _tree, console
from layertap.engine import Engine, describe
from layertap.models import ModelSpec
from layertap.v1 import feature_service_pb2
from layertap.wire.descriptions import description_to_proto
from processes import ENVIRONMENT
from serving import running_server
from tinynets import ITEM

SHAPE = ("--item-shape", "3,16,16")
NETS = ("residual", "silent", "dynamic", "keeps_state")


def layers(*args: str) -> Result:
    return CliRunner().invoke(main, ["layers", *args])


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(plan_cache=kept())
    for net in NETS:
        engine.load(ModelSpec(f"tinynets:{net}", item_shape=ITEM))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with running_server(engine) as address:
        yield address


def row(output: str, name: str) -> list[str]:
    """Split a table's line of a layer."""
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [name])


def drawn(table: Table, width: int) -> list[str]:
    """Draw a table on a terminal of that width."""
    terminal = Console(width=width, markup=False, highlight=False)
    with terminal.capture() as captured:
        terminal.print(table)
    return captured.get().splitlines()


def test_flat_table(address: str) -> None:
    """A pipe gets a flat table: shape with B, dtype, exact bytes, stride and letters."""
    output = layers("residual", "--server", address).output
    cells = "layer1 Sequential 1 [B, 8, ceil(H/2), ceil(W/2)] float32 2,048 2 CLFHET ---HET"
    assert row(output, "layer1") == cells.split()
    assert row(output, "layer1.0.relu_1")[2] == "2"
    assert row(output, "fc")[-2:] == ["--FHET", "---HET"]
    assert "C CHILDREN, L LAYER_GETTER, F FX, H HOOK, E EXPORT, T TORCHSCRIPT" in output
    taken = "takes x [B, 3, H=16, W=16] float32 or images (H, W: any size, here the default)"
    assert taken in output.splitlines()[0]


def test_the_image_preprocessing_is_shown(address: str) -> None:
    """A line has the steps from a file to the input, and which of them are assumptions."""
    output = layers("residual", "--server", address).output
    line = next(line for line in output.splitlines() if line.startswith("images: "))
    assert "EXIF orientation applied, RGB (alpha dropped), resize 18 (bilinear" in line
    assert "defaults, as nothing specifies them: image_mean" in line


def test_the_rules_of_passes_are_shown(address: str) -> None:
    """It is shown if passes are restricted or write state; other models have no such line."""
    output = layers("keeps_state", "--server", address).output
    assert "passes: one at a time, not shared by requests, the loaded state is restored" in output
    assert "note: its passes leave 'keeper.seen' changed" in output
    assert "passes:" not in layers("residual", "--server", address).output


def test_unserved_layer_has_its_reason(address: str) -> None:
    """A layer that no extractor serves has a reason, in the table and under the tree."""
    flat = layers("silent", "--server", address).output
    assert "none" in row(flat, "aux")
    assert "never runs" in " ".join(row(flat, "aux"))
    tree = layers("silent", "--tree", "--server", address).output
    assert "none: aux, read: the module never runs" in tree


def test_tree(address: str) -> None:
    """The tree has a line for each module below its parent, the last one with an elbow."""
    output = layers("residual", "--tree", "--server", address).output
    lines = [line.strip() for line in output.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("layer1"))
    names = [line.split("  ")[0].strip() for line in lines[at : at + 3]]
    assert names[0] == "layer1"
    assert lines[at + 1].startswith("├─ 0")
    assert lines[at + 2].startswith("│  ├─ conv1")
    assert any(line.startswith("└─ 1 ") for line in lines)
    assert any("ReLU×2" in line for line in lines)


def test_a_dot_inside_brackets_is_no_branch(engine: Engine) -> None:
    """A member whose key has a dot is one leaf, below nothing but its module."""
    engine.load(ModelSpec("namednets:look_alike", item_shape=ITEM))
    lines = drawn(_tree(describe(engine.host("look_alike")).layers), 200)
    engine.unload("look_alike")
    assert any(line.strip().startswith("pack[a.b] ") for line in lines)
    assert any(line.strip().startswith(("├─ b ", "└─ b ", "│  └─ b ")) for line in lines)


def test_only_types_give_way_to_a_narrow_terminal(engine: Engine) -> None:
    """On a narrow terminal types are cut short; lines and shapes stay complete."""
    tree = _tree(describe(engine.host("residual")).layers)
    natural = max(len(line.rstrip()) for line in drawn(tree, 500))
    assert natural < 90
    lines = drawn(tree, natural - 8)
    assert max(map(len, lines)) == natural - 8
    assert len(lines) == len(drawn(tree, 500))
    assert (
        sum("[B, 8, ⌈H/2⌉, ⌈W/2⌉]" in line and line.rstrip().endswith("---HET") for line in lines)
        > 10
    )
    assert any("BatchNo" in line and "…" in line for line in lines)


def test_dynamic_shape_is_marked(address: str) -> None:
    """A shape that depends on the content is an example, and marked as such."""
    assert "varies" in " ".join(row(layers("dynamic", "--server", address).output, "pick"))


def test_graph_nodes_only_with_all(address: str) -> None:
    """Graph nodes are shown with ``--all`` and in JSON only."""
    assert "layer1.0.add" not in layers("residual", "--server", address).output
    assert "layer1.0.add" in layers("residual", "--all", "--server", address).output
    assert "layer1.0.add" in layers("residual", "--json", "--server", address).output


def test_glob(address: str) -> None:
    """A glob filters the table and the JSON; a glob without a match is an error."""
    flat = layers("residual", "--glob", "layer?.0", "--server", address).output
    assert row(flat, "layer1.0")
    assert row(flat, "layer2.0")
    assert "layer1.0.conv1" not in flat
    found = json.loads(layers("residual", "--glob", "layer?", "--json", "--server", address).output)
    assert [layer["name"] for layer in found["layers"]] == ["layer1", "layer2"]
    missing = layers("residual", "--glob", "nope*", "--server", address)
    assert missing.exit_code == 1
    assert "matches no layer" in missing.output


@pytest.mark.parametrize("net", NETS)
def test_json_is_the_same_here_and_from_a_server(engine: Engine, address: str, net: str) -> None:
    """``--json`` prints the complete DescribeModelResponse, from a local model or a server."""
    remote = layers(net, "--json", "--server", address).output
    local = layers(f"tinynets:{net}", "--json", *SHAPE).output
    assert local == remote
    parsed = Parse(remote, feature_service_pb2.DescribeModelResponse())

    assert parsed == description_to_proto(describe(engine.host(net)))
    assert "bytes_per_item" in remote


@pytest.mark.long
def test_json_of_a_model_here_needs_no_messages() -> None:
    """A model that is measured in this process is described without protobuf and gRPC."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('google.protobuf', 'grpc', 'layertap.v1')))\n"
        "from layertap.cli.main import main\n"
        f"main(['layers', 'tinynets:residual', '--json', *{SHAPE!r}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["name"] == "residual"


def test_pipes_get_no_escapes(address: str) -> None:
    """Output to a pipe has no colours, and lines are never cut."""
    output = layers("residual", "--server", address).output
    assert "\x1b" not in output
    assert "…" not in output
    assert console().width > 1000


def test_the_catalogue_is_kept_where_the_flag_says(tmp_path: Path) -> None:
    """The second run shows what the first has measured; without a folder nothing is kept."""
    folder = tmp_path / "mine"
    runs = [layers("tinynets:residual", *SHAPE, "--plan-cache", str(folder)) for _ in range(2)]
    (kept_file,) = folder.glob("*.catalogue")
    assert kept_file.stat().st_size > 0
    assert runs[0].output == runs[1].output
    assert layers("tinynets:residual", *SHAPE, "--plan-cache", "off").output == runs[0].output
