"""`worldsim play`: a world to walk around in, in the browser."""

import os
import secrets
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

# Before Gradio is imported: it asks nobody anything, and keeps what it must in our own folder.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import uvicorn
from fastapi import FastAPI, WebSocket
from fastapi.responses import PlainTextResponse
from rich.console import Console

from worldsim.apps.connection import Connection
from worldsim.apps.doctor import readable
from worldsim.apps.doctor import room as free_bytes
from worldsim.apps.files import give_files, take_files
from worldsim.apps.guard import Guard, check_origin, is_loopback
from worldsim.apps.page import head, page, theme
from worldsim.apps.report import counted
from worldsim.apps.room import Room, capacity
from worldsim.apps.setting import Setting
from worldsim.apps.uploads import UPLOADS
from worldsim.streaming.turns import Turns
from worldsim.world import World

SOCKET_BYTES = 16 * 2**10  # of a frame that comes in; `wire` wants far less
# What the page needs of Gradio; all else of it (files, uploads, proxies, logins) is not there.
GRADIO = (
    "/config", "/assets/", "/static/", "/theme.css", "/favicon.ico", "/manifest.json",
    "/gradio_api/queue/", "/gradio_api/heartbeat/", "/gradio_api/info", "/gradio_api/app_id",
    "/gradio_api/startup-events", "/gradio_api/custom_component/",
)  # fmt: skip


@dataclass(frozen=True)
class PlayOptions:
    """What the command line was given."""

    setting: Setting
    host: str = "127.0.0.1"
    port: int = 7860
    auth: str | None = None
    token: str | None = None
    allow_origin: tuple[str, ...] = ()
    root_path: str = ""
    max_sessions: int = 8
    idle_minutes: float = 15.0
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    late_latching: bool = True


def run(options: PlayOptions) -> None:
    """Serve until Ctrl-C.

    Raises:
        ValueError, OSError: one clear line, before anything is served.
    """
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    token = check(options)
    with listening(options.host, options.port) as sock:
        port = sock.getsockname()[1]
        world = playable(options)
        with opened(world, options) as room:
            app = build(room, options, token)
            console.print(
                f"worldsim: {world.config.name}, {world.config.width}×{world.config.height} at "
                f"{world.config.fps:g} fps · up to {counted(room.capacity, 'player')}, "
                f"{readable(world.memory_report(options.setting.cache).session)} each"
            )
            console.print(f"worldsim: open {address(options, port, token)}")
            serve(app, sock)


def address(options: PlayOptions, port: int, token: str | None) -> str:
    """Where the page is: behind a proxy that is the proxy's to say, by --allow-origin."""
    query = f"/?token={token}" if token else "/"
    if options.root_path:
        origin = next(iter(options.allow_origin), "your proxy: ").rstrip("/")
        return f"{origin}{options.root_path}{query} (it passes that on to port {port} here)"
    host = socket.gethostname() if options.host in ("0.0.0.0", "::") else options.host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{query}"


def check(options: PlayOptions) -> str | None:
    """The token that is asked for, made here if it shall be a new one (``new``).

    Raises:
        ValueError: for options that cannot be, or that would let strangers in.
    """
    token = secrets.token_urlsafe(16) if options.token == "new" else options.token
    if not is_loopback(options.host) and options.auth is None and token is None:
        raise ValueError(
            f"--host {options.host} lets others in: give --auth user:password or --token new"
        )
    if options.auth is not None and not all(options.auth.partition(":")):
        raise ValueError("--auth is user:password")
    if token is not None and len(token) < 8:
        raise ValueError("--token is at least 8 letters, or 'new'")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port must be in 0…65535, got {options.port}")
    if options.max_sessions < 1:
        raise ValueError(f"--max-sessions must be 1 or more, got {options.max_sessions}")
    if not options.idle_minutes > 0:
        raise ValueError(f"--idle-minutes must be above 0, got {options.idle_minutes:g}")
    if options.root_path and (
        not options.root_path.startswith("/") or options.root_path.endswith("/")
    ):
        raise ValueError(f"--root-path is like /play, got {options.root_path!r}")
    for origin in options.allow_origin:
        check_origin(origin)
    return token


def playable(options: PlayOptions) -> World:
    """The world, with a session opened and closed, so that what cannot be is told now.

    Raises:
        ValueError: for a world or a setting that cannot be played.
    """
    setting = options.setting
    world = setting.open(options.device, options.threads)
    if world.autoencoder is None:
        raise ValueError(
            f"{setting.world} has no decoder, so there is nothing to see: convert it with --base"
        )
    with setting.session(world, seed=options.seed) as session:
        session.step()  # the first one of a process takes longest
        session.step()
    return world


@contextmanager
def opened(world: World, options: PlayOptions) -> Iterator[Room]:
    """Where the players meet, with room for as many as there is memory; all end when it closes."""
    places = capacity(
        world, options.setting, options.max_sessions, free_bytes(None, options.device)
    )
    turns = Turns(60 * options.idle_minutes)
    with tempfile.TemporaryDirectory(prefix="worldsim-play-") as folder:
        try:
            yield Room(
                world, options.setting, turns, places, Path(folder), options.seed,
                options.late_latching,
            )  # fmt: skip
        finally:
            turns.close()


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that takes connections from now on; port 0 is any that is free.

    Raises:
        OSError: in one line, if it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(128)  # the page may be asked for before it is served
    except socket.gaierror as error:
        sock.close()
        raise OSError(f"this machine has no address {host}: give another --host") from error
    except OSError as error:
        sock.close()
        line = f"cannot listen on {host}:{port}: {error.strerror or error}: give another --port"
        raise OSError(line) from error
    with sock:
        yield sock


def build(room: Room, options: PlayOptions, token: str | None = None) -> Any:
    """The whole ASGI app."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for key in list(room.players):
            room.leave(key, "the server was stopped")

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.websocket("/worldsim/ws")
    async def socket_(socket: WebSocket) -> None:
        await Connection(socket, room).run()

    give_files(app, room)
    take_files(app, room)
    blocks = page(room, options.root_path)
    app = gr.mount_gradio_app(
        app, blocks, path="/", footer_links=[], run_history=False, show_error=True, head=head(),
        theme=theme(), root_path=options.root_path or None, ssr_mode=False, allowed_paths=[],
        blocked_paths=["/"], max_file_size=0, enable_monitoring=False, pwa=False, mcp_server=False,
    )  # fmt: skip
    return Guard(
        Only(app), options.auth, token, options.allow_origin, is_loopback(options.host), UPLOADS
    )


class Only:
    """Lets through to Gradio what the page needs."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        ours = path == "/" or path.startswith(("/worldsim/", *GRADIO))
        if scope["type"] == "http" and not ours:
            await PlainTextResponse("there is nothing here", 404)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def server(app: Any) -> uvicorn.Server:
    """One that answers WebSockets without compressing pictures, and ends quickly."""
    return uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", ws="websockets-sansio", ws_max_size=SOCKET_BYTES,
            ws_per_message_deflate=False, ws_ping_interval=20, ws_ping_timeout=20,
            timeout_graceful_shutdown=2, server_header=False, proxy_headers=False,
        )
    )  # fmt: skip


@contextmanager
def background(app: Any, sock: socket.socket) -> Iterator[str]:
    """Serve on a thread of its own, for as long as the block runs; gives the address."""
    made = server(app)
    thread = Thread(
        target=made.run, kwargs={"sockets": [sock]}, name="worldsim-server", daemon=True
    )
    thread.start()
    try:
        while not made.started:
            if not thread.is_alive():
                raise OSError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        made.should_exit = True
        thread.join()


def serve(app: Any, sock: socket.socket) -> None:
    """Until Ctrl-C."""
    server(app).run(sockets=[sock])
