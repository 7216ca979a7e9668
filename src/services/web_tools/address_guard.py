"""Which addresses `web_crawl` may connect to, and the lookup that answers only with those.

A tool that fetches what an agent names is a door into the network it runs in (SSRF). The rule is a list of what is
public, not of what is forbidden: whatever the IANA special-purpose registries set aside is refused, together with the
IPv6 forms that carry an IPv4 address inside. The sources are the IANA IPv4 and IPv6 Special-Purpose Address
Registries (RFC 6890 and its updates); `ipaddress.is_global` is not used, because its answer changed between Python
patch releases and calls multicast and NAT64 addresses global.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from toolfleet.services.web_tools.errors import AddressRefusedError, FetchFailedError
from toolfleet.services.web_tools.models import SkipCode

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""`(host, port)` to IP addresses as text, in the order in which to try them; raises OSError where there are none."""


class AddressKind(StrEnum):
    """What an address is for. Only `PUBLIC` is fetched without a setting."""

    PUBLIC = "public"
    LOOPBACK = "loopback"
    PRIVATE = "private"
    SHARED = "carrier-grade NAT"
    LINK_LOCAL = "link-local"
    MULTICAST = "multicast"
    UNSPECIFIED = "unspecified"
    DOCUMENTATION = "documentation"
    RESERVED = "reserved"
    EMBEDDED_IPV4 = "IPv4-embedding"


LOCAL_KINDS = frozenset({AddressKind.LOOPBACK, AddressKind.PRIVATE, AddressKind.SHARED})
"""What `web_allow_private` opens. Link-local stays shut: cloud metadata services live at 169.254.169.254."""

_TABLE = tuple(
    (ip_network(block), kind)
    for block, kind in (
        ("0.0.0.0/8", AddressKind.UNSPECIFIED),
        ("10.0.0.0/8", AddressKind.PRIVATE),
        ("100.64.0.0/10", AddressKind.SHARED),
        ("127.0.0.0/8", AddressKind.LOOPBACK),
        ("169.254.0.0/16", AddressKind.LINK_LOCAL),
        ("172.16.0.0/12", AddressKind.PRIVATE),
        ("192.0.0.0/24", AddressKind.RESERVED),
        ("192.0.2.0/24", AddressKind.DOCUMENTATION),
        ("192.88.99.0/24", AddressKind.RESERVED),
        ("192.168.0.0/16", AddressKind.PRIVATE),
        ("198.18.0.0/15", AddressKind.RESERVED),
        ("198.51.100.0/24", AddressKind.DOCUMENTATION),
        ("203.0.113.0/24", AddressKind.DOCUMENTATION),
        ("224.0.0.0/4", AddressKind.MULTICAST),
        ("240.0.0.0/4", AddressKind.RESERVED),
        ("::/128", AddressKind.UNSPECIFIED),
        ("::1/128", AddressKind.LOOPBACK),
        ("::/96", AddressKind.EMBEDDED_IPV4),
        ("::ffff:0:0/96", AddressKind.EMBEDDED_IPV4),
        ("::ffff:0:0:0/96", AddressKind.EMBEDDED_IPV4),
        ("64:ff9b::/96", AddressKind.EMBEDDED_IPV4),
        ("64:ff9b:1::/48", AddressKind.EMBEDDED_IPV4),
        ("2001::/32", AddressKind.EMBEDDED_IPV4),
        ("2001::/23", AddressKind.RESERVED),
        ("2001:db8::/32", AddressKind.DOCUMENTATION),
        ("2002::/16", AddressKind.EMBEDDED_IPV4),
        ("3fff::/20", AddressKind.DOCUMENTATION),
        ("fc00::/7", AddressKind.PRIVATE),
        ("fe80::/10", AddressKind.LINK_LOCAL),
        ("fec0::/10", AddressKind.PRIVATE),
        ("ff00::/8", AddressKind.MULTICAST),
    )
)
# The only block from which IPv6 addresses of the public internet are given out (RFC 4291, section 2.4).
_GLOBAL_UNICAST = IPv6Network("2000::/3")


def kind_of(address: Address) -> AddressKind:
    """The first matching row of the table; an IPv6 address outside 2000::/3 that no row names is reserved."""
    for network, kind in _TABLE:
        if address.version == network.version and address in network:
            return kind
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return AddressKind.RESERVED
    return AddressKind.PUBLIC


def literal_address(host: str) -> Address | None:
    """The address that a host of a URL spells out, or None where the host is a name.

    Raises:
        AddressRefusedError: a numeric host that is not in the usual form (`2130706433`, `127.1`, `0x7f.0.0.1`).
            Resolvers read those as addresses, each in its own way, so they are refused whatever they mean. The rule
            for what counts as numeric is the 'ends in a number' check of the WHATWG URL standard.
    """
    bare = host.rstrip(".").partition("%")[0]
    try:
        return ip_address(bare)
    except ValueError:
        pass
    last = bare.rpartition(".")[2].lower()
    hexadecimal = last.startswith("0x") and all(digit in "0123456789abcdef" for digit in last[2:])
    if last.isdigit() or hexadecimal:
        raise AddressRefusedError(f"{host} is an address in an unusual form; write it as four decimal numbers")
    return None


async def system_resolver(host: str, port: int) -> Sequence[str]:
    """`getaddrinfo` of the system, off the event loop.

    Raises:
        OSError: the name does not resolve.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class AddressGuard:
    """Turns a host into addresses that may be connected to.

    Args:
        allow_private: also allow loopback, private and carrier-grade NAT addresses (`LOCAL_KINDS`).
        resolver: how names are looked up; tests hand in their own.
        judge: what kind an address is; tests hand in their own to have two sides on one loopback.
    """

    def __init__(
        self,
        *,
        allow_private: bool = False,
        resolver: Resolver = system_resolver,
        judge: Callable[[Address], AddressKind] = kind_of,
    ) -> None:
        self._allowed = LOCAL_KINDS | {AddressKind.PUBLIC} if allow_private else frozenset({AddressKind.PUBLIC})
        self._allow_private = allow_private
        self._resolver = resolver
        self._judge = judge

    async def addresses_for(self, host: str, port: int) -> tuple[Address, ...]:
        """Every address of a host, all of them checked, in the order in which to try them.

        One forbidden address among several refuses the host: which of them a connection would get is not ours to
        guess, and a mixed answer is how rebinding attacks look.

        Raises:
            AddressRefusedError: an address is not allowed; names the address, its kind and the setting.
            FetchFailedError: `CONNECTION`, the name does not resolve.
        """
        literal = literal_address(host)
        addresses = (literal,) if literal is not None else await self._look_up(host, port)
        for address in addresses:
            kind = self._judge(address)
            if kind not in self._allowed:
                raise AddressRefusedError(self._refusal(host, address, kind))
        return addresses

    async def _look_up(self, host: str, port: int) -> tuple[Address, ...]:
        try:
            answer = await self._resolver(host, port)
            # A scope (`fe80::1%eth0`) says which interface, not which address.
            addresses = tuple(dict.fromkeys(ip_address(text.partition("%")[0]) for text in answer))
        except (OSError, ValueError) as error:
            raise FetchFailedError(SkipCode.CONNECTION, f"the host name {host} does not resolve: {error}") from error
        if not addresses:
            raise FetchFailedError(SkipCode.CONNECTION, f"the host name {host} has no address")
        return addresses

    def _refusal(self, host: str, address: Address, kind: AddressKind) -> str:
        what = f"{host} is" if host == str(address) else f"{host} leads to {address},"
        remedy = (
            "; TOOLFLEET_WEB_ALLOW_PRIVATE=true on the tool server allows it"
            if kind in LOCAL_KINDS and not self._allow_private
            else ""
        )
        return f"{what} a {kind} address, which web_crawl does not fetch{remedy}"
