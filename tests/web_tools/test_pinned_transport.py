"""Connections go to the address that was checked, whatever the name says a moment later."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.web_tools.site import Site, html, serve_site
from toolfleet.services.web_tools.address_guard import Address, AddressGuard, AddressKind
from toolfleet.services.web_tools.errors import AddressRefusedError
from toolfleet.services.web_tools.pinned_transport import PinnedTransport

PUBLIC_SIDE = ip_address("127.0.0.1")
PRIVATE_SIDE = ip_address("127.0.0.2")


def two_sided(address: Address) -> AddressKind:
    """Two sides on one loopback: all but one address count as private."""
    return AddressKind.PUBLIC if address == PUBLIC_SIDE else AddressKind.PRIVATE


class Rebinding:
    """A name server that answers with the public side once, and with the private side from then on."""

    def __init__(self) -> None:
        self.lookups = 0

    async def __call__(self, _host: str, _port: int) -> Sequence[str]:
        self.lookups += 1
        return [str(PUBLIC_SIDE if self.lookups == 1 else PRIVATE_SIDE)]


def client(guard: AddressGuard, context: ssl.SSLContext | None = None) -> httpx.AsyncClient:
    transport = PinnedTransport(guard, ssl_context=context or ssl.create_default_context(), max_connections=1)
    return httpx.AsyncClient(transport=transport, timeout=10)


async def test_a_name_that_changes_its_answer_never_reaches_the_private_side() -> None:
    resolver = Rebinding()
    guard = AddressGuard(resolver=resolver, judge=two_sided)
    async with (
        serve_site({"/": "public"}) as public,
        serve_site({"/": "private"}, host=str(PRIVATE_SIDE), port=public.port) as private,
        client(guard) as http,
    ):
        url = f"http://rebinding.test:{public.port}/"
        first = await http.get(url, headers={"connection": "close"})
        with pytest.raises(AddressRefusedError, match=r"leads to 127\.0\.0\.2"):
            await http.get(url)
    assert first.text == "public"
    assert public.hosts == [f"rebinding.test:{public.port}"]
    assert private.paths == []
    assert resolver.lookups == 2


async def test_one_connection_costs_one_lookup(site: Site) -> None:
    resolver = Rebinding()
    site.answers["/"] = "public"
    async with client(AddressGuard(resolver=resolver, judge=two_sided)) as http:
        for _ in range(3):
            await http.get(f"http://rebinding.test:{site.port}/")
    assert resolver.lookups == 1


async def test_the_next_address_is_tried_where_the_first_does_not_answer(site: Site) -> None:
    async def resolver(_host: str, _port: int) -> Sequence[str]:
        return [str(PRIVATE_SIDE), str(PUBLIC_SIDE)]

    site.answers["/"] = html("Found")
    async with client(AddressGuard(allow_private=True, resolver=resolver)) as http:
        assert (await http.get(f"http://two.test:{site.port}/")).is_success


async def test_a_refused_connection_is_an_httpx_error() -> None:
    async with serve_site() as closed:
        port = closed.port
    async with client(AddressGuard(allow_private=True)) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(f"http://127.0.0.1:{port}/")


async def test_tls_speaks_of_the_name_and_not_of_the_address(tmp_path: Path) -> None:
    certificate = self_signed("named.test", tmp_path)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate)
    named: list[str | None] = []
    server_context.sni_callback = lambda _socket, name, _context: named.append(name)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi")
        await writer.drain()
        writer.close()

    async def resolver(_host: str, _port: int) -> Sequence[str]:
        return [str(PUBLIC_SIDE)]

    server = await asyncio.start_server(answer, str(PUBLIC_SIDE), 0, ssl=server_context)
    port = server.sockets[0].getsockname()[1]
    trusting = ssl.create_default_context(cafile=str(certificate))
    async with server, client(AddressGuard(resolver=resolver, judge=two_sided), trusting) as http:
        assert (await http.get(f"https://named.test:{port}/")).text == "hi"
        with pytest.raises(httpx.ConnectError, match="certificate"):
            await http.get(f"https://other.test:{port}/")
    assert named == ["named.test", "other.test"]


def self_signed(name: str, folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "server.pem"
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path
