"""The connections of ``planner serve``: uvicorn, with an end for those that dawdle."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from planner.web.app import make_app

CONNECTIONS = 1_000
HEADERS_SECONDS = 15.0
"""For a connection's first request to have come, headers and all."""
READING_SECONDS = 60.0
"""For a reader to take what is ready for it."""
MOST_HEADERS = 49_152
"""Bytes of a request's line and headers."""


class Connection(H11Protocol):
    """A connection that is ended if its request does not come or its answer is not taken."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread: asyncio.TimerHandle | None = None
        self._first = self.loop.call_later(HEADERS_SECONDS, self._still_nothing)

    def _still_nothing(self) -> None:
        if self.cycle is None:
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(READING_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._first.cancel()
        if self._unread:
            self._unread.cancel()
        super().connection_lost(exc)


def configuration(host: str, port: int, workers: int, hosts: tuple[str, ...] = ()) -> uvicorn.Config:
    """How the application is served."""
    options: dict[str, Any] = {"http": Connection, "ws": "none", "loop": "asyncio", "lifespan": "on"}
    return uvicorn.Config(
        make_app(workers, hosts),
        host=host,
        port=port,
        access_log=False,
        log_level="error",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        backlog=512,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MOST_HEADERS,
        **options,
    )


def run(host: str, port: int, workers: int, hosts: tuple[str, ...] = ()) -> bool:
    """Serves until it is ended; False if it could not begin."""
    server = uvicorn.Server(configuration(host, port, workers, hosts))
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    except SystemExit:  # the address is taken
        return False
    return server.started
