"""Hub. Whether huggingface.co answers: without it, its client would try again for minutes."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 5.0
"""Seconds to wait for an answer."""


@contextmanager
def prompt() -> Iterator[None]:
    """Read from the hub's cache alone, as long as we are inside, where the hub does not answer.

    Raises:
        ConnectionError: what is asked for inside is not there.
    """
    from huggingface_hub import constants

    address, before = urlsplit(constants.ENDPOINT), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not answers(getproxies().get(address.scheme, constants.ENDPOINT))
    try:
        yield
    except OSError as error:
        reason = f"{address.hostname} does not answer" if constants.HF_HUB_OFFLINE else str(error).partition("\n")[0]
        raise ConnectionError(reason) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def answers(url: str) -> bool:
    """Tell whether somebody listens there."""
    parts, end = urlsplit(url), monotonic() + PATIENCE
    try:
        found = socket.getaddrinfo(
            parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443), type=socket.SOCK_STREAM
        )
    except OSError:
        return False
    return any(connects(family, address, end - monotonic()) for family, _, _, _, address in found)


def connects(family: int, address: tuple[int | str | bytes, ...], seconds: float) -> bool:
    """Tell whether a connection comes about in time."""
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(max(0.1, seconds))
        try:
            connection.connect(address)
        except OSError:
            return False
    return True
