"""``planner serve``: the search in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.options import option

EXAMPLE = "Example: planner serve --port 8000"
INSTALL = "pip install 'distributed-training-planner[serve]'"
MOST_WORKERS = 64
Host = Annotated[str, option("--host", help="The address to listen at; others than 127.0.0.1 are open.")]
Port = Annotated[int, option("--port", help="The port.")]
Workers = Annotated[int, option("--workers", help="Processes that search.")]
Names = Annotated[
    list[str] | None, option("--allow-host", help="A name it may be asked by, if not an address; repeatable.")
]


def serve(
    host: Host = "127.0.0.1", port: Port = 8000, workers: Workers = 2, allow_host: Names = None
) -> None:
    """The same search in a browser: a form, the ranked layouts, the review page, and JSON."""
    from planner.cli import reported

    with reported():
        from planner.errors import InputError

        if not 1 <= port <= 65535:
            raise InputError(f"--port {port}: use 1 to 65535")
        if not 1 <= workers <= MOST_WORKERS:
            raise InputError(f"--workers {workers}: use 1 to {MOST_WORKERS}")
        try:
            from planner.web import server
        except ModuleNotFoundError as error:
            if error.name not in ("starlette", "uvicorn", "h11", "anyio"):
                raise
            raise InputError(f"planner serve needs {error.name}: {INSTALL}") from None
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        if not _loopback(host):
            typer.secho(
                f"--host {host}: whoever reaches this machine at port {port} can ask, without a password and "
                "in plain text. Put a proxy with both before it, or leave --host out.",
                fg="yellow",
                bold=True,
                err=True,
            )
        typer.echo(f"planner is at {address} with {workers} searching; Ctrl+C ends it.", err=True)
        if not server.run(host, port, workers, tuple(allow_host or ())):
            raise InputError(f"--port {port}: {host} cannot be listened at there: try another port")


def _loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
