"""The web config file on a real listener: TLS, client certificates, users, headers, and changes without a restart."""

import asyncio
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import bcrypt
import pytest
import trustme
from aiohttp import web
from cryptography.hazmat.primitives import serialization

from exporter.grammar import ConfigError
from exporter.webconfig import Passwords, WebGate

Serve = Callable[[str], Awaitable[str]]

HASH = bcrypt.hashpw(b"s3cr3t", bcrypt.gensalt(4)).decode()
OTHER_HASH = bcrypt.hashpw(b"other", bcrypt.gensalt(4)).decode()
TLS = "tls_server_config: {cert_file: server.pem, key_file: server.key"


async def get(url: str, **options: object) -> tuple[int, str, dict[str, str]]:
    """Return status, text and headers of one request on a connection of its own."""
    async with aiohttp.ClientSession() as session, session.get(url, **options) as response:
        return response.status, await response.text(), dict(response.headers)


def as_user(user: str, password: str) -> dict[str, str]:
    """Return the header that says who one is."""
    return {"Authorization": aiohttp.encode_basic_auth(user, password)}


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """Return a client context that trusts `authority`."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_users(serve: Serve) -> None:
    """A known user with the right password is let in; everyone else gets the same 401."""
    url = "http://" + await serve(f"basic_auth_users: {{alice: '{HASH}', bob: '{OTHER_HASH}'}}")
    for _ in range(2):
        assert (await get(url, headers=as_user("alice", "s3cr3t")))[:2] == (200, "hello")
        for user, password in [("alice", "wrong"), ("nobody", "s3cr3t"), ("bob", "s3cr3t"), ("", ""), ("alice", "x" * 100)]:
            status, text, headers = await get(url, headers=as_user(user, password))
            assert (status, text, headers["WWW-Authenticate"]) == (401, "Unauthorized\n", "Basic")


@pytest.mark.parametrize("header", ["", "Basic", "Basic !!!", "Basic bm9jb2xvbg==", "Bearer x", "Basic /w=="])
async def test_malformed_credentials(serve: Serve, header: str) -> None:
    """Credentials that cannot be read are no credentials."""
    url = "http://" + await serve(f"basic_auth_users: {{alice: '{HASH}'}}")
    assert (await get(url, headers={"Authorization": header}))[0] == 401


async def test_guessing_does_not_hold_up_who_was_let_in() -> None:
    """Any number of wrong passwords neither evicts a right one nor waits in a queue without end."""
    may_end = threading.Event()

    def check(password: bytes, _: bytes) -> bool:
        if password == b"slow":
            may_end.wait()
        return password == b"s3cr3t"

    passwords, users = Passwords(check), {"alice": HASH}
    assert await passwords.match(users, "alice", "s3cr3t")
    for number in range(2 * Passwords.REMEMBERED):
        assert not await passwords.match(users, "alice", f"guess {number}")
    guesses = [asyncio.create_task(passwords.match(users, "alice", "slow")) for _ in range(Passwords.WAITING + 1)]
    done, waiting = await asyncio.wait(guesses, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert [type(guess.exception()) for guess in done] == [web.HTTPServiceUnavailable]
    assert await asyncio.wait_for(passwords.match(users, "alice", "s3cr3t"), 60)
    may_end.set()
    assert not any(await asyncio.gather(*waiting))


async def test_headers_are_on_every_response(serve: Serve) -> None:
    """The configured headers are there on success, refusal and a path that does not exist."""
    text = f"http_server_config: {{headers: {{X-Frame-Options: deny}}}}\nbasic_auth_users: {{alice: '{HASH}'}}"
    url = "http://" + await serve(text)
    auth = as_user("alice", "s3cr3t")
    for status, path, options in [(200, "/", {"headers": auth}), (404, "/none", {"headers": auth}), (401, "/", {})]:
        answer = await get(url + path, **options)
        assert (answer[0], answer[2].get("X-Frame-Options")) == (status, "deny")


@pytest.mark.usefixtures("server_files")
async def test_tls(serve: Serve, authority: trustme.CA) -> None:
    """The listener speaks TLS 1.2 and newer with the certificate configured."""
    url = "https://" + await serve(TLS + "}")
    assert (await get(url, ssl=trusting(authority)))[:2] == (200, "hello")
    old = trusting(authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert (await get(url, ssl=old))[0] == 200


@pytest.mark.usefixtures("server_files")
async def test_tls_version_and_suite(serve: Serve, authority: trustme.CA) -> None:
    """A client that is older than min_version is refused; a named suite and curve are the ones spoken."""
    only = await serve(TLS + ", min_version: TLS13}")
    old = trusting(authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(aiohttp.ClientConnectorError):
        await get("https://" + only, ssl=old)
    text = TLS + ", max_version: TLS12, cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,"
    where = await serve(text + " TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384], curve_preferences: [CurveP256]}")
    host, port = where.split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=trusting(authority))
    name, version, _ = writer.get_extra_info("cipher")
    writer.close()
    assert "AES256-GCM-SHA384" in name
    assert version == "TLSv1.2"


@pytest.mark.usefixtures("server_files")
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_3])
async def test_old_versions_are_spoken_where_they_are_asked_for(
    serve: Serve, authority: trustme.CA, version: ssl.TLSVersion
) -> None:
    """min_version is not only taken: a client that knows nothing newer is served, and by default it is not."""
    client = trusting(authority)
    client.set_ciphers("DEFAULT:@SECLEVEL=0")
    client.minimum_version = client.maximum_version = version
    assert (await get("https://" + await serve(TLS + ", min_version: TLS10}"), ssl=client))[0] == 200
    default = "https://" + await serve(TLS + "}")
    if version is not ssl.TLSVersion.TLSv1_3:
        with pytest.raises(aiohttp.ClientConnectorError):
            await get(default, ssl=client)


@pytest.mark.usefixtures("server_files")
async def test_only_new_suites_mean_only_the_new_version(serve: Serve, authority: trustme.CA) -> None:
    """Where only TLS 1.3's suites are allowed, a client of TLS 1.2 is not served with others."""
    where = await serve(TLS + ", cipher_suites: [TLS_AES_128_GCM_SHA256]}")
    old = trusting(authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(aiohttp.ClientConnectorError):
        await get("https://" + where, ssl=old)
    assert (await get("https://" + where, ssl=trusting(authority)))[0] == 200


def test_encrypted_key_is_refused(tmp_path: Path, server_files: trustme.LeafCert) -> None:
    """A key that needs a pass phrase is an error; nobody at the terminal is asked for it."""
    key = serialization.load_pem_private_key(server_files.private_key_pem.bytes(), None)
    lock = serialization.BestAvailableEncryption(b"s3cr3t")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    (tmp_path / "server.key").write_bytes(pem)
    (tmp_path / "web.yml").write_text(TLS + "}")
    terminal, inside = os.openpty()
    command = ["setsid", "--ctty", sys.executable, "-m", "exporter", "--config.check"]
    done = subprocess.run(  # noqa: S603 -- the test's own
        [*command, f"--web.config.file={tmp_path}/web.yml"], stdin=inside, capture_output=True, timeout=60, check=False
    )
    os.close(inside)
    os.close(terminal)
    assert done.returncode == 1
    assert b"tls_server_config: cannot be used" in done.stderr


@pytest.mark.usefixtures("server_files")
async def test_client_certificates(serve: Serve, authority: trustme.CA) -> None:
    """Only a client with a certificate of the authority, and with an allowed name, is let in."""
    client = "client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.pem"
    text = f"{TLS}, {client}, client_allowed_sans: [prometheus, '::1']}}"
    url = "https://" + await serve(text)
    with pytest.raises(aiohttp.ClientError):
        await get(url, ssl=trusting(authority))
    known, named, numbered, stranger = (trusting(authority) for _ in range(4))
    authority.issue_cert("someone").configure_cert(known)
    authority.issue_cert("prometheus").configure_cert(named)
    authority.issue_cert("::1").configure_cert(numbered)
    trustme.CA().issue_cert("prometheus").configure_cert(stranger)
    assert (await get(url, ssl=named))[:2] == (200, "hello")
    assert (await get(url, ssl=numbered))[:2] == (200, "hello")
    assert (await get(url, ssl=known))[0] == 403
    with pytest.raises(aiohttp.ClientError):
        await get(url, ssl=stranger)


@pytest.mark.usefixtures("server_files")
async def test_certificate_is_replaced_without_restart(serve: Serve, tmp_path: Path, authority: trustme.CA) -> None:
    """The next connection after a change gets the new certificate; a broken file leaves the old one in force."""
    url = "https://" + await serve(TLS + "}")
    await get(url, ssl=trusting(authority))
    renewed = trustme.CA()
    certificate = renewed.issue_cert("127.0.0.1")
    (tmp_path / "server.pem").write_text("broken")
    assert (await get(url, ssl=trusting(authority)))[0] == 200
    certificate.private_key_pem.write_to_path(tmp_path / "server.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    assert (await get(url, ssl=trusting(renewed)))[0] == 200
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await get(url, ssl=trusting(authority))


async def test_users_change_without_restart(serve: Serve, tmp_path: Path) -> None:
    """The next request after a change is held against the new users; a broken file leaves the old ones in force."""
    url = "http://" + await serve(f"basic_auth_users: {{alice: '{HASH}'}}")
    alice, bob = as_user("alice", "s3cr3t"), as_user("bob", "other")
    assert [(await get(url, headers=who))[0] for who in (alice, bob)] == [200, 401]
    (tmp_path / "web.yml").write_text("basic_auth_users: {bob: plain-text}")
    assert [(await get(url, headers=who))[0] for who in (alice, bob)] == [200, 401]
    (tmp_path / "web.yml").write_text(f"basic_auth_users: {{bob: '{OTHER_HASH}'}}")
    assert [(await get(url, headers=who))[0] for who in (alice, bob)] == [401, 200]
    (tmp_path / "web.yml").unlink()
    assert [(await get(url, headers=who))[0] for who in (alice, bob)] == [401, 200]


BAD = {
    "basic_auth_users: {a: plain}": "basic_auth_users: {a: plain}",
    "tls_server_config: {cert_file: none.pem, key_file: none.key}": "cert_file cannot be read: No such file",
    "tls_server_config: {cert_file: web.yml, key_file: web.yml}": "tls_server_config: cannot be used",
    "tls_server_config: {cert_file: server.pem, key_file: .}": "key_file cannot be read: Is a directory",
    TLS + ", client_auth_type: RequireAndVerifyClientCert, client_ca_file: server.key}": "NO_CERTIFICATE_OR_CRL_FOUND",
    "tls_server_config: {cert_file: x}": "the key 'key_file' is required",
    TLS + ", client_auth_type: RequireAnyClientCert}": "without verifying them, which Python's TLS cannot do",
    TLS + ", client_auth_type: RequireAndVerifyClientCert}": "needs client_ca_file",
    TLS + ", client_allowed_sans: [x]}": "need a client_auth_type that verifies",
    'tls_server_config: {cert_file: "a\\0b", key_file: x}': "tls_server_config: cert_file cannot be read: embedded null",
    TLS + ", min_version: TLS13, max_version: TLS12}": "min_version: TLS13 is newer than max_version TLS12",
    TLS + ", min_version: SSL3}": "unknown TLS version 'SSL3'",
    TLS + ", cipher_suites: [TLS_RSA_WITH_RC4_128_SHA]}": "unknown cipher suite 'TLS_RSA_WITH_RC4_128_SHA'",
    TLS + ", curve_preferences: [CurveP256, X25519]}": "one curve at the most",
    "http_server_config: {headers: {Server: x}}": "unknown header 'Server'",
    'http_server_config: {headers: {X-Frame-Options: "a\\nb"}}': "control character",
    "tls_config: {}": "unknown key; did you mean 'tls_server_config'?",
}
BAD["basic_auth_users: {a: plain}"] = "the password of user 'a' is not a bcrypt hash"


@pytest.mark.usefixtures("server_files")
@pytest.mark.parametrize(("text", "error"), BAD.items(), ids=list(BAD.values()))
def test_bad_files(tmp_path: Path, text: str, error: str) -> None:
    """Every mistake is refused at the start with the file, the key and the rule."""
    (tmp_path / "web.yml").write_text(text)
    with pytest.raises(ConfigError, match="web.yml") as failure:
        WebGate(tmp_path / "web.yml", {})
    assert error in str(failure.value)
    assert "plain" not in str(failure.value)


@pytest.mark.usefixtures("server_files")
def test_promtool_takes_the_same_file(tmp_path: Path) -> None:
    """What is read here is a web config file to Prometheus as well."""
    text = (
        "tls_server_config: {cert_file: server.pem, key_file: server.key, client_auth_type: RequireAndVerifyClientCert,"
        " client_ca_file: ca.pem, min_version: TLS12, max_version: TLS13, prefer_server_cipher_suites: true,"
        " cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384], curve_preferences: [CurveP256]}\n"
        "http_server_config: {http2: true, headers: {X-Frame-Options: deny, Strict-Transport-Security: max-age=1}}\n"
        f"basic_auth_users: {{alice: '{HASH}'}}"
    )
    path = tmp_path / "web.yml"
    path.write_text(text)
    assert WebGate(path, {}).context is not None
    done = subprocess.run(["promtool", "check", "web-config", str(path)], capture_output=True, text=True, check=False)  # noqa: S603, S607
    assert done.returncode == 0, done.stderr
