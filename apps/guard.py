"""Who may talk to the server: passwords, tokens, hosts and origins, the size of what comes in.

One ASGI middleware before everything else, so that nothing of any library answers a stranger.

- A page of another site cannot talk to us: the `Origin` of a WebSocket, and of whatever is not a
  GET, must be our own or one of ``origins``.
- Nor can one that has its name point at 127.0.0.1 (DNS rebinding): on loopback, the `Host` must be
  a loopback name or that of one of ``origins``.
- With a password or a token nothing is served without it. Once it was given, a cookie stands for
  it, since a browser's WebSocket can send nothing else.
"""

import asyncio
import base64
import hmac
import ipaddress
import secrets
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

COOKIE = "worldsim"  # and the port: a browser sends one server's cookies to the host's others
BODY_BYTES = 64 * 2**10  # of a request that is no upload
PAUSE = 0.5  # seconds after a wrong password

Scope = Any  # ASGI: a mapping, and two coroutines
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    # Gradio makes functions of texts; nothing from elsewhere is ever loaded.
    "content-security-policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
        "connect-src 'self' {sockets}; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
    ),
}


def is_loopback(host: str) -> bool:
    """Whether a name or an address is of this machine alone."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_origin(origin: str) -> str:
    """``https://play.example.org``, as a browser says it.

    Raises:
        ValueError: for anything else.
    """
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path not in ("", "/"):
        raise ValueError(
            f"--allow-origin is like https://play.example.org, without a path, got {origin!r}"
        )
    return f"{parts.scheme}://{parts.netloc}".lower()


class Guard:
    """See the module docstring.

    Args:
        auth: ``user:password``, or None.
        token: what ``?token=`` must be, or None.
        origins: of other addresses under which the page is reached (a proxy's).
        loopback: the server is bound to loopback.
        uploads: ends of paths whose requests may be larger than others, and bound it themselves.
    """

    def __init__(
        self,
        app: Any,
        auth: str | None = None,
        token: str | None = None,
        origins: Sequence[str] = (),
        loopback: bool = True,
        uploads: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._auth, self._token = auth, token
        self._origins = tuple(map(check_origin, origins))
        self._hosts = tuple(urlsplit(origin).hostname for origin in self._origins)
        self._loopback = loopback
        self._uploads = tuple(uploads)
        self._pass = secrets.token_urlsafe(32)  # what the cookie holds; new with every start

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        host = headers.get("host", "")
        if self._loopback and not self._known(host):
            await _refuse(scope, send, 421, "this server answers to localhost only")
            return
        asks = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD")
        if asks and not self._own(headers.get("origin"), host):
            await _refuse(
                scope, send, 403, "another site's page: start with --allow-origin to let it in"
            )
            return
        if length := headers.get("content-length", ""):
            large = not scope["path"].endswith(self._uploads) if self._uploads else True
            if not length.isdecimal() or (large and int(length) > BODY_BYTES):
                await _refuse(scope, send, 413, "too large")
                return
        given = self._given(scope, headers)
        if given is None:
            if "authorization" in headers or b"token=" in scope.get("query_string", b""):
                await asyncio.sleep(PAUSE)
            await self._ask(scope, send)
            return
        await self._app(
            scope, _bounded(scope, receive, self._uploads), self._marked(scope, send, given, host)
        )

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # no name at all
            return False
        return is_loopback(name) or name in self._hosts

    def _own(self, origin: str | None, host: str) -> bool:
        """Whether a page of ``origin`` may ask. What is no browser says none, and needs none: it
        can do nothing in a stranger's name."""
        if origin is None:
            return True
        try:
            parts = urlsplit(origin.lower())
        except ValueError:
            return False
        return parts.netloc == host.lower() or origin.lower() in self._origins

    def _given(self, scope: Scope, headers: dict[str, str]) -> str | None:
        """How the asker showed that it may: "" (a cookie, or none was needed), "fresh" (a password
        or a token); None if it did not."""
        if self._auth is None and self._token is None:
            return ""
        for cookie in headers.get("cookie", "").split(";"):  # others' may be of any form
            name, _, value = cookie.strip().partition("=")
            if name == _cookie(scope) and _same(value, self._pass):
                return ""
        kind, _, told = headers.get("authorization", "").partition(" ")
        if self._auth is not None and kind.lower() == "basic":
            try:
                told = base64.b64decode(told, validate=True).decode()
            except ValueError:
                return None
            return "fresh" if _same(told, self._auth) else None
        if self._token is not None and kind.lower() == "bearer":
            return "fresh" if _same(told, self._token) else None
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        if self._token is not None and _same(query.get("token", ""), self._token):
            return "fresh"
        return None

    async def _ask(self, scope: Scope, send: Any) -> None:
        if self._auth is not None:
            more = [(b"www-authenticate", b'Basic realm="worldsim", charset="UTF-8"')]
            await _refuse(scope, send, 401, "a name and a password are needed", more)
        else:
            line = "a token is needed: open the address that `worldsim play` printed"
            await _refuse(scope, send, 401, line)

    def _marked(self, scope: Scope, send: Any, given: str, host: str) -> Any:
        """``send`` with our headers, and the cookie for who has just shown that it may."""
        own = {
            name: value.format(sockets=f"ws://{host} wss://{host}")
            for name, value in HEADERS.items()
        }

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [
                    (name.encode(), value.encode("latin-1", "replace"))
                    for name, value in own.items()
                ]
                if given:
                    cookie = f"{_cookie(scope)}={self._pass}; Path=/; HttpOnly; SameSite=Strict"
                    more.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        return marked


def _cookie(scope: Scope) -> str:
    """Its name."""
    _, port = scope.get("server") or ("", None)
    return f"{COOKIE}-{port}" if port else COOKIE


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode("utf-8", "replace"), b.encode("utf-8", "replace"))


def _bounded(scope: Scope, receive: Any, uploads: Sequence[str]) -> Any:
    """``receive`` that ends where a body is larger than it may be, whatever its length says."""
    if scope["type"] != "http" or (uploads and scope["path"].endswith(tuple(uploads))):
        return receive
    left = BODY_BYTES

    async def bounded() -> Any:
        nonlocal left
        message = await receive()
        if message["type"] == "http.request":
            left -= len(message.get("body", b""))
            if left < 0:
                return {"type": "http.disconnect"}
        return message

    return bounded


async def _refuse(
    scope: Scope, send: Any, status: int, line: str, more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": line})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"worldsim: {line}\n".encode()})
