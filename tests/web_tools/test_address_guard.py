"""Which addresses are public, in every spelling."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolfleet.services.web_tools.address_guard import AddressGuard, AddressKind, kind_of, literal_address
from toolfleet.services.web_tools.errors import AddressRefusedError, FetchFailedError
from toolfleet.services.web_tools.models import SkipCode


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("8.8.8.8", AddressKind.PUBLIC),
        ("172.15.255.255", AddressKind.PUBLIC),
        ("172.32.0.0", AddressKind.PUBLIC),
        ("100.63.255.255", AddressKind.PUBLIC),
        ("100.128.0.0", AddressKind.PUBLIC),
        ("223.255.255.255", AddressKind.PUBLIC),
        ("2606:4700:4700::1111", AddressKind.PUBLIC),
        ("2a00:1450:4001:830::200e", AddressKind.PUBLIC),
        ("0.0.0.0", AddressKind.UNSPECIFIED),
        ("10.1.2.3", AddressKind.PRIVATE),
        ("172.16.0.1", AddressKind.PRIVATE),
        ("172.31.255.255", AddressKind.PRIVATE),
        ("192.168.0.1", AddressKind.PRIVATE),
        ("100.64.0.1", AddressKind.SHARED),
        ("100.127.255.255", AddressKind.SHARED),
        ("127.0.0.1", AddressKind.LOOPBACK),
        ("127.255.255.254", AddressKind.LOOPBACK),
        ("169.254.169.254", AddressKind.LINK_LOCAL),
        ("192.0.0.170", AddressKind.RESERVED),
        ("192.0.2.1", AddressKind.DOCUMENTATION),
        ("198.18.0.1", AddressKind.RESERVED),
        ("224.0.0.1", AddressKind.MULTICAST),
        ("239.255.255.250", AddressKind.MULTICAST),
        ("240.0.0.1", AddressKind.RESERVED),
        ("255.255.255.255", AddressKind.RESERVED),
        ("::", AddressKind.UNSPECIFIED),
        ("::1", AddressKind.LOOPBACK),
        ("::127.0.0.1", AddressKind.EMBEDDED_IPV4),
        ("::ffff:127.0.0.1", AddressKind.EMBEDDED_IPV4),
        ("::ffff:8.8.8.8", AddressKind.EMBEDDED_IPV4),
        ("64:ff9b::7f00:1", AddressKind.EMBEDDED_IPV4),
        ("64:ff9b:1::a00:1", AddressKind.EMBEDDED_IPV4),
        ("2001:0:53aa:64c:0:0:80ff:fffe", AddressKind.EMBEDDED_IPV4),
        ("2002:7f00:1::", AddressKind.EMBEDDED_IPV4),
        ("2001:db8::1", AddressKind.DOCUMENTATION),
        ("fd00::1", AddressKind.PRIVATE),
        ("fe80::1", AddressKind.LINK_LOCAL),
        ("fec0::1", AddressKind.PRIVATE),
        ("ff02::1", AddressKind.MULTICAST),
        ("100::1", AddressKind.RESERVED),
        ("4000::1", AddressKind.RESERVED),
    ],
)
def test_every_kind_of_address_is_told(text: str, kind: AddressKind) -> None:
    assert kind_of(ip_address(text)) is kind


@given(st.ip_addresses())
def test_what_the_standard_library_calls_special_is_never_public(address: IPv4Address | IPv6Address) -> None:
    special = (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
    )
    if special:
        assert kind_of(address) is not AddressKind.PUBLIC


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:0:0", "64:ff9b::", "::"]))
def test_no_ipv4_address_is_public_inside_an_ipv6_address(inner: IPv4Address, prefix: str) -> None:
    outer = IPv6Address(int(IPv6Address(prefix)) | int(inner))
    assert kind_of(outer) is not AddressKind.PUBLIC


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "0x7f.0.0.1", "127.1", "0177.0.0.1", "127.0.0.1.1", "1.2.3", "08.8.8.8", "0x"]
)
def test_an_address_in_an_unusual_form_is_refused_whatever_it_means(host: str) -> None:
    with pytest.raises(AddressRefusedError, match="unusual form"):
        literal_address(host)


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "a1", "1.2.3.4a", "0xample"])
def test_a_name_is_no_literal(host: str) -> None:
    assert literal_address(host) is None


def test_a_trailing_dot_and_a_zone_do_not_hide_an_address() -> None:
    assert literal_address("127.0.0.1.") == ip_address("127.0.0.1")
    assert literal_address("fe80::1%25eth0") == ip_address("fe80::1")


def guard(*answer: str, allow_private: bool = False) -> AddressGuard:
    async def resolver(_host: str, _port: int) -> Sequence[str]:
        return answer

    return AddressGuard(allow_private=allow_private, resolver=resolver)


async def test_all_addresses_of_a_public_name_are_given_in_order() -> None:
    found = await guard("93.184.215.14", "2606:4700::1", "93.184.215.14").addresses_for("example.org", 443)
    assert [str(address) for address in found] == ["93.184.215.14", "2606:4700::1"]


@pytest.mark.parametrize("private", ["10.0.0.7", "::1", "::ffff:10.0.0.7", "64:ff9b::a00:7", "169.254.169.254"])
async def test_one_forbidden_address_refuses_the_name(private: str) -> None:
    with pytest.raises(AddressRefusedError, match=f"example.org leads to {private}|example.org leads to ::ffff"):
        await guard("93.184.215.14", private).addresses_for("example.org", 443)


async def test_a_refusal_names_the_setting_that_allows_it() -> None:
    with pytest.raises(
        AddressRefusedError, match=r"127\.0\.0\.1 is a loopback address.*TOOLFLEET_WEB_ALLOW_PRIVATE=true"
    ):
        await guard().addresses_for("127.0.0.1", 80)


@pytest.mark.parametrize("local", ["127.0.0.1", "::1", "10.0.0.1", "fd00::1", "100.64.0.1"])
async def test_the_setting_opens_local_addresses(local: str) -> None:
    assert await guard(allow_private=True).addresses_for(local, 80) == (ip_address(local),)


@pytest.mark.parametrize("shut", ["169.254.169.254", "fe80::1", "224.0.0.1", "0.0.0.0", "255.255.255.255", "::"])
async def test_the_setting_does_not_open_what_is_not_local(shut: str) -> None:
    with pytest.raises(AddressRefusedError):
        await guard(allow_private=True).addresses_for(shut, 80)


async def test_a_name_that_does_not_resolve_is_a_failed_connection() -> None:
    async def resolver(_host: str, _port: int) -> Sequence[str]:
        raise OSError("Name or service not known")

    with pytest.raises(FetchFailedError, match=r"host name nowhere\.test does not resolve") as caught:
        await AddressGuard(resolver=resolver).addresses_for("nowhere.test", 80)
    assert caught.value.code is SkipCode.CONNECTION
