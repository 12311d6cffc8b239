"""The address of a server, taken before the model is loaded: a port that is in use is said at once."""

from __future__ import annotations

import socket

from mixoff.errors import MixoffError


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not accept connections yet; port 0 is any free one. Raises MixoffError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except OSError:
            taken.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MixoffError(f"cannot listen on {host}:{port} ({reason}): give another --port or --host") from error
    return taken
