"""Running servers shared by the tests of a session, by configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.engines.server import ServerConfig, VllmServer


class Fleet:
    """Running servers by configuration: at most `most` at once, the one not used for longest is ended first."""

    def __init__(self, folder: Path, *, most: int = 3) -> None:
        self.folder = folder
        self.most = most
        self.n_started = 0
        self._running: dict[ServerConfig, VllmServer] = {}  # last used last

    def get(self, *configs: ServerConfig) -> list[VllmServer]:
        """A running server for each configuration; the missing ones are started side by side.

        A server that died or answers no more is replaced. What the tests before did to a server stays done: its
        prefix cache is warm, and its pool has their blocks.
        """
        assert len(set(configs)) == len(configs) <= self.most, "each configuration once, and no more than fit"
        for config in configs:
            server = self._running.pop(config, None)
            if server is not None and server.alive:
                self._running[config] = server
            elif server is not None:
                server.kill()
        missing = [config for config in configs if config not in self._running]
        for config in [c for c in self._running if c not in configs][: self._excess(len(missing))]:
            self.end(config)
        self._start(missing)
        return [self._running[config] for config in configs]

    def _excess(self, n_new: int) -> int:
        return max(0, len(self._running) + n_new - self.most)

    def _start(self, configs: Sequence[ServerConfig]) -> None:
        fresh: list[VllmServer] = []
        try:
            for config in configs:
                self.n_started += 1
                fresh.append(VllmServer(config, self.folder / f"server-{self.n_started}.log"))
                fresh[-1].launch()
            for server in fresh:
                server.wait_ready()
        except BaseException:
            for server in fresh:
                server.kill()
            raise
        self._running.update(zip(configs, fresh))

    def end(self, config: ServerConfig) -> None:
        """End the server of this configuration if there is one."""
        server = self._running.pop(config, None)
        if server is not None:
            server.stop()

    def end_where(self, condition: Callable[[ServerConfig], bool]) -> None:
        """End the servers whose configuration is such."""
        for config in [config for config in self._running if condition(config)]:
            self.end(config)

    def close(self) -> None:
        """End all. Fails if one left processes, but only after all were ended."""
        failures: list[AssertionError] = []
        for config in list(self._running):
            try:
                self.end(config)
            except AssertionError as error:
                failures.append(error)
        assert not failures, failures
