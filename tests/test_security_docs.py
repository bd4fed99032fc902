"""The examples of docs/security.md work as they are, from nothing to layers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from layertap import Client, Tls, errors, read_token
from processes import layertap, serving

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("openssl") is None, reason="the page makes its files by openssl")
def test_a_newcomer_gets_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command and the client's code run, with a free port of this machine and the photo."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "images" / "grace_hopper.jpg", tmp_path / "photo.jpg")
    make_secrets, serve, layers, make_clients = (text.replace("\\\n", "") for text in blocks("sh"))
    for script in (make_secrets, make_clients):
        # The page's own commands; the environment keeps openssl's own settings.
        subprocess.run(["/bin/sh", "-euc", script], check=True, env=os.environ, capture_output=True)
    assert Path("server.key").stat().st_mode & 0o077 == 0
    args = [arg for arg in shlex.split(serve)[2:] if arg not in {"--host", "0.0.0.0"}]  # noqa: S104
    with serving(*args) as server:
        address = server.address.replace("127.0.0.1", "localhost")
        names: dict[str, object] = {}
        (code,) = blocks("python")
        exec(code.replace("localhost:8001", address), names)  # noqa: S102 - the page is ours
        assert list(names["features"]) == ["layer1"]
        listed = layertap(*shlex.split(layers.replace("localhost:8001", address))[1:])
        assert listed.returncode == 0, listed.stderr
        assert not [line for line in server.lines if "warning" in line and "preprocess" not in line]
    assert args[:3] == ["resnet18", "--weights", "random"]
    args[:3] = ["tinynets:chain", "--item-shape", "3,16,16"]  # It is loaded in less time.
    with serving(*args, "--tls-client-ca", "clients.pem") as server:
        token = read_token("admin.tokens")
        mine = Tls(ca="server.pem", certificate="me.pem", key="me.key")
        with Client(server.address, tls=mine, token=token) as client:
            assert client.list_models()
        with (
            Client(server.address, tls=Tls(ca="server.pem"), token=token) as client,
            pytest.raises(errors.UnavailableError),
        ):
            client.list_models(timeout=20)
