"""A server with TLS and tokens, and commands that call it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from authorities import ADMIN, EXTRACT, Authority, token_file
from layertap import Client, Tls, errors, read_token
from layertap.cli.main import main
from processes import layertap, serving

NET = ("tinynets:residual", "--item-shape", "3,16,16")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_a_session_with_tls_and_tokens(tmp_path: Path) -> None:
    """`layertap serve` with certificates and tokens answers commands and clients that have them."""
    authority = Authority(tmp_path / "ca")
    pair, mine = authority.issue("localhost", "127.0.0.1"), authority.issue("me")
    extract = token_file(tmp_path / "extract.tokens", EXTRACT)
    config = tmp_path / "layertap.toml"
    config.write_text(
        f"[server]\ntls_cert = '{pair.certificate}'\ntls_key = '{pair.key}'\n"
        f"extract_tokens_file = 'extract.tokens'\n"
    )
    secrets = ("--tls-client-ca", authority.file, "--admin-tokens-file")
    token_file(tmp_path / "admin.tokens", ADMIN)
    with serving(
        *(*NET, "--config", str(config), *map(str, secrets), str(tmp_path / "admin.tokens")),
        *("--metrics-port", "0"),
    ) as server:
        known = ("--server", server.address, "--ca", authority.file)
        shown = (*known, "--cert", mine.certificate, "--key", mine.key)
        tls = Tls(ca=authority.file, certificate=mine.certificate, key=mine.key)
        with Client(server.address, tls=tls, token=read_token(extract)) as client:
            client.wait_ready()
            assert client.list_models()[0].name == "residual"

        listed = run("layers", "residual", "--flat", *shown, "--token-file", extract)
        assert listed.exit_code == 0, listed.output
        assert "layer1" in listed.output
        Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
        output = tmp_path / "a.npz"
        written = run(
            *("extract", "residual", tmp_path / "a.png", "-l", "layer1", "-o", output),
            *(*shown, "--token-file", extract),
        )
        assert written.exit_code == 0, written.output
        assert output.exists()

        # A probe has neither a certificate nor a token.
        ready = server.line(r"metrics on (\S+)$")[1].replace("/metrics", "/readyz")
        probe = run("health", "--url", ready)
        assert (probe.exit_code, probe.output) == (0, "ok\n")

        no_token = run("layers", "residual", *shown)
        assert no_token.exit_code == 1
        assert "a valid token is needed" in no_token.output
        assert run("layers", "residual", *known, "--token-file", extract).exit_code == 1
        assert not [line for line in server.lines if "warning" in line and "preprocess" not in line]


@pytest.mark.parametrize(
    "flags",
    [
        ("--tls-cert", "gone.pem", "--tls-key", "gone.key"),
        ("--extract-tokens-file", "gone.tokens"),
    ],
)
def test_a_missing_file_ends_the_start(flags: tuple[str, ...]) -> None:
    """`layertap serve` says which setting names which missing file, and ends with code 1."""
    result = layertap("serve", *NET, "--port", "0", "--metrics-port", "-1", *flags, fresh=False)
    assert result.returncode == 1
    key = flags[0].removeprefix("--").replace("-", "_")
    assert f"error: {key}: {flags[1]}: No such file or directory" in result.stderr
    assert "Traceback" not in result.stderr


def test_flags_of_a_connection_need_a_server() -> None:
    """Without a server these flags are usage errors, and nothing is loaded."""
    result = run("layers", "resnet18", "--ca", "ca.pem", "--token-file", "t")
    assert result.exit_code == 2
    assert "--ca, --token-file: only together with --server" in result.output


def test_a_token_is_refused_over_plain_text(tmp_path: Path) -> None:
    """The commands have the client's rule, and the option that overrides it."""
    token = token_file(tmp_path / "t", EXTRACT)
    result = run("layers", "net", "--server", "features.example.org:1", "--token-file", token)
    assert result.exit_code == 1
    assert "as plain text" in result.output
    assert EXTRACT not in result.output
    assert "--allow-plaintext-token" in run("layers", "--help").output
    with pytest.raises(errors.ConfigError):
        Client("features.example.org:1", token=read_token(token))
