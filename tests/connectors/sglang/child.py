"""Another process with a rank of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tests.connectors.sglang import standin
from tests.support import Client


def serve(connection: Connection) -> None:
    """Make ranks and call their methods, as the parent asks, until it says None."""
    standin.prepare()
    from tests.connectors.sglang import pools

    rank: pools.SglangRank | None = None
    while (asked := connection.recv()) is not None:
        what, arguments = asked
        if what == "make":
            rank = pools.SglangRank(**arguments)
            connection.send(None)
        else:
            connection.send(getattr(rank, what)(**arguments))
    if rank is not None:
        rank.storage.close()


class Remote:
    """The other process's rank, asked like one's own."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def make(self, **arguments: Any) -> None:
        self._client.ask(("make", arguments))

    def set(self, keys: list[str], prefix: list[str] | None) -> list[bool]:
        answer: list[bool] = self._client.ask(("set", {"keys": keys, "prefix": prefix}))
        return answer

    def get(self, keys: list[str]) -> list[bool]:
        answer: list[bool] = self._client.ask(("get", {"keys": keys}))
        return answer


@contextmanager
def other_process() -> Iterator[Remote]:
    with Client(serve) as client:
        yield Remote(client)
        client.send(None)
        client.join()
