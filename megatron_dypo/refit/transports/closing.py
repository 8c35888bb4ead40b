"""The end of a connection, of TCP or of a Unix socket."""

from __future__ import annotations

import contextlib
import socket


def shut(connection: socket.socket) -> None:
    """Close both directions. close() is not enough: a thread that waits in recv would keep the connection open."""
    with contextlib.suppress(OSError):  # the other side closed first
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def describe(error: Exception) -> str:
    """Return the words of an error, or its type if it has none."""
    return str(error) or type(error).__name__
