"""Recordings through a server: converted there by the folder's own feature extractor."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest
import soundfile
import torch
import transformers

import hfnets
from hostile import mutated
from infering import arrays, bytes_tensor, given, output, parameters
from kept import kept
from layertap import Audio, Client
from layertap.engine import Engine
from layertap.errors import InvalidInputError
from layertap.inference import grpc_service_pb2
from layertap.local import load
from layertap.models import ModelSpec
from layertap.settings import Limits
from layertap.v1 import feature_service_pb2
from processes import layertap
from serving import running_server
from stubs import inference_stub

RATE = 16000
LAYER = "output.last_hidden_state"
SPEECH: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37,
    "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "vocab_size": 9,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}  # fmt: skip


def speech(folder: Path, norm: str, layers: int = 1) -> Path:
    """Save a small wav2vec 2.0 with its feature extractor; with layer norm, it takes a mask."""
    sizes = {**SPEECH, "num_hidden_layers": layers}
    hfnets.saved(folder, "Wav2Vec2Model", feat_extract_norm=norm, **sizes)
    transformers.Wav2Vec2FeatureExtractor(
        sampling_rate=RATE, do_normalize=True, return_attention_mask=norm == "layer"
    ).save_pretrained(folder)
    return folder


def whisper(folder: Path) -> Path:
    """Save a small Whisper for one second of audio with its feature extractor."""
    hfnets.saved(
        folder, "WhisperModel", vocab_size=50, num_mel_bins=8, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=50, max_target_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperFeatureExtractor(
        feature_size=8, sampling_rate=RATE, chunk_length=1
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models."""
    nets = tmp_path_factory.mktemp("nets")
    speech(nets / "wav2vec2", "layer", layers=2)  # The page's example asks for the second one.
    speech(nets / "unmasked", "group")
    whisper(nets / "whisper")
    hfnets.saved(nets / "bare", "Wav2Vec2Model", feat_extract_norm="group", **SPEECH)
    return nets


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A server of two wav2vec 2.0, a Whisper, and one model without a feature extractor."""
    engine = Engine(Limits(audio_samples=2 * RATE, batch=8), plan_cache=kept())
    for name in ("wav2vec2", "unmasked", "whisper", "bare"):
        engine.load(ModelSpec(f"hf:{folder / name}", item_shape=None))
    with running_server(engine) as address:
        yield address
    engine.close()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def tone(samples: int, seed: int = 0) -> np.ndarray:
    """Return a waveform of noise and a tone."""
    random = np.random.default_rng(seed)
    at = np.arange(samples) / RATE
    wave = 0.3 * np.sin(2 * np.pi * 440 * at) + 0.05 * random.standard_normal(samples)
    return wave.astype(np.float32)


def file(wave: np.ndarray, form: str = "WAV", rate: int = RATE, **options: Any) -> bytes:
    """Return an encoded recording."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, **options)
    return buffer.getvalue()


def expected(folder: Path, waves: list[np.ndarray], **more: Any) -> Any:
    """Return the result of a fresh model of transformers for waveforms."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    made = extractor(waves, sampling_rate=RATE, padding=True, return_tensors="pt")
    if "input_features" in made:
        made = extractor(waves, sampling_rate=RATE, return_tensors="pt")
    return model(**made, **more)


@pytest.mark.parametrize("extractor", ["hook", "auto"])
def test_recordings_are_converted_as_transformers_does(
    folder: Path, client: Client, extractor: str
) -> None:
    """Arrays, WAV and FLAC files give the values of the folder's own feature extractor."""
    wave = tone(4000)
    own = expected(folder / "wav2vec2", [wave]).last_hidden_state
    got = client.extract("wav2vec2", Audio(wave, RATE), LAYER, extractor=extractor)[LAYER]
    assert np.allclose(got, own, atol=1e-5)
    lossless = file(wave, subtype="FLOAT")
    assert np.array_equal(
        client.extract("wav2vec2", Audio(lossless), LAYER, extractor="hook")[LAYER],
        client.extract("wav2vec2", Audio(wave, RATE), LAYER, extractor="hook")[LAYER],
    )
    packed = file(wave, "FLAC", subtype="PCM_24")
    flac = client.extract("wav2vec2", Audio(packed), LAYER, extractor=extractor)[LAYER]
    assert np.allclose(flac, own, atol=1e-3)


def test_int16_and_several_channels(folder: Path, client: Client) -> None:
    """int16 is divided by 32768, and the channels of a file are averaged."""
    stereo = np.stack([tone(3000), tone(3000, seed=1)], 1)
    own = expected(folder / "wav2vec2", [stereo.mean(1)]).last_hidden_state
    given = Audio(file(stereo, subtype="FLOAT"))
    assert np.allclose(client.extract("wav2vec2", given, LAYER)[LAYER], own, atol=1e-5)
    whole = (tone(3000) * 2**15).astype(np.int16)
    own = expected(folder / "wav2vec2", [whole / np.float32(2**15)]).last_hidden_state
    got = client.extract("wav2vec2", Audio(whole, RATE), LAYER)[LAYER]
    assert np.allclose(got, own, atol=1e-5)
    pcm = client.extract("wav2vec2", Audio(file(whole, subtype="PCM_16")), LAYER)[LAYER]
    assert np.allclose(pcm, own, atol=1e-5)


def test_lengths_with_a_mask(folder: Path, client: Client) -> None:
    """The mask is made too, so each recording has the values that it has alone."""
    waves = [tone(4000), tone(2400, seed=2)]
    got = client.extract("wav2vec2", Audio(waves, RATE), LAYER, extractor="hook")[LAYER]
    together = expected(folder / "wav2vec2", waves).last_hidden_state
    assert np.allclose(got, together, atol=1e-5)
    for wave, row in zip(waves, got, strict=True):
        alone = expected(folder / "wav2vec2", [wave]).last_hidden_state[0]
        # The last frame of a padded recording reaches into the padding.
        inside = len(alone) - 1
        assert np.allclose(row[:inside], alone[:inside], atol=1e-2)


def test_whisper_pads_to_its_full_length(folder: Path, client: Client) -> None:
    """Spectrograms have the length that the model was trained with, beside the decoder's ids."""
    waves = [tone(16000), tone(7000, seed=3)]
    ids = np.array([[1, 5, 7], [1, 9, 4]])
    given = {"input_features": Audio(waves, RATE), "decoder_input_ids": ids}
    got = client.extract("whisper", given, ["encoder.layers.0", LAYER], extractor="hook")
    own = expected(folder / "whisper", waves, decoder_input_ids=torch.from_numpy(ids))
    assert np.allclose(got[LAYER], own.last_hidden_state, atol=1e-5)
    alone = {"input_features": Audio(waves[1], RATE), "decoder_input_ids": ids[1:]}
    one = client.extract("whisper", alone, LAYER, extractor="hook")[LAYER]
    assert np.allclose(one, got[LAYER][1:], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "recordings", "words"),
    [
        ("wav2vec2", Audio(tone(4000), 44100), "got 44100 samples per second, expected 16000"),
        ("wav2vec2", Audio([file(tone(900)), b"ID3 mp3"]), r"audio\[1\]: .* no WAV or FLAC file"),
        ("wav2vec2", Audio(file(tone(900))[:60]), r"audio\[0\]"),
        ("wav2vec2", Audio(file(tone(900), "FLAC")[:400]), r"audio\[0\]"),
        ("wav2vec2", Audio(b"RIFF\x08\0\0\0WAVEjunk"), "can't be decoded"),
        ("wav2vec2", Audio(np.zeros(0, np.float32), RATE), "got no samples"),
        ("wav2vec2", Audio(np.array([0, np.nan] * 900), RATE), "NaN or infinity among its samples"),
        ("wav2vec2", Audio(np.full(900, 3e38), RATE), r"got samples of up to 3e\+38, expected at"),
        ("wav2vec2", Audio(tone(2 * RATE + 1), RATE), "32001 samples of 1 channels, expected at"),
        (
            "wav2vec2",
            Audio([tone(20000)] * 2, RATE),
            r"audio\[1\]: .* expected at most 12000 in all",
        ),
        ("wav2vec2", Audio([tone(900)] * 9, RATE), "a batch of 9, the audio of 'input_values'"),
        ("wav2vec2", Audio([]), "audio: got none for 'input_values'"),
        ("wav2vec2", Audio(tone(3), RATE), "can't run on items of input_values"),
        ("wav2vec2", {"attention_mask": Audio(tone(900), RATE)}, "expected 'input_values'"),
        (
            "wav2vec2",
            {"input_values": Audio(tone(900), RATE), "attention_mask": np.ones((1, 900), int)},
            "got 'attention_mask' and audio for 'input_values', expected one of them",
        ),
        ("unmasked", Audio([tone(900), tone(1000)], RATE), "got recordings of 900 to 1000 samples"),
        (
            "whisper",
            {"input_features": Audio(tone(16001), RATE), "decoder_input_ids": np.ones((1, 2), int)},
            r"got 1.00006 seconds, expected at most 1; cut",
        ),
        ("bare", Audio(tone(900), RATE), "model 'bare' takes none, as it has no feature extractor"),
    ],
)
def test_recordings_that_can_not_be_taken(
    client: Client, model: str, recordings: Any, words: str
) -> None:
    """Each error says what was sent and what was expected, and which recording it is about."""
    with pytest.raises(InvalidInputError, match=words):
        client.extract(model, recordings, LAYER)


def test_what_the_client_refuses() -> None:
    """What can't be sent is refused before anything is sent."""
    with pytest.raises(InvalidInputError, match="without a sampling rate"):
        Audio(tone(9))
    with pytest.raises(InvalidInputError, match=r"got shape \[2, 9\], expected \[samples\]"):
        Audio(np.zeros((2, 9)), RATE)
    with pytest.raises(InvalidInputError, match="got dtype int64"):
        Audio(np.zeros(9, np.int64), RATE)
    with pytest.raises(InvalidInputError, match=r"audio\[0\]: can't read 'nowhere.wav'"):
        Audio("nowhere.wav")
    with pytest.raises(InvalidInputError, match=r"audio\[1\]: got a float"):
        Audio([tone(9), 0.5], RATE)
    with pytest.raises(InvalidInputError, match="sampling_rate: got 0"):
        Audio(tone(9), 0)


def test_a_header_can_not_announce_more_than_is_allowed(address: str) -> None:
    """A tiny file whose header claims hours of samples is refused before memory is taken."""
    header = b"\x10\x00\x10\x00" + bytes(6)
    header += ((RATE << 44) | (0 << 41) | (15 << 36) | (2**36 - 1)).to_bytes(8, "big") + bytes(16)
    flac = b"fLaC\x80" + len(header).to_bytes(3, "big") + header
    wave = b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVEfmt " + struct.pack(
        "<IHHIIHH", 16, 1, 1000, RATE, 2000 * RATE, 2000, 16
    ) + b"data" + struct.pack("<I", 2**32 - 2) + bytes(9)  # fmt: skip
    with Client(address) as client:
        for data in (flac, wave):
            with pytest.raises(InvalidInputError, match=r"audio\[0\]"):
                client.extract("wav2vec2", Audio(data), LAYER)


def test_mutated_files_are_answered_or_refused(address: str) -> None:
    """Files with changes anywhere never harm the server."""
    random = Random(9)
    good = [file(tone(700), subtype="PCM_16"), file(tone(700), "FLAC"), file(tone(700))]
    answered, refusals = 0, set()
    with Client(address) as client:
        for _ in range(200):
            data = bytearray(random.choice(good))
            for _ in range(random.randrange(1, 6)):
                data[random.randrange(len(data))] = random.randrange(256)
            try:
                client.extract("wav2vec2", Audio(bytes(data)), LAYER, extractor="hook")
                answered += 1
            except InvalidInputError as error:
                refusals.add(str(error))
        assert 0 < answered < 200
        about_it = ("audio[0]", "can't run on items")
        assert [each for each in refusals if not any(words in each for words in about_it)] == []
        assert client.extract("wav2vec2", Audio(tone(700), RATE), LAYER)[LAYER].shape[0] == 1


def test_mutated_messages_are_answered_or_refused(address: str) -> None:
    """Requests with changes at any depth get a documented error."""
    random = Random(4)
    layers = [feature_service_pb2.LayerSelection(layer=LAYER)]
    audio = [feature_service_pb2.AudioBatch(audio=[file(tone(500))], input="input_values")]
    good = feature_service_pb2.ExtractRequest(
        model="wav2vec2", audio=audio, layers=layers
    ).SerializeToString()
    codes = set()
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/layertap.v1.FeatureService/Extract")
        for _ in range(100):
            try:
                call(mutated(random, good))
            except grpc.RpcError as error:
                codes.add(error.code())
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    assert not codes & {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


def test_open_inference_takes_recordings(address: str, client: Client) -> None:
    """They are BYTES, under the model's own name or as `audio`."""
    wave = tone(900)
    own = client.extract("wav2vec2", Audio(wave, RATE), LAYER, extractor="hook")[LAYER]
    with grpc.insecure_channel(address) as channel:
        for name in ("audio", "input_values"):
            response = inference_stub(channel).ModelInfer(
                grpc_service_pb2.ModelInferRequest(
                    model_name="wav2vec2",
                    inputs=[given(name, "BYTES", [1])],
                    outputs=[output(LAYER)],
                    raw_input_contents=[bytes_tensor(file(wave, subtype="FLOAT"))],
                    parameters=parameters({"extractor": "hook"}),
                )
            )
            assert np.array_equal(arrays(response)[LAYER], own)


def test_a_stream_takes_recordings(client: Client) -> None:
    """Items of a stream are recordings as those of a request are."""
    waves = [tone(700, seed) for seed in range(3)]
    got = list(client.extract_many("wav2vec2", [Audio(wave, RATE) for wave in waves], LAYER))
    for number, wave in enumerate(waves):
        one = client.extract("wav2vec2", Audio(wave, RATE), LAYER)[LAYER]
        assert np.allclose(got[number][LAYER], one, atol=1e-5)


def test_the_description_says_how_recordings_are_taken(client: Client) -> None:
    """The sampling rate, the limit and the extractor are shown."""
    spec, mask, *_ = client.describe_model("wav2vec2").model.inputs
    assert (spec.audio, spec.sampling_rate, mask.audio) == (True, RATE, False)
    assert "the folder's own Wav2Vec2FeatureExtractor" in spec.audio_preprocessing
    (unmasked, *_) = client.describe_model("unmasked").model.inputs
    assert "of one length" in unmasked.audio_preprocessing
    (features, *_) = client.describe_model("whisper").model.inputs
    assert "at most 1 seconds" in features.audio_preprocessing


def test_the_example_of_the_docs_runs(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/audio.md shows of recordings is answered."""
    for name in ("speech.wav", "a.wav", "b.flac"):
        (tmp_path / name).write_bytes(file(tone(900), name.partition(".")[2].upper()))
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "audio.md").read_text("utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    assert code.count("Audio(") == 3
    exec(code.replace("127.0.0.1:8001", address), {"waveform": tone(900)})  # noqa: S102 - ours


@pytest.mark.long
def test_in_process_and_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    """`layertap.load` takes Audio, and `layertap extract` takes files by --audio."""
    path = tmp_path / "a.wav"
    path.write_bytes(file(tone(4000), subtype="FLOAT"))
    own = expected(folder / "wav2vec2", [tone(4000)]).last_hidden_state
    with load(f"hf:{folder / 'wav2vec2'}") as model:
        got = model.extract(Audio(path), LAYER)[LAYER]
        assert str(model.describe().inputs[0]).endswith("float32 or audio")
    assert torch.allclose(got, own, atol=1e-5)
    out = tmp_path / "a.npz"
    shown = layertap("layers", f"hf:{folder / 'wav2vec2'}", fresh=False)
    assert "audio: WAV or FLAC at 16000 samples per second" in shown.stdout
    done = layertap(
        "extract", f"hf:{folder / 'wav2vec2'}", "--audio", str(path), "-l", LAYER, "-o", str(out),
        fresh=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays_:
        assert np.allclose(arrays_[LAYER], own, atol=1e-5)
