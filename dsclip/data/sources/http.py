"""Requests over pooled connections to addresses that were checked, for `sources`.

A name is resolved once for both: only public addresses are connected to, so that no server out there, and no name that
changes its address between check and connection, leads into the cluster. TLS still verifies the name. Redirects are
followed here, each one checked anew.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import time
from functools import lru_cache
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

POOLED = 32  # idle connections kept for one host
RESOLVED_S = 60.0  # how long a checked address is used for new connections
MOST_REDIRECTS = 5
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: how networks without IPv4 reach it
TIMEOUT = urllib3.Timeout(connect=20, read=60)
_DRAINED_BYTES = 1 << 16  # of a redirect's page; a longer one costs its connection


class RefusedAddress(Exception):
    """An address that is never connected to."""


def request(location: str, method: str, headers: dict[str, str], trusted: tuple[str, ...]) -> urllib3.BaseHTTPResponse:
    """The answer, its body not read yet. Authorization is sent to the first host alone.

    trusted: hosts (or host:port) that may be private or plain http. Raises RefusedAddress, and urllib3's errors.
    """
    for _ in range(MOST_REDIRECTS + 1):
        response = _send(location, method, headers, trusted)
        target = response.get_redirect_location()
        if not target:
            return response
        if int(response.headers.get("Content-Length", "0")) <= _DRAINED_BYTES:
            response.drain_conn()
        else:
            response.close()
        following = urljoin(location, target)
        if urlsplit(following)[:2] != urlsplit(location)[:2]:
            headers = {name: value for name, value in headers.items() if name != "Authorization"}
        location = following
    raise RefusedAddress(f"more than {MOST_REDIRECTS} redirects")


def _send(location: str, method: str, headers: dict[str, str], trusted: tuple[str, ...]) -> urllib3.BaseHTTPResponse:
    parts = urlsplit(location)
    name, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    by_name = name in trusted or parts.netloc in trusted
    if parts.scheme != "https" and not (by_name and parts.scheme == "http"):
        raise RefusedAddress(f"only https is read; data.trusted_hosts can allow {parts.netloc}")
    hosts = [name] if by_name else public_addresses(name, port)
    proxy = _proxy(parts.scheme, name)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    if proxy and parts.scheme == "http":
        target = location  # a proxy of plain http wants the whole address
    # What TLS verifies; the proxy, too, gets the address.
    pinned = {} if by_name else {"server_hostname": name}
    refused: Exception = RefusedAddress("leads nowhere")
    for host in hosts:
        pool = _manager(os.getpid(), proxy).connection_from_host(host, port, parts.scheme, pinned)
        try:
            return pool.urlopen(
                method, target, headers={"Host": parts.netloc, **headers}, redirect=False, retries=False, timeout=TIMEOUT,
                assert_same_host=False, preload_content=False, decode_content=False,
            )  # fmt: skip
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as failed:
            refused = failed
    _resolved.pop((name, port), None)
    raise refused


_resolved: dict[tuple[str, int], tuple[float, list[str]]] = {}


def public_addresses(host: str, port: int) -> list[str]:
    """Where the name leads, IPv6 in brackets. Raises RefusedAddress when one of its addresses isn't public."""
    known = _resolved.get((host, port))
    if known and time.monotonic() < known[0]:
        return known[1]
    addresses = list(dict.fromkeys(str(a[0]) for *_, a in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    for address in addresses:
        if not is_public(address):
            raise RefusedAddress(f"leads to {address}, which is no public address; data.trusted_hosts can allow it")
    hosts = [f"[{address}]" if ":" in address else address for address in addresses]
    _resolved[host, port] = time.monotonic() + RESOLVED_S, hosts
    return hosts


def is_public(address: str) -> bool:
    """Whether it lies outside of this machine, its network and its cloud's own services, and so does any IPv4 address in it."""
    parsed = ipaddress.ip_address(address.split("%")[0])
    if parsed.is_multicast or not parsed.is_global:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return True
    return not parsed.is_site_local and all(map(is_public, _inside(parsed)))


def _inside(address: ipaddress.IPv6Address) -> list[str]:
    """The IPv4 addresses to which gateways may send on what goes to an IPv6 address."""
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in TRANSLATED or int(address) >> 32 == 0:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [str(x) for x in inner if x is not None]


@lru_cache(maxsize=256)
def _proxy(scheme: str, host: str) -> str | None:
    """From the environment, which takes as long to read as half a request."""
    return None if proxy_bypass(host) else getproxies().get(scheme)


@lru_cache(maxsize=8)
def _manager(process: int, proxy: str | None) -> urllib3.PoolManager:
    """This process's connections: forked workers must not share sockets."""
    tls = ssl.create_default_context()
    if proxy is None:
        return urllib3.PoolManager(num_pools=64, maxsize=POOLED, ssl_context=tls)
    userinfo, at, _ = urlsplit(proxy).netloc.rpartition("@")
    login = urllib3.make_headers(proxy_basic_auth=unquote(userinfo)) if at else None
    return urllib3.ProxyManager(proxy, proxy_headers=login, num_pools=64, maxsize=POOLED, ssl_context=tls)
