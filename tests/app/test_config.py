"""layertap.toml is read correctly; errors in it name the file, the line, the key and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from layertap.app import budget
from layertap.app.budget import default_mib, excess
from layertap.app.config import ServerConfig, default_config, with_flags
from layertap.app.config_file import load_config
from layertap.app.lifecycle import compute_threads
from layertap.errors import ConfigError
from layertap.resources import available_cpus
from layertap.selection import Capture, LayerSelection
from layertap.settings import (
    HostOptions,
    ImageSettings,
    Limits,
    ModelSpec,
    ServedModel,
    ServerOptions,
    build,
    definitions,
)
from layertap.settings.value_kinds import MIB

WHOLE = """\
[server]
host = "0.0.0.0"
port = 9001
metrics_port = -1
device = "cpu"
threads = 2
grace_seconds = 3
plan_cache = "off"
keep_memory = false
keep_memory_mib = 64
log_format = "json"
log_level = "info"
otel_endpoint = "http://127.0.0.1:4317"

[limits]
request_mib = 16
pending = 4

[[models]]
name = "a"
source = "resnet18"
weights = "w.pth"
weights_key = "teacher.backbone"
seed = 5
item_shape = [3, 64, 64]
layers = ["layer1", "avgpool:input"]
require_finite = true
precision = "bfloat16"
channels_last = true
cuda_graphs = [1, 8]
image_mean = [0.5, 0.4, 0.3]
image_std = 1
image_resize = 60
image_crop = []
image_interpolation = "bicubic"
image_color = "gray"
exif_orientation = false

[[models]]
source = "mynets:build"
item_shape = [50, 6]
input_dtype = "float64"
free_dims = [0]
"""


@pytest.fixture
def read(tmp_path: Path):
    """Write a text to layertap.toml and read it."""

    def read_text(text: str) -> ServerConfig:
        file = tmp_path / "layertap.toml"
        file.write_text(text, encoding="utf-8")
        return load_config(file)

    return read_text


def test_every_key_is_read(read, tmp_path: Path) -> None:
    """Each section's values arrive in the objects from which the server is built."""
    config = read(WHOLE)
    server = config.server
    assert (server.host, server.port, server.metrics_port) == ("0.0.0.0", 9001, -1)  # noqa: S104
    assert (server.device, server.threads, server.grace_seconds) == ("cpu", 2, 3.0)
    assert (server.keep_memory, server.keep_memory_bytes) == (False, 64 * MIB)
    assert (config.limits.request_bytes, config.limits.pending) == (16 * MIB, 4)
    first, second = config.models
    spec = first.spec
    assert (spec.name, spec.source, spec.weights, spec.seed) == (
        *("a", "resnet18", str(tmp_path / "w.pth"), 5),
    )
    assert spec.weights_key == "teacher.backbone"
    assert spec.item_shape == (3, 64, 64)
    assert (spec.precision, spec.channels_last) == ("bfloat16", True)
    assert spec.images == ImageSettings(
        mean=(0.5, 0.4, 0.3),
        std=(1.0,),
        resize=(60,),
        crop=(),
        interpolation="bicubic",
        color="gray",
        exif_orientation=False,
    )
    assert second.spec.images == ImageSettings()
    assert first.layers == (
        LayerSelection("layer1"),
        LayerSelection("avgpool", Capture.INPUT),
    )
    assert second.spec.name == "build"
    assert (spec.input_dtype, spec.free_dims) == ("", None)
    assert (second.spec.input_dtype, second.spec.free_dims) == ("float64", (0,))
    assert (first.options.require_finite, second.options) == (True, HostOptions())
    assert first.options.cuda_graphs == (1, 8)
    assert server.plan_cache == "off"
    assert (server.log_format, server.log_level) == ("json", "info")
    assert server.otel_endpoint == "http://127.0.0.1:4317"


def test_empty_file_is_the_defaults(read) -> None:
    """An empty file is the same as no file; with enough memory the defaults are the engine's."""
    assert read("") == default_config()
    for declared, here in ((Limits(), read("").limits), (ServerOptions(), read("").server)):
        for setting in definitions(type(declared)):
            expected = setting.value_in(declared)
            if setting.setting.memory_share:
                expected = min(expected, default_mib(setting.key))
            assert setting.value_in(here) == expected


def test_default_limits_fit_into_a_small_container() -> None:
    """With 2 GiB, the limits of replies and caches leave a third of the memory to the models."""
    memory = 2 << 30
    names = ("pending_mib", "plan_mib", "keep_memory_mib", "shared_memory_mib")
    defaults = {name: default_mib(name, memory) for name in names}
    assert defaults["pending_mib"] == 512
    assert sum(defaults.values()) << 20 <= memory * 2 / 3
    assert default_mib("reply_mib", memory) <= defaults["pending_mib"]
    assert default_mib("request_mib", memory) < defaults["pending_mib"]
    assert default_mib("keep_memory_mib", 1 << 20) == 1
    assert [default_mib(name, 1 << 40) for name in names] == [4096, 2048, 1024, 1024]


def test_a_small_container_gets_small_limits(read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that the file omits suit the memory; settings in the file are used unchanged."""
    monkeypatch.setattr(budget, "memory_limit", lambda: 2 << 30)
    config = read("[limits]\nplan_mib = 4096")
    assert config.limits.pending_bytes == 512 * MIB
    assert config.limits.plan_bytes == 4096 * MIB
    assert config.server.shared_memory_bytes == 256 * MIB
    assert default_config().limits.pending_bytes == 512 * MIB


def test_limits_beyond_the_memory_are_warned_of() -> None:
    """Limits that allow more memory than the process may use are named; limits that fit are not."""
    assert excess(1024 * MIB, 2 << 30) == ""
    warning = excess(4096 * MIB, 2 << 30)
    assert "4096 MiB" in warning
    assert "2048 MiB" in warning
    assert "pending_mib" in warning


def test_a_plan_cache_is_beside_the_file_that_names_it(read, tmp_path: Path, monkeypatch) -> None:
    """A relative folder is relative to the file; ``~``, ``auto`` and ``off`` work too."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert read('[server]\nplan_cache = "plans"').server.plan_cache == str(tmp_path / "plans")
    assert read('[server]\nplan_cache = "~/plans"').server.plan_cache == "/home/someone/plans"
    for word in ("auto", "off", "/plans"):
        assert read(f'[server]\nplan_cache = "{word}"').server.plan_cache == word


def test_modes_never_ask_for_more_than_the_cores() -> None:
    """Latency is one pass on all CPUs, throughput one pass per CPU; ``threads`` is the number."""
    cores = available_cpus()
    assert compute_threads(ServerOptions(), "cpu") == (1, None)
    assert compute_threads(ServerOptions(threads=3), "cpu") == (1, 3)
    assert compute_threads(ServerOptions(mode="throughput"), "cpu") == (cores, 1)
    assert compute_threads(ServerOptions(mode="throughput", threads=3), "cpu") == (3, 1)
    with pytest.raises(ConfigError, match="mode: got 'throughput' on cuda"):
        compute_threads(ServerOptions(mode="throughput"), "cuda")


@pytest.mark.parametrize("owner", [ServerOptions, Limits, ServedModel])
def test_every_setting_accepts_its_own_default(owner: type) -> None:
    """A default that is written in the file is valid, and has the same effect as omitting it."""
    settings = definitions(owner)
    assert len({each.key for each in settings}) == len(settings)
    for each in settings:
        assert each.setting.help.endswith(".")
        assert each.kind.expected
        if not each.required and each.default not in (None, ""):
            raw = each.kind.check(each.kind.to_raw(each.default))
            assert each.kind.from_raw(raw) == each.default


def test_layers_are_written_as_they_are_read() -> None:
    """Layers are converted to selections and back, with colons and equals signs in names."""
    (layers,) = (each for each in definitions(ServedModel) if each.key == "layers")
    names = ("layer1", "avgpool:input", r"heads.a\=b\:c=alias")
    model = build(ServedModel, {"source": "resnet18", "layers": names})
    assert model.layers[2] == LayerSelection("heads.a=b:c", alias="alias")
    assert layers.value_in(model) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[server]\nport = "x"', "line 2: server.port: got 'x', expected a port from 0"),
        ("[server]\nport = 70000", "line 2: server.port: got 70000, expected a port from 0"),
        ("[server]\nport = true", "line 2: server.port: got True"),
        ("[server]\nhots = 1", "line 2: server.hots: unknown key; did you mean 'host'?"),
        ("[server]\nqqq = 1", "line 2: server.qqq: unknown key; keys are host, port"),
        ("[sever]\nport = 1", "line 1: sever: unknown key; did you mean 'server'?"),
        ("# port\n\n[limits]\nbatch = 0", "line 4: limits.batch: got 0, expected a number from 1"),
        ("limits.batch = 0", "line 1: limits.batch: got 0"),
        ("server = 3", "line 1: server: got 3, expected a table headed [server]"),
        (
            "[models]\nsource = 'a'",
            "line 1: models: got {'source': 'a'}, expected a list of tables",
        ),
        (
            "[server]\ndevice = 'gpu'",
            "line 2: server.device: got 'gpu', expected 'auto', 'cpu', 'c",
        ),
        ("[server]\nkeep_memory = 1", "line 2: server.keep_memory: got 1, expected true or false"),
        ("[server]\nkeep_memory_mib = 0", "line 2: server.keep_memory_mib: got 0, expected a num"),
        (
            "[server]\nkeep_memory_mib = 9999999999",
            "keep_memory_mib: got 9999999999, expected a num",
        ),
        (
            "[server]\nlog_format = 'xml'",
            "line 2: server.log_format: got 'xml', expected 'human' or",
        ),
        ("[server]\nlog_level = 1", "line 2: server.log_level: got 1, expected 'debug', 'info',"),
        ("[[models]]\nname = 'a'", "line 1: models[0] has no source"),
        (
            "[[models]]\nsource = 'a'\n[[models]]\nsource = 'b'\nseed = -1",
            "line 5: models[1].seed: got -1, expected a number from 0",
        ),
        (
            "[[models]]\nsource = 'a'\nlayers = [\n  'layer1',\n  3,\n]",
            "line 3: models[0].layers: got ['layer1', 3], expected a list of layers",
        ),
        (
            "[[models]]\nsource = 'a'\nimage_mean = '0.5'",
            "line 3: models[0].image_mean: got '0.5', expected a number, or a list with one",
        ),
        (
            "[[models]]\nsource = 'a'\nimage_std = [0.5, 0]",
            "line 1: image_std: got [0.5, 0.0], expected a number above 0 for each channel",
        ),
        (
            "[[models]]\nsource = 'a'\nimage_crop = [0]",
            "line 3: models[0].image_crop: got [0], expected a size, a list of height",
        ),
        (
            "[[models]]\nsource = 'a'\nimage_color = 'bgr'",
            "line 3: models[0].image_color: got 'bgr', expected 'rgb' or 'gray'",
        ),
        ("[[models]]\nsource = 'a'\nname = 'a b'", "line 1: model name: got 'a b'"),
        ("[[models]]\nsource = 'a'\nlayers = ['b:up']", "line 1: layer: got 'b:up'"),
        (
            "[[models]]\nsource = 'a'\nname = '''\nseed = -1\n'''\nseed = -1",
            "line 6: models[0].seed: got -1",
        ),
        ("[server\nport = 1", "(at line 1, column 8)"),
    ],
)
def test_mistake_is_told_with_its_place(read, tmp_path: Path, text: str, message: str) -> None:
    """The message has the file, the line, the key, the value and what was expected."""
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(tmp_path / "layertap.toml") in str(caught.value)
    assert message in str(caught.value)


def test_unreadable_file_is_told(tmp_path: Path) -> None:
    """A missing file, or one that is not text, is a ConfigError that names it."""
    with pytest.raises(ConfigError, match=r"gone\.toml: No such file"):
        load_config(tmp_path / "gone.toml")
    (tmp_path / "raw.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"raw\.toml: not UTF-8"):
        load_config(tmp_path / "raw.toml")


def test_relative_paths_are_relative_to_the_file(read, tmp_path: Path) -> None:
    """Paths of sources and weights are relative to the file's folder; names are left unchanged."""
    text = "\n".join(
        f"[[models]]\nname = '{name}'\nsource = '{source}'\nweights = '{weights}'"
        for name, source, weights in (
            ("a", "nets/a.pt", "DEFAULT"),
            ("b", "torchscript:b", "IMAGENET1K_V1"),
            ("c", "resnet18", "w.safetensors"),
            ("d", "/abs/d.pt", "/abs/w.pth"),
        )
    )
    models = read(text).models
    found = [(model.spec.target, model.spec.weights) for model in models]
    assert found == [
        (str(tmp_path / "nets/a.pt"), "DEFAULT"),
        (str(tmp_path / "b"), "IMAGENET1K_V1"),
        ("resnet18", str(tmp_path / "w.safetensors")),
        ("/abs/d.pt", "/abs/w.pth"),
    ]


def test_a_tilde_is_the_home_folder(read, monkeypatch) -> None:
    """``~`` in the paths of weights and sources is the user's home, as in other paths."""
    monkeypatch.setenv("HOME", "/home/someone")
    text = "[[models]]\nname = 'a'\nsource = '{}'\nweights = '{}'"

    found = [
        (model.spec.target, model.spec.weights)
        for model in (
            *read(text.format("resnet18", "~/w.pth")).models,
            *read(text.format("~/nets/a.pt", "DEFAULT")).models,
        )
    ]

    assert found == [("resnet18", "/home/someone/w.pth"), ("/home/someone/nets/a.pt", "DEFAULT")]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_the_server_takes_the_devices_that_models_take(read, device: str) -> None:
    """One of several GPUs may be named in [server], as in [[models]]."""
    config = read(f"[server]\ndevice = '{device}'\n[[models]]\nsource = 'a'\ndevice = '{device}'")

    assert (config.server.device, config.models[0].device) == (device, device)


def test_clients_memory_is_configured(read) -> None:
    """It is off by default, and on with a list of users; a list without the option is an error."""
    assert not read("").server.allow_client_shm
    allowed = read("[server]\nallow_client_shm = true\nclient_shm_uids = [1000]\n").server
    assert (allowed.allow_client_shm, allowed.client_shm_uids) == (True, (1000,))
    with pytest.raises(
        ConfigError, match="client_shm_uids: has no effect without allow_client_shm"
    ):
        read("[server]\nclient_shm_uids = [1000]\n").check()
    with pytest.raises(ConfigError, match="client_shm_uids: got .* expected a list of numbers"):
        read("[server]\nclient_shm_uids = [-1]\n")


def test_flags_win(read) -> None:
    """Values on the command line replace those in the file, and no others."""
    config = read(WHOLE)
    merged = with_flags(
        config, model_flags={"seed": 9, "weights": None}, server_flags={"port": 0, "host": None}
    )
    assert (merged.server.port, merged.server.host) == (0, "0.0.0.0")  # noqa: S104
    assert [model.spec.seed for model in merged.models] == [9, 9]
    assert [Path(model.spec.weights).name for model in merged.models] == ["w.pth", "DEFAULT"]
    assert merged.limits == config.limits


def test_models_of_the_command_line_replace_the_files(read) -> None:
    """MODEL arguments replace the file's models, and the flags apply to each of them."""
    merged = with_flags(read(WHOLE), ["vgg16", "mine=m:f"], {"layers": ("conv1",)})
    assert [(m.name, m.spec.source, m.layers) for m in merged.models] == [
        ("vgg16", "vgg16", (LayerSelection("conv1"),)),
        ("mine", "m:f", (LayerSelection("conv1"),)),
    ]


def test_graphs_of_no_layers_are_refused() -> None:
    """Without layers there would be nothing to record, which the user hardly intends."""
    nothing = ServedModel(ModelSpec("resnet18"), options=HostOptions(cuda_graphs=(1, 8)))
    with pytest.raises(ConfigError, match=r"cuda_graphs of resnet18: got \[1, 8\] without layers"):
        ServerConfig(models=(nothing,)).check()


def test_two_models_of_one_name_are_refused() -> None:
    """Two models with one name are an error before any is loaded."""
    with pytest.raises(ConfigError, match="two models are called 'resnet18'"):
        with_flags(ServerConfig(), ["resnet18", "resnet18=vgg16"]).check()


def test_the_example_is_a_valid_configuration() -> None:
    """The example in the documentation is read without an error, and configures two models."""
    example = Path(__file__).parents[2] / "examples" / "layertap.toml"
    config = load_config(example)
    assert [model.name for model in config.models] == ["resnet18", "pools"]
    assert config.models[0].layers[1] == LayerSelection("avgpool", Capture.INPUT)
