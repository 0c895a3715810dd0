"""A listening socket that another program has opened: systemd, which keeps it open while the server restarts, or a supervisor."""

from __future__ import annotations

import os
import socket

from qwen_export.errors import ParameterError

_FIRST = 3
"""The descriptor of the first socket that systemd hands over."""


def inherited_socket(fd: int | None = None) -> socket.socket | None:
    """The socket of a file descriptor, or the one that systemd hands over (LISTEN_FDS); None where there is none. Raises ParameterError for
    what is no listening stream socket."""
    if fd is not None:
        return _checked(fd, f"file descriptor {fd}")
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    # Programs that this one starts are not meant.
    count = os.environ.pop("LISTEN_FDS", "0")
    del os.environ["LISTEN_PID"]
    if count == "0":
        return None
    if count != "1":
        raise ParameterError(
            "the service manager hands over several sockets",
            parameter="fd",
            got=f"LISTEN_FDS={count}",
            expected="one socket",
            fix="Leave one ListenStream= in the socket unit.",
        )
    return _checked(_FIRST, "the socket of the service manager")


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    name = listening.getsockname()
    return isinstance(name, (str, bytes)) or name[0] == "::1" or name[0].startswith("127.")


def _checked(fd: int, what: str) -> socket.socket:
    reason = "not a socket"
    try:
        found = socket.socket(fileno=fd)
        if found.type == socket.SOCK_STREAM and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return found
        found.detach()
        reason = "a socket that does not listen"
    except (OSError, OverflowError) as error:
        reason = str(error)
    raise ParameterError(
        "there is no listening socket to inherit",
        parameter="fd",
        where=what,
        got=reason,
        expected="a stream socket that listens",
        fix="Let the program that starts the server open one and pass its descriptor.",
    )
