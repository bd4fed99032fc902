"""Files of certificates and tokens are checked at the start; missing protection is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from authorities import ADMIN, EXTRACT, UNKNOWN, Authority, Pair, token_file
from layertap.app.config_file import load_config
from layertap.app.security import Security, open_security
from layertap.errors import ConfigError
from layertap.services.tokens import Right
from layertap.settings import SecretFiles, ServerOptions

OPEN = "0.0.0.0"  # noqa: S104 - the warning is what is tested


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority in the test's folder."""
    return Authority(tmp_path / "ca")


@pytest.fixture
def pair(authority: Authority) -> Pair:
    """A server's certificate and key."""
    return authority.issue("localhost")


def test_a_key_of_another_certificate_is_told(authority: Authority, pair: Pair) -> None:
    """A mismatch is found at the start; the error names the setting and both files."""
    other = authority.issue("localhost")
    with pytest.raises(ConfigError) as caught:
        open_security(SecretFiles(tls_cert=pair.certificate, tls_key=other.key))
    text = f"tls_key: {other.key}: is not the key of the certificate in {pair.certificate}"
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("tls_cert", "got no certificate, expected some in PEM"),
        ("tls_key", "holds no key in PEM for"),
        ("tls_client_ca", "got no certificate, expected some in PEM"),
        ("extract_tokens_file", "line 1: got an invalid bearer token"),
        ("admin_tokens_file", "line 1: got an invalid bearer token"),
    ],
)
def test_a_file_that_will_not_do_is_told(
    tmp_path: Path, authority: Authority, pair: Pair, wrong: str, message: str
) -> None:
    """The error names the setting and the file, whether the file is missing or malformed."""
    good = {
        "tls_cert": pair.certificate,
        "tls_key": pair.key,
        "tls_client_ca": authority.file,
        "extract_tokens_file": token_file(tmp_path / "e", EXTRACT),
        "admin_tokens_file": token_file(tmp_path / "a", ADMIN),
    }
    file = tmp_path / "wrong"
    with pytest.raises(ConfigError, match=f"{wrong}: {file}: No such file"):
        open_security(SecretFiles(**{**good, wrong: file}))
    file.write_text("something of mine\n")
    with pytest.raises(ConfigError) as caught:
        open_security(SecretFiles(**{**good, wrong: file}))
    assert f"{wrong}: {file}" in str(caught.value)
    assert message in str(caught.value)
    assert "of mine" not in str(caught.value)


def test_an_encrypted_key_is_told_and_never_asked_about(pair: Pair) -> None:
    """A key with a passphrase is an error; the terminal is not asked for the passphrase."""
    from cryptography.hazmat.primitives import serialization as pem

    key = pem.load_pem_private_key(pair.key.read_bytes(), None)
    for form in (pem.PrivateFormat.PKCS8, pem.PrivateFormat.TraditionalOpenSSL):
        pair.key.write_bytes(
            key.private_bytes(pem.Encoding.PEM, form, pem.BestAvailableEncryption(b"word"))
        )
        with pytest.raises(ConfigError, match=r"tls_key: .*the key is encrypted"):
            open_security(SecretFiles(tls_cert=pair.certificate, tls_key=pair.key))


def test_half_of_a_setting_is_told(authority: Authority, pair: Pair) -> None:
    """A certificate without a key, or a client CA without TLS, is an error."""
    with pytest.raises(ConfigError, match=r"tls_cert: .*got no tls_key"):
        open_security(SecretFiles(tls_cert=pair.certificate))
    with pytest.raises(ConfigError, match=r"tls_key: .*got no tls_cert"):
        open_security(SecretFiles(tls_key=pair.key))
    with pytest.raises(ConfigError, match=r"tls_client_ca: .*got neither"):
        open_security(SecretFiles(tls_client_ca=authority.file))


def test_the_files_are_those_of_the_configuration(tmp_path: Path, authority: Authority) -> None:
    """[server] names the files, relative to its own, and they become the server's security."""
    pair = authority.issue("localhost")
    token_file(tmp_path / "extract.tokens", EXTRACT)
    token_file(tmp_path / "admin.tokens", ADMIN)
    config = tmp_path / "layertap.toml"
    config.write_text(
        f"[server]\ntls_cert = 'ca/{pair.certificate.name}'\ntls_key = '{pair.key}'\n"
        "tls_client_ca = 'ca/ca.pem'\nextract_tokens_file = 'extract.tokens'\n"
        "admin_tokens_file = 'admin.tokens'\n"
    )
    security = open_security(load_config(config).server.secrets)
    assert security.tls is not None
    assert security.tls.mutual
    assert security.tokens.right_of(EXTRACT) < security.tokens.right_of(ADMIN)
    assert security.exposed == ()
    assert open_security(ServerOptions().secrets).tls is None


def test_a_leaked_token_goes_even_where_the_certificates_are_broken(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    """A reload that fails for TLS still reads the tokens, and reports the failure."""
    tokens = token_file(tmp_path / "extract.tokens", EXTRACT, UNKNOWN)
    files = SecretFiles(tls_cert=pair.certificate, tls_key=pair.key, extract_tokens_file=tokens)
    security = open_security(files)
    assert security.tokens.right_of(UNKNOWN) is Right.EXTRACT
    key = pair.key.read_bytes()
    pair.key.write_bytes(b"no key")
    token_file(tokens, EXTRACT)
    with pytest.raises(ConfigError, match="tls_key"):
        security.reload()
    assert security.tokens.right_of(UNKNOWN) is Right.NONE
    assert security.tokens.right_of(EXTRACT) is Right.EXTRACT
    pair.key.write_bytes(key)
    security.reload()


OPEN_PLAIN = "may use it: there is no authentication and no encryption"
OPEN_TLS = "may use it: there is no authentication"
PLAIN_TOKENS = "tokens cross the network as plain text"
METRICS = "the metrics page there has neither"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", [OPEN_PLAIN]),
        ("extract", [PLAIN_TOKENS, METRICS]),
        ("extract admin", [PLAIN_TOKENS, METRICS]),
        ("admin", [OPEN_PLAIN, PLAIN_TOKENS]),
        ("tls", [OPEN_TLS, METRICS]),
        ("tls admin", [OPEN_TLS, METRICS]),
        ("tls extract", [METRICS]),
        ("tls mutual", [METRICS]),
        ("tls mutual extract admin", [METRICS]),
    ],
)
def test_open_doors_are_told(
    tmp_path: Path, authority: Authority, pair: Pair, given: str, expected: list[str]
) -> None:
    """If other machines can reach the address, the warning names exactly what is missing."""
    files = {
        "tls": {"tls_cert": pair.certificate, "tls_key": pair.key},
        "mutual": {"tls_client_ca": authority.file},
        "extract": {"extract_tokens_file": token_file(tmp_path / "e", EXTRACT)},
        "admin": {"admin_tokens_file": token_file(tmp_path / "a", ADMIN)},
    }
    chosen = {key: file for name in given.split() for key, file in files[name].items()}
    security = open_security(SecretFiles(**chosen))
    warnings = list(security.warnings(OPEN, metrics=True))
    assert len(warnings) == len(expected)
    for warning, part in zip(warnings, expected, strict=True):
        assert part in warning
        assert warning.startswith("0.0.0.0 can be reached from other machines")
    assert any("and no encryption" in text for text in warnings) is (OPEN_PLAIN in expected)
    assert not any("metrics" in text for text in security.warnings(OPEN, metrics=False))
    assert list(security.warnings("127.0.0.1", metrics=True)) == []
    assert list(security.warnings("[::1]", metrics=True)) == []


@pytest.mark.parametrize("host", ["::", "[::]", "10.0.0.1", "example.org"])
def test_every_other_address_is_warned_of(host: str) -> None:
    """Other machines can reach every address except the loopback."""
    (warning,) = Security().warnings(host, metrics=False)
    assert warning.startswith(f"{host} can be reached")


def test_secrets_that_all_can_read_are_told(tmp_path: Path) -> None:
    """A token file that every user of the machine can read is reported, for any address."""
    file = token_file(tmp_path / "e", EXTRACT)
    file.chmod(0o644)
    security = open_security(SecretFiles(extract_tokens_file=file))
    (warning,) = security.warnings("127.0.0.1", metrics=True)
    assert str(file) in warning
