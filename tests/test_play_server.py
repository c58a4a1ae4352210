"""The server of `worldsim play`, from outside: real sockets, a tiny world."""

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from worldsim.apps import files
from worldsim.apps.fuzz import fuzz
from worldsim.apps.play import PlayOptions, background, build, check, listening, opened, run
from worldsim.apps.room import Room, capacity
from worldsim.apps.setting import Setting
from worldsim.apps.uploads import LINES, PIXELS, opening_picture, recorded
from worldsim.apps.wire import FIRST, HEADER
from worldsim.world import World

OPTIONS = PlayOptions(Setting(), max_sessions=2)
PATIENCE = 20.0


@pytest.fixture(scope="module")
def world(make_world: Callable[..., World]) -> World:
    return make_world(cache="sink=1,recent=3", steps=1, fps=32.0)


@contextmanager
def serving(
    world: World, options: PlayOptions, token: str | None = None
) -> Iterator[tuple[str, Room]]:
    with ExitStack() as stack:
        sock = stack.enter_context(listening("127.0.0.1", 0))
        room = stack.enter_context(opened(world, options))
        yield stack.enter_context(background(build(room, options, token), sock)), room


@pytest.fixture(scope="module")
def open_server(world: World) -> Iterator[tuple[str, Room]]:
    with serving(world, OPTIONS) as served:
        yield served


class Browser:
    """What page.js does, in a few lines."""

    def __init__(self, url: str, path: str = "/worldsim/ws", **options: Any) -> None:
        options.setdefault("origin", url)
        self.socket: ClientConnection = connect(
            url.replace("http", "ws") + path, open_timeout=PATIENCE, close_timeout=1, **options
        )
        self.pictures: list[tuple[Any, ...]] = []
        self.told: list[dict[str, Any]] = []

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def next(self) -> dict[str, Any] | None:
        """One message; of a picture, which it acknowledges, None."""
        message = self.socket.recv(timeout=PATIENCE)
        if isinstance(message, bytes):
            head = HEADER.unpack(message[: HEADER.size])
            self.pictures.append((*head, message[HEADER.size :]))
            self.send("ack", number=head[4], received=1e3, due=1e3, painted=1e3)
            return None
        told: dict[str, Any] = json.loads(message)
        self.told.append(told)
        return told

    def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        for _ in range(2000):
            told = self.next()
            if told and told["type"] == kind and all(told[n] == v for n, v in fields.items()):
                return told
        raise AssertionError(f"no {kind}")

    def watch(self, pictures: int) -> None:
        wanted = len(self.pictures) + pictures
        while len(self.pictures) < wanted:
            self.next()

    def closed(self) -> tuple[int, str]:
        with suppress(ConnectionClosed):
            while True:
                self.socket.recv(timeout=PATIENCE)
        return self.socket.close_code or 0, self.socket.close_reason or ""

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def emptied(room: Room) -> bool:
    until = time.perf_counter() + PATIENCE
    while len(room.turns) and time.perf_counter() < until:
        time.sleep(0.01)
    return not len(room.turns) and not room.world.pool.used_pages


# --- playing --------------------------------------------------------------------------------------
def test_hello_pictures_receipts_and_applied_controls(open_server: tuple[str, Room]) -> None:
    url, room = open_server
    with Browser(url) as browser:
        hello = browser.until("hello")
        assert hello["width"] == room.world.config.width
        assert [key["code"] for key in hello["keys"]] == list(room.world.actions.keys)
        browser.watch(6)
        browser.send("control", id=41, t=1.0, buttons=["KeyW"])
        receipt = browser.until("receipt")
        assert receipt["id"] == 41
        while browser.pictures[-1][6] != 41:
            browser.watch(1)
        applied = browser.pictures[-1]
        assert applied[5] >= receipt["block"], "it was applied before it came"
        assert applied[2] & FIRST
        numbers = [picture[4] for picture in browser.pictures]
        assert numbers == sorted(set(numbers))
        shown = Image.open(io.BytesIO(applied[-1]))
        assert shown.size == (room.world.config.width, room.world.config.height)
        hud = browser.until("hud")
        assert hud["applied"] >= 1 and hud["players"] == 1 and hud["cache_bytes"] > 0
        assert set(hud["latency"]) >= {"wait", "denoise", "network", "paint", "total"}
    assert emptied(room)


def test_commands(open_server: tuple[str, Room]) -> None:
    url, room = open_server
    with Browser(url) as browser:
        browser.until("hello")
        browser.watch(12)
        browser.send("pause")
        browser.until("state", paused=True)
        browser.send("resume")
        browser.until("state", paused=False)
        browser.send("prompt", id=1, t=0, text="night")
        browser.watch(12)
        browser.send("fork")
        assert (
            browser.until("state", prompt="night")["branches"] or browser.until("state")["branches"]
        )
        before = browser.pictures[-1][3]
        browser.send("rewind", block=1)
        browser.until("path")
        while browser.pictures[-1][3] == before:
            browser.watch(1)
        assert browser.pictures[-1][5] == 1, "it goes on with the block it was sent back to"
        browser.send("switch", branch=1)
        browser.send("reset", seed=77)
        assert browser.until("state", seed=77)["branches"] == []
    assert emptied(room)


def test_film_and_replay_file(open_server: tuple[str, Room]) -> None:
    import av

    url, room = open_server
    with Browser(url) as browser:
        key = browser.until("hello")["key"]
        browser.send("record", on=True)
        browser.until("state", recording=True)
        assert httpx.get(f"{url}/worldsim/{key}/film.mp4").status_code == 404
        browser.watch(20)
        browser.send("record", on=False)
        browser.until("recorded")
        film = httpx.get(f"{url}/worldsim/{key}/film.mp4")
        with av.open(io.BytesIO(film.content)) as container:
            assert sum(1 for _ in container.decode(video=0)) >= 12
        saved = httpx.get(f"{url}/worldsim/{key}/run.wsrun")
        assert saved.status_code == 200
        answer = httpx.post(f"{url}/worldsim/{key}/run", content=saved.content)
        assert answer.status_code == 200, answer.text
        browser.until("state", replaying=True)
        browser.send("control", id=5, t=1.0, buttons=["KeyW"])
        browser.until("state", replaying=False)
        for wrong in (
            b"",
            b"{}",
            b"\x89PNG",
            saved.content.replace(b"recent", b"recemt"),
            b"{}\n" * 9,
        ):
            answer = httpx.post(f"{url}/worldsim/{key}/run", content=wrong)
            assert answer.status_code == 400 and "\n" not in answer.text
        head, *_ = saved.content.split(b"\n")
        other = json.loads(head)
        other["settings"]["fields"]["seed"] = 3
        text = json.dumps(other).replace('"recent": 3', '"recent": 4000').encode()
        answer = httpx.post(f"{url}/worldsim/{key}/run", content=text + b"\n")
        assert answer.status_code == 400 and "other settings" in answer.text
    assert httpx.get(f"{url}/worldsim/{key}/run.wsrun").status_code == 404
    assert emptied(room)
    assert not list(room.folder.iterdir()), "files of a player who left"


def test_a_picture_is_uploaded(open_server: tuple[str, Room]) -> None:
    url, room = open_server
    file = io.BytesIO()
    Image.new("RGB", (90, 40), (10, 200, 30)).save(file, "PNG")
    with Browser(url) as browser:
        key = browser.until("hello")["key"]
        browser.watch(3)
        run = browser.pictures[-1][3]
        address = f"{url}/worldsim/{key}/picture"
        assert httpx.post(address, content=file.getvalue()).status_code == 200
        while browser.pictures[-1][3] == run:
            browser.watch(1)
        saved = httpx.get(f"{url}/worldsim/{key}/run.wsrun").content
        answer = httpx.post(f"{url}/worldsim/{key}/run", content=saved)
        assert answer.status_code == 200, answer.text
        browser.until("state", replaying=True)
        for wrong in (b"", b"no picture", file.getvalue()[:60], b"GIF89a" + b"\0" * 50):
            assert httpx.post(address, content=wrong).status_code == 400
        assert httpx.post(address, content=b"\0" * (9 * 2**20)).status_code == 400
        assert httpx.post(f"{url}/worldsim/nobody/picture", content=b"").status_code == 404
    assert emptied(room)


def test_pictures_are_cut_to_shape_and_large_ones_refused() -> None:
    file = io.BytesIO()
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    Image.fromarray(wide).save(file, "PNG")
    assert (opening_picture(file.getvalue(), (8, 8)) > 200).all()
    file = io.BytesIO()
    Image.new("1", (8192, PIXELS // 8192 + 8)).save(file, "PNG")
    with pytest.raises(ValueError, match="pixels"):
        opening_picture(file.getvalue(), (8, 8))


def test_a_run_that_began_with_a_picture_is_taken(
    make_world: Callable[..., World], tmp_path: Path
) -> None:
    wide = make_world(block_frames=3, steps=1)
    picture = np.full((1, wide.config.height, wide.config.width, 3), 90, np.uint8)
    with wide.session(pictures=picture) as session:
        session.record(tmp_path / "run.wsrun")
        session.step()
    wanted = wide.settings()
    replay = recorded((tmp_path / "run.wsrun").read_bytes(), wide, wanted)
    assert replay.settings.independent_first_frame and not wanted.independent_first_frame
    with pytest.raises(ValueError, match="other settings"):
        recorded((tmp_path / "run.wsrun").read_bytes(), wide, wide.settings(steps=2))


def test_a_replay_file_of_very_many_lines_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="at most 65,536 lines"):
        recorded(b"{}\n" * (LINES + 1), world, world.settings())


def test_a_file_that_takes_long_to_read_stops_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = threading.Event()

    def slow(*_: Any) -> Any:
        assert watched.wait(PATIENCE), "nobody saw a picture meanwhile"
        raise ValueError("read to its end")

    monkeypatch.setattr(files, "opening_picture", slow)
    with serving(world, OPTIONS) as (url, _), Browser(url) as browser:
        key = browser.until("hello")["key"]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.post, f"{url}/worldsim/{key}/picture", timeout=PATIENCE)
            browser.watch(12)
            watched.set()
            assert answer.result().text == "read to its end"


# --- several --------------------------------------------------------------------------------------
def test_players_do_not_see_each_other_and_one_more_waits(open_server: tuple[str, Room]) -> None:
    url, room = open_server
    with Browser(url) as one, Browser(url) as two:
        one.until("hello")
        two.until("hello")
        one.send("reset", seed=1)
        two.send("reset", seed=1)
        one.until("state", seed=1)
        two.until("state", seed=1)
        two.send("control", id=1, t=0, buttons=["KeyS"])
        for _ in range(24):
            one.watch(1)
            two.watch(1)
        assert one.until("hud")["players"] == 2
        assert all(picture[6] == 0 for picture in one.pictures), "the other's key"
        with Browser(url) as three:
            assert three.until("waiting")["place"] == 1
            one.socket.close()
            three.until("hello")
            three.watch(4)
            two.watch(4)
    assert emptied(room)


def test_a_gone_browser_frees_its_session(open_server: tuple[str, Room]) -> None:
    url, room = open_server
    for _ in range(5):
        browser = Browser(url)
        browser.until("hello")
        browser.socket.socket.close()  # without a word
        browser.socket.close()
    assert emptied(room)


def test_an_idle_player_is_told_and_freed(world: World) -> None:
    with (
        serving(world, replace(OPTIONS, idle_minutes=0.01)) as (url, room),
        Browser(url) as browser,
    ):
        browser.until("hello")
        code, why = browser.closed()
        assert code == 4000 and "nothing was done" in why
        assert emptied(room)


def test_capacity_is_computed(world: World) -> None:
    report = world.memory_report(None, 0)
    assert capacity(world, Setting(), 5, 2**34) == 5
    some = capacity(world, Setting(), 500, 2**30)
    assert 1 <= some < 500 and some * report.session < 2**30
    with pytest.raises(ValueError, match="smaller --cache"):
        capacity(world, Setting(), 5, 2**10)


# --- safety ---------------------------------------------------------------------------------------
def test_options_that_would_let_strangers_in() -> None:
    check(OPTIONS)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        with pytest.raises(ValueError, match="--auth user:password or --token"):
            check(replace(OPTIONS, host=host))
        check(replace(OPTIONS, host=host, auth="ada:secret"))
    for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"):
        check(replace(OPTIONS, host=host))
    assert len(check(replace(OPTIONS, token="new")) or "") > 16
    wrong: list[dict[str, Any]] = [
        {"auth": "ada"}, {"auth": ":x"}, {"token": "short"}, {"max_sessions": 0},
        {"idle_minutes": 0}, {"root_path": "play"}, {"root_path": "/play/"},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(ValueError, match="--"):
            check(replace(OPTIONS, **options))
    with pytest.raises(ValueError, match="--host"):
        run(replace(OPTIONS, host="0.0.0.0"))


@pytest.mark.parametrize(
    "message",
    [b"\0\1", "{", '{"type":"nothing"}', '{"type":"control","id":1,"t":1,"buttons":["KeyP"]}',
     '{"type":"control","id":1,"t":1,"buttons":[],"look":[1,1]}', "x" * 5000],
)  # fmt: skip
def test_a_malformed_message_closes_that_socket_and_no_other(
    open_server: tuple[str, Room], message: str | bytes
) -> None:
    url, room = open_server
    with Browser(url) as good:
        good.until("hello")
        with Browser(url) as bad:
            bad.until("hello")
            bad.socket.send(message)
            code, why = bad.closed()
            assert code == 1008 and why and "Traceback" not in why
        good.watch(8)
    assert emptied(room)


def test_a_flood_and_a_huge_message_close_that_socket(open_server: tuple[str, Room]) -> None:
    url, room = open_server
    with Browser(url) as flood:
        flood.until("hello")
        with suppress(ConnectionClosed):
            for _ in range(3000):
                flood.send("pause")
        assert "messages a second" in flood.closed()[1]
    with Browser(url) as huge:
        huge.until("hello")
        with suppress(ConnectionClosed):
            huge.socket.send("x" * 2**20)
        assert huge.closed()[0] in (1009, 1008)
    assert emptied(room)


def test_other_sites_and_other_names_are_refused(open_server: tuple[str, Room]) -> None:
    url, _ = open_server
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://["):
        with pytest.raises(InvalidStatus) as refused:
            Browser(url, origin=origin)
        assert refused.value.response.status_code == 403
    rebound = {"host": "evil.example:7860", "origin": "http://evil.example:7860"}
    assert httpx.get(url, headers=rebound).status_code == 421
    assert httpx.get(url, headers={"host": "["}).status_code == 421
    assert (
        httpx.post(
            f"{url}/gradio_api/queue/join", headers={"origin": "https://evil.example"}
        ).status_code
        == 403
    )
    page = httpx.get(url)
    assert page.status_code == 200
    assert page.headers["x-frame-options"] == "DENY"
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_nothing_of_gradio_serves_or_takes_files(open_server: tuple[str, Room]) -> None:
    url, _ = open_server
    for path in (
        "/gradio_api/file=/etc/passwd", "/gradio_api/file=pyproject.toml", "/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/", "/login", "/docs", "/openapi.json",
        "/gradio_api/stream/x", "/gradio_api/openapi.json", "/gradio_api/deep_link",
        "/worldsim/..%2f..%2fetc/film.mp4", "/worldsim/../../etc/passwd",
        "/assets/../../../../etc/passwd", "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/static/..%2f..%2froutes.py",
    ):  # fmt: skip
        answer = httpx.get(url + path)
        assert answer.status_code >= 400 or "<!doctype html>" in answer.text[:20].lower(), path
        assert "root:" not in answer.text and "import " not in answer.text, path
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/run/predict"):
        assert httpx.post(url + path, files={"files": b"x"}).status_code == 404, path
    assert httpx.post(f"{url}/gradio_api/queue/join", content=b"x" * 2**17).status_code == 413


def test_a_password_is_needed_for_everything(world: World) -> None:
    options = replace(OPTIONS, auth="ada:secret")
    with serving(world, options) as (url, _):
        for path in ("/", "/config", "/assets/index.js", "/worldsim/x/film.mp4"):
            assert httpx.get(url + path).status_code == 401, path
        assert httpx.get(url, auth=("ada", "wrong")).status_code == 401
        assert httpx.get(url, headers={"authorization": "Basic !"}).status_code == 401
        with pytest.raises(InvalidStatus):
            Browser(url)
        page = httpx.get(url, auth=("ada", "secret"))
        assert page.status_code == 200
        cookie = page.headers["set-cookie"].partition(";")[0]
        assert "HttpOnly" in page.headers["set-cookie"]
        assert "secret" not in cookie
        assert httpx.get(url, headers={"cookie": cookie}).status_code == 200
        with pytest.raises(InvalidStatus):
            Browser(url, additional_headers={"cookie": "worldsim=guess"})
        with Browser(url, additional_headers={"cookie": cookie}) as browser:
            browser.until("hello")


def test_a_token_opens_the_page_and_a_cookie_keeps_it_open(world: World) -> None:
    with serving(world, OPTIONS, "a-long-token") as (url, _):
        assert httpx.get(url).status_code == 401
        assert httpx.get(f"{url}/?token=a-wrong-token").status_code == 401
        page = httpx.get(f"{url}/?token=a-long-token")
        assert page.status_code == 200
        own = page.headers["set-cookie"].partition(";")[0]
        assert own.partition("=")[0] == f"worldsim-{url.rpartition(':')[2]}"
        for cookie in (own, f'a[0]={{"x":1}}; =; b; {own}; c="', f"worldsim-1=other;{own}"):
            with Browser(url, additional_headers={"cookie": cookie}) as browser:
                browser.until("hello")


# --- behind a proxy -------------------------------------------------------------------------------
class Proxy:
    """Serves ``/play`` of https://play.example.org (without its TLS) from an address behind it."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait(PATIENCE)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        async def start() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._started.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        method, path, version = first.split(" ")
        assert path.startswith("/play")
        kept = [line for line in lines if not line.lower().startswith(("host:", "connection:"))]
        switching = any(line.lower().startswith("upgrade:") for line in lines)
        kept += [
            f"Host: 127.0.0.1:{self._behind}", "X-Forwarded-Proto: https",
            "X-Forwarded-Host: play.example.org",
            f"Connection: {'Upgrade' if switching else 'close'}",
        ]  # fmt: skip
        behind, out = await asyncio.open_connection("127.0.0.1", self._behind)
        out.write("\r\n".join([f"{method} {path[5:] or '/'} {version}", *kept, "", ""]).encode())
        await asyncio.gather(_pipe(reader, out), _pipe(behind, writer))


async def _pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await source.read(2**16):
            sink.write(data)
            await sink.drain()
    sink.close()


def test_behind_a_proxy_with_a_path_and_another_origin(world: World) -> None:
    origin = "https://play.example.org"
    options = replace(OPTIONS, root_path="/play", allow_origin=(origin,))
    with serving(world, options) as (url, room):
        proxy = Proxy(int(url.rpartition(":")[2]))
        try:
            front = f"http://127.0.0.1:{proxy.port}"
            page = httpx.get(f"{front}/play/").text
            assert f'"root":"{origin}/play"' in page.replace('": "', '":"')
            assert 'data-root=\\"/play\\"' in page or "/play" in page
            assert httpx.get(f"{front}/play/config").status_code == 200
            with Browser(front, "/play/worldsim/ws", origin=origin) as browser:
                browser.until("hello")
                browser.watch(5)
            with pytest.raises(InvalidStatus):
                Browser(front, "/play/worldsim/ws", origin="https://other.example.org")
        finally:
            proxy.close()
        assert emptied(room)
    for wrong in ("play.example.org", "https://x/path", "ftp://x"):
        with pytest.raises(ValueError, match="--allow-origin"):
            build(
                Room(world, Setting(), room.turns, 1, room.folder),
                replace(options, allow_origin=(wrong,)),
            )


# --- anything at all ------------------------------------------------------------------------------
def test_two_thousand_random_messages_harm_nobody(world: World) -> None:
    told = fuzz(world, replace(OPTIONS, max_sessions=4), 2000, seed=1)
    assert told["messages"] == 2000
    assert told["sessions_left"] == 0 and told["pages_left"] == 0
    assert told["refused"] > 100 and told["answered"] > 20
    assert told["pictures"] > 0 and told["restarts"] == 0
