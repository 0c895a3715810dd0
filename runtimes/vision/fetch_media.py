"""Files at http and https addresses, of hosts that are allowed. A request chooses the address, and could make this machine ask others in
its network: so only named hosts are asked, or with "*" any that has public addresses alone. The connection goes to the address that was
checked, and redirections are checked like the first.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from qwen_export.errors import ParameterError

ANY = "*"
_REDIRECTIONS = 4
_PIECE = 1 << 16
_MOVED = (301, 302, 303, 307, 308)


def fetched(url: str, hosts: Sequence[str], most_bytes: int, timeout_s: float, where: str) -> bytes:
    """The bytes at an address. Raises ParameterError for a host that is not allowed, for one that does not answer in time, for more bytes
    than `most_bytes`, and for any status but 200."""
    deadline, target = time.monotonic() + timeout_s, url
    try:
        for _ in range(_REDIRECTIONS + 1):
            parts = _allowed(target, hosts, where)
            connection = _connection(parts, hosts, deadline, where)
            try:
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", path, headers={"User-Agent": "qwen-export", "Accept-Encoding": "identity"})
                answer = connection.getresponse()
                if answer.status in _MOVED and answer.headers.get("Location"):
                    target = urljoin(target, str(answer.headers["Location"]))
                    continue
                if answer.status != 200:
                    raise _bad("a file could not be fetched", where, f"{_short(url)}: status {answer.status}", "its bytes")
                return _read(answer, connection, most_bytes, deadline, url, where)
            finally:
                connection.close()
    except ParameterError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _bad("a file could not be fetched", where, f"{_short(url)}: {error or type(error).__name__}", "its bytes") from error
    raise _bad("a file could not be fetched", where, f"{_short(url)}: too many redirections", "its bytes")


def _allowed(url: str, hosts: Sequence[str], where: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").lower(), parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    if host and parts.scheme.lower() in ("http", "https") and (ANY in hosts or _named(host, hosts)):
        return parts
    allowed = ", ".join(hosts)
    raise ParameterError(
        "pictures and videos are not fetched from this host",
        parameter="messages",
        where=where,
        got=_short(url),
        expected=f"an address of {allowed}" if allowed else "a data URL or a path",
        fix="Send the picture itself, or allow the host with {hosts}.",
    )


def _named(host: str, hosts: Sequence[str]) -> bool:
    return host in {name.lower() for name in hosts if name != ANY}


def _connection(parts: SplitResult, hosts: Sequence[str], deadline: float, where: str) -> http.client.HTTPConnection:
    """Connected to an address of the host that was checked: asked again, a name may stand for another one."""
    host, secure = parts.hostname or "", parts.scheme.lower() == "https"
    port = parts.port or (443 if secure else 80)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not _named(host.lower(), hosts):
        for *_, address in found:
            if not _public(str(address[0])):
                raise _bad(
                    "pictures and videos are not fetched from private addresses",
                    where,
                    f"{_short(host)}, which is {address[0]}",
                    "a public address",
                    "Send the picture itself, or allow the host by its name with {hosts}.",
                )
    for number, (family, kind, protocol, _, address) in enumerate(found, 1):
        raw = socket.socket(family, kind, protocol)
        try:
            raw.settimeout(_left(deadline, where))
            raw.connect(address)
            connection = http.client.HTTPConnection(host, port)
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
            return connection
        except OSError:
            raw.close()
            if number == len(found):
                raise
    raise _bad("a file could not be fetched", where, f"{_short(host)}, which has no address", "its bytes")


def _public(address: str) -> bool:
    number = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(number, "ipv4_mapped", None) or getattr(number, "sixtofour", None)
    return (inner or number).is_global and not number.is_multicast


def _read(
    answer: http.client.HTTPResponse, connection: http.client.HTTPConnection, most_bytes: int, deadline: float, url: str, where: str
) -> bytes:
    promised = int(answer.headers.get("Content-Length") or 0)
    parts, size = list[bytes](), 0
    while size <= most_bytes and promised <= most_bytes:
        if connection.sock is not None:
            connection.sock.settimeout(_left(deadline, where))
        piece = answer.read1(_PIECE)
        if not piece:
            if size < promised:
                raise http.client.IncompleteRead(b"".join(parts), promised - size)
            return b"".join(parts)
        parts.append(piece)
        size += len(piece)
        _left(deadline, where)
    raise _bad("a file is too large", where, f"{_short(url)}: {max(size, promised)} bytes", f"at most {most_bytes}", "Save it smaller.")


def _left(deadline: float, where: str) -> float:
    """Seconds. A host that sends a byte now and then would otherwise never be late."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise _bad("a file could not be fetched", where, "a host that took too long", "its bytes in time")
    return left


def _bad(what: str, where: str, got: str, expected: str, fix: str = "Send the picture itself.") -> ParameterError:
    return ParameterError(what, parameter="messages", where=where, got=got, expected=expected, fix=fix)


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")
