"""The addresses of ``planner serve``, what each takes and answers, and what every answer carries."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from planner.errors import InputError
from planner.files import plain
from planner.report import policy
from planner.web.answers import UNEXPECTED, Answer
from planner.web.fields import MOST_BODY, Asked, Malformed, from_json, from_query, read
from planner.web.pages import LONGEST_ADDRESS, first_page, form_page, static
from planner.web.workers import Workers

BODY_SECONDS = 10.0
"""For the whole body of a request."""
MOST_QUERY = 32_768
PIECE = 65_536
FORM, JSON = "application/x-www-form-urlencoded", "application/json"
OWN_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": OWN_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
"""Of every answer, unless it has its own."""


class Guard:
    """Every request's host is one of ours, and every answer has the headers.

    A page elsewhere can have its own name lead here and would then read the answers as its own (DNS
    rebinding). So the host must be an address, which no name leads to, or a name that was allowed.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] = ()) -> None:
        self.app = app
        self.hosts = {"localhost", *(name.lower() for name in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                has = {name for name, _ in message["headers"]}
                own = [(name.encode(), text.encode()) for name, text in HEADERS.items()]
                message["headers"] = [*message["headers"], *(one for one in own if one[0] not in has)]
            await send(message)

        request = Request(scope)
        if refused := self._refused(request):
            return await _refusal(request, *refused)(scope, receive, with_headers)
        await self.app(scope, receive, with_headers)

    def _refused(self, request: Request) -> tuple[int, str] | None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not self._known(hosts[0]):
            shown = plain(", ".join(hosts), 80) or "none"
            return 421, f"host {shown} is not known here: use an address, or planner serve --allow-host NAME"
        cross = request.headers.get("sec-fetch-site") == "cross-site"
        if cross and request.headers.get("sec-fetch-mode") != "navigate":
            return 403, "pages of other sites cannot ask this server"
        if len(request.scope["query_string"]) > MOST_QUERY:
            return 414, f"the address is longer than {MOST_QUERY:,} bytes: send the fields as a form"
        return None

    def _known(self, host: str) -> bool:
        name, bracket, rest = host.lower().partition("]") if host[:1] == "[" else (host.lower(), "", "")
        if not bracket:
            name, _, rest = name.partition(":")
            rest = f":{rest}" if rest else ""
        if rest and not (rest[0] == ":" and rest[1:].isascii() and rest[1:].isdigit()):
            return False
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("["))
        except ValueError:
            return False
        return True


def _wants_json(request: Request) -> bool:
    return request.url.path.startswith(("/api", "/healthz"))


def _refusal(
    request: Request,
    status: int,
    message: str,
    values: Mapping[str, str] = {},
    headers: Mapping[str, str] = {},
) -> Response:
    """What is wrong, as JSON or beside the form."""
    more = dict(headers) | ({"retry-after": "30"} if status == 503 else {})
    if _wants_json(request):
        return _json({"error": message}, status, more)
    return HTMLResponse(form_page(values, message), status, more)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    return Response(json.dumps(value), status, dict(headers), JSON)


class Refused(Exception):
    """A request that has no answer: a status, a message, and the fields that were read."""

    def __init__(self, status: int, message: str, values: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        self.status, self.values = status, values


async def _body(request: Request) -> bytes:
    """A body of bounded size, in bounded time. Raises Refused."""
    large = Refused(413, f"the request is larger than {MOST_BODY:,} bytes")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:20]) > MOST_BODY:
        raise large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MOST_BODY:
                    raise large
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the request took longer than {BODY_SECONDS:g} seconds to arrive") from None
    except ClientDisconnect:
        raise Refused(400, "the request ended before its body") from None
    return b"".join(parts)


async def asked_by(request: Request) -> Asked:
    """What a request asks. Raises Refused."""
    found: dict[str, str] = {}
    try:
        if request.method in ("GET", "HEAD"):
            found = from_query(request.scope["query_string"])
        else:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind not in (FORM, JSON) or (kind == JSON and not _wants_json(request)):
                able = f"{FORM} or {JSON}" if _wants_json(request) else FORM
                raise Refused(415, f"content type {plain(kind) or 'none'}: send {able}")
            if request.headers.get("content-encoding", "identity") != "identity":
                raise Refused(415, "the body is compressed: send it as it is")
            body = await _body(request)
            found = from_json(body) if kind == JSON else from_query(body)
        return read(found)
    except Malformed as error:
        raise Refused(400, str(error), found) from None
    except InputError as error:
        raise Refused(422, str(error), found) from None


async def _document(request: Request, asked: Asked) -> bytes:
    """The document of what was asked. Raises Refused where there is none."""
    workers: Workers = request.app.state.workers
    return _good(await workers.answer("search", Asked(asked.texts)), asked)


def _good(answer: Answer, asked: Asked) -> bytes:
    if answer.status != 200:
        raise Refused(answer.status, answer.text, asked.by_name)
    return answer.body


async def form(request: Request) -> Response:
    """The form."""
    return HTMLResponse(first_page())


async def search(request: Request) -> Response:
    """The answer as a page; a form that is sent has an address of its own, to be shared."""
    asked = await asked_by(request)
    address = urlencode(asked.address())
    if request.method == "POST" and len(address) <= LONGEST_ADDRESS:
        return RedirectResponse(f"/search?{address}", 303)
    document = await _document(request, asked)
    page = await request.app.state.workers.answer("result", Asked(asked.texts), document)
    return _streamed(_good(page, asked), "text/html; charset=utf-8")


async def review(request: Request) -> Response:
    """The review page of the first plan, or of the nearest."""
    asked = await asked_by(request)
    document = await _document(request, asked)
    page = await request.app.state.workers.answer("review", asked, document)
    headers = {"content-security-policy": f"{policy()}; frame-ancestors 'none'"}
    return _streamed(_good(page, asked), "text/html; charset=utf-8", headers)


async def api_search(request: Request) -> Response:
    """The document itself."""
    return _streamed(await _document(request, await asked_by(request)), JSON)


async def healthz(request: Request) -> Response:
    """Whether it answers, and how many wait."""
    return _json({"status": "ok", "waiting": request.app.state.workers.waiting})


async def file(request: Request) -> Response:
    """A style or a script."""
    name = request.url.path.removeprefix("/")
    kind = "text/css" if name.endswith("css") else "text/javascript"
    return Response(static(name), headers={"cache-control": "max-age=3600"}, media_type=kind)


async def icon(request: Request) -> Response:
    """There is none."""
    return Response(status_code=204)


def _streamed(body: bytes, kind: str, headers: Mapping[str, str] = {}) -> Response:
    """A body in pieces, so that a slow reader holds one of them and not a copy of all."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), PIECE):
            yield body[start : start + PIECE]

    own = {"content-length": str(len(body)), "content-type": kind, **headers}
    return StreamingResponse(pieces(), headers=own)


async def _on_refused(request: Request, error: Any) -> Response:
    return _refusal(request, error.status, str(error), error.values)


async def _on_http(request: Request, error: Any) -> Response:
    words = {
        404: "there is nothing at this address: start at /",
        405: "this address does not take this method",
    }
    message = words.get(error.status_code, "this request cannot be answered")
    return _refusal(request, error.status_code, message, headers=error.headers or {})


async def _on_error(request: Request, error: Exception) -> Response:
    return Response(UNEXPECTED, 500, media_type="text/plain")


def make_app(workers: Workers | int = 2, hosts: tuple[str, ...] = ()) -> ASGIApp:
    """The application. ``workers`` are processes; ``hosts`` names it may be asked by, besides addresses."""
    pool = Workers(workers) if isinstance(workers, int) else workers

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.stop()

    handlers: dict[Any, Callable[[Request, Any], Any]] = {
        Refused: _on_refused,
        HTTPException: _on_http,
        Exception: _on_error,
    }
    both = ["GET", "POST"]
    routes = [
        Route("/", form),
        Route("/search", search, methods=both),
        Route("/review", review, methods=both),
        Route("/api/search", api_search, methods=both),
        Route("/healthz", healthz),
        Route("/page.css", file),
        Route("/page.js", file),
        Route("/favicon.ico", icon),
    ]
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=life)
    app.router.redirect_slashes = False
    app.state.workers = pool
    return Guard(app, hosts)
