"""Where a name leads is checked once, and that address is connected to: no rebinding, no redirect, no proxy changes it."""

import shutil
import socket
import subprocess
import threading

import pytest

from dsclip.data.sources import http as http_source
from dsclip.data.sources.storage import SourceError, Storage
from tests.http_shards import serve

NAME = "shards.example.org"
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    """A PEM with key for shards.example.org, which this process trusts."""
    path = tmp_path / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}",
               "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", tmp_path / "k.pem", "-out", tmp_path / "c.pem"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    path.write_bytes((tmp_path / "k.pem").read_bytes() + (tmp_path / "c.pem").read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "c.pem"))
    http_source._manager.cache_clear()
    yield path
    http_source._manager.cache_clear()


@pytest.fixture
def names(monkeypatch):
    """names(address, ...): what the name server answers, one after the other, the last for good. 127.0.0.2 counts as public."""
    plain, asked = socket.getaddrinfo, []
    monkeypatch.setattr(http_source, "is_public", lambda address: address == "127.0.0.2", raising=False)
    monkeypatch.setattr(http_source, "_resolved", {})

    def answers(*addresses):
        def resolve(host, *arguments, **options):
            if host not in (NAME, "other.example.org"):
                return plain(host, *arguments, **options)
            asked.append(host)
            return plain(addresses[min(len(asked), len(addresses)) - 1], *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return asked

    return answers


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(b"public bytes")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.tar").write_bytes(b"cluster's own")
    return tmp_path


@needs_openssl
def test_the_address_that_was_checked_is_the_one_connected_to(folder, certificate, names):
    """DNS rebinding: a name that is public when it is checked and leads into the cluster when it is connected to."""
    with serve(folder / "set", "127.0.0.2", certificate=certificate) as (public, _, host):
        port = int(host.rpartition(":")[2])
        with serve(folder / "inside", "127.0.0.1", port, certificate) as (inside, _, _):
            names("127.0.0.2", "127.0.0.1")
            assert Storage(retries=0).read(f"https://{NAME}:{port}/a.tar", 0, 12) == b"public bytes"
            assert public.requests[0][2]["Host"] == f"{NAME}:{port}" and not inside.requests


@needs_openssl
def test_the_certificate_must_be_that_of_the_name(folder, certificate, names):
    with serve(folder / "set", "127.0.0.2", certificate=certificate) as (server, _, host):
        names("127.0.0.2")
        with pytest.raises(SourceError, match="certificate verify failed|doesn't match|not valid for"):
            Storage(retries=0).read(f"https://other.example.org:{host.rpartition(':')[2]}/a.tar", 0, 12)
        assert not server.requests


@needs_openssl
def test_a_redirect_to_a_name_that_leads_inside_is_refused(folder, certificate, names):
    with serve(folder / "set", "127.0.0.2", certificate=certificate) as (server, _, host):
        port = host.rpartition(":")[2]
        server.redirects = {"a.tar": f"https://other.example.org:{port}/a.tar"}
        names("127.0.0.2", "127.0.0.1")
        with pytest.raises(SourceError, match="leads to 127.0.0.1, which is no public address"):
            Storage(retries=0).read(f"https://{NAME}:{port}/a.tar", 0, 12)
        assert len(server.requests) == 1


@needs_openssl
def test_a_proxy_is_asked_for_the_checked_address(folder, certificate, names, monkeypatch):
    """A name that it resolved itself could lead anywhere."""
    wanted = []

    def proxy(listener):
        client, _ = listener.accept()
        wanted.append(client.recv(4096).split(b"\r\n")[0].decode())
        client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        client.close()

    names("127.0.0.2")
    http_source._proxy.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=proxy, args=(listener,), daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(SourceError, match="403"):
            Storage(retries=0).read(f"https://{NAME}:8443/a.tar", 0, 12)
    http_source._proxy.cache_clear()
    assert wanted == ["CONNECT 127.0.0.2:8443 HTTP/1.1"] or wanted == ["CONNECT 127.0.0.2:8443 HTTP/1.0"]


@needs_openssl
def test_connections_are_kept(folder, certificate, names):
    with serve(folder / "set", "127.0.0.2", certificate=certificate) as (server, _, host):
        names("127.0.0.2")
        storage = Storage(retries=0)
        for _ in range(5):
            storage.read(f"https://{NAME}:{host.rpartition(':')[2]}/a.tar", 0, 6)
        assert len(server.requests) == 5 and server.connections == 1


@pytest.mark.parametrize("address", [
    "10.0.0.1", "169.254.169.254", "::1", "fd00::1", "fec0::1", "224.0.0.1", "ff0e::1", "::ffff:10.0.0.1", "::127.0.0.1",
    "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:0a00:0001::1", "100.64.0.1",
])  # fmt: skip
def test_addresses_that_lead_inside_are_refused_in_every_spelling(address):
    assert not http_source.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::8.8.8.8"])
def test_public_addresses_are_read_also_through_nat64(address):
    assert http_source.is_public(address)
