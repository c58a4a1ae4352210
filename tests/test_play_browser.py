"""`worldsim play` in a real browser: headless Chromium, the bundled maze. What it looked like is in
screenshots/ afterwards."""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import pytest

from worldsim.apps.bench_play import visit
from worldsim.apps.browser import chromium, missing
from worldsim.apps.play import PlayOptions, background, build, listening, opened, playable
from worldsim.apps.room import Room
from worldsim.apps.setting import Setting
from worldsim.world import World

SHOTS = Path(__file__).parent.parent / "screenshots"
OPTIONS = PlayOptions(Setting(), max_sessions=3, seed=3)
DESK, PHONE = {"width": 1280, "height": 880}, {"width": 390, "height": 844}
PATIENCE = 20e3  # ms
LIVE = '.badge[data-state="live"]'

Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def world() -> World:
    return playable(OPTIONS)


@pytest.fixture(scope="module")
def served(world: World) -> Iterator[tuple[str, Room, Any]]:
    if (why := missing()) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    SHOTS.mkdir(exist_ok=True)
    with ExitStack() as stack:
        sock = stack.enter_context(listening("127.0.0.1", 0))
        room = stack.enter_context(opened(world, OPTIONS))
        url = stack.enter_context(background(build(room, OPTIONS), sock))
        yield url, room, stack.enter_context(chromium())


@pytest.fixture
def visiting(served: tuple[str, Room, Any]) -> Iterator[Visit]:
    """Opens pages that are live; afterwards, nothing of theirs is left."""
    url, room, browser = served
    contexts, errors, asked = [], [], set()

    def go(size: dict[str, int] = DESK, dark: bool = False, script: str = "") -> Any:
        context = browser.new_context(
            viewport=size, color_scheme="dark" if dark else "light", has_touch=size is PHONE
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.add(urlsplit(request.url)))
        if script:
            page.add_init_script(script)
        page.goto(url)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not errors
    here = urlsplit(url).netloc
    strange = {
        parts for parts in asked if parts.scheme not in ("data", "blob") and parts.netloc != here
    }
    assert not strange, "the page asked others"
    wait_for(lambda: not len(room.turns), "a session was left")
    assert room.world.pool.used_pages == 0


def wait_for(holds: Callable[[], Any], what: str) -> None:
    until = time.perf_counter() + PATIENCE / 1e3
    while not holds():
        assert time.perf_counter() < until, what
        time.sleep(0.02)


def picture(page: Any) -> str:
    return str(page.evaluate("document.querySelector('.ws .picture').toDataURL()"))


def figure(page: Any, name: str) -> str:
    return str(page.inner_text(f'.figures dd[data-name="{name}"]'))


def test_walk_look_prompt_and_rewind(visiting: Visit) -> None:
    page = visiting()
    page.wait_for_selector(LIVE)
    page.wait_for_timeout(700)
    page.keyboard.down("w")
    seen = set()
    for _ in range(8):
        page.wait_for_timeout(250)
        seen.add(picture(page))
    page.keyboard.up("w")
    assert len(seen) >= 6, "the picture stood still"
    page.wait_for_function("Number(document.querySelector('[data-name=applied]').textContent) >= 2")
    assert page.evaluate("worldsim.applied") == 2
    assert "ms" in page.inner_text(".figures .total")
    assert page.evaluate("worldsim.path.length") > 5
    page.screenshot(path=SHOTS / "walk.png")

    # Keys do nothing while one types; the prompt is heeded while it goes on.
    page.fill("#ws-prompt", "")
    page.type("#ws-prompt", "night, sand floor, stone walls")
    assert page.evaluate("worldsim.held.size") == 0
    before = picture(page)
    page.keyboard.press("Enter")
    page.wait_for_timeout(1500)
    assert picture(page) != before
    page.screenshot(path=SHOTS / "prompt.png")

    # Back to the start: the picture of then comes again.
    page.evaluate("worldsim.log = []")
    page.click(".play")
    page.wait_for_selector('.badge[data-state="paused"]')
    block = page.evaluate("worldsim.block")
    page.evaluate(
        "(bar => { bar.value = 1; bar.dispatchEvent(new Event('input')); "
        "bar.dispatchEvent(new Event('change')) })(document.querySelector('.timeline'))"
    )
    page.wait_for_function("worldsim.run >= 2")
    page.click(".play")
    page.wait_for_selector(LIVE)
    page.wait_for_timeout(400)
    runs = page.evaluate("worldsim.log.map(painted => painted.run)")
    assert runs == sorted(runs) and runs[-1] >= 2, "a picture of an old run was painted"
    assert page.evaluate("worldsim.block") < block
    assert page.input_value("#ws-prompt") != "night, sand floor, stone walls"


def test_record_fork_save_and_touch_on_a_phone(visiting: Visit) -> None:
    page = visiting(PHONE, dark=True)
    page.wait_for_selector(LIVE)
    page.click(".record")
    page.wait_for_selector(".dot")
    forward = page.locator('.key[data-code="KeyW"]')
    box = forward.bounding_box()
    forward.dispatch_event(
        "pointerdown", {"pointerId": 1, "clientX": box["x"], "clientY": box["y"]}
    )
    page.wait_for_function("worldsim.held.has('KeyW') && worldsim.applied > 0")
    page.wait_for_timeout(1000)
    page.screenshot(path=SHOTS / "phone.png", full_page=True)
    forward.dispatch_event("pointerup", {"pointerId": 1})
    page.wait_for_function("!worldsim.held.size")
    page.click(".fork")
    page.wait_for_selector(".branch")
    page.click(".record")
    with page.expect_download() as download:
        page.click(".film")
    with av.open(io.BytesIO(Path(download.value.path()).read_bytes())) as film:
        assert sum(1 for _ in film.decode(video=0)) >= 12
    with page.expect_download() as download:
        page.click(".save")
    run = Path(download.value.path()).read_bytes()
    assert run.startswith(b'{"wsrun"') and run.count(b"\n") > 4
    page.set_input_files(".file-run", files=[{"name": "x.wsrun", "mimeType": "", "buffer": run}])
    page.wait_for_selector('.badge[data-state="replay"]')
    page.set_input_files(".file-run", files=[{"name": "x.wsrun", "mimeType": "", "buffer": b"x"}])
    page.wait_for_selector(".notice:not([hidden])")


def test_reload_frees_the_session_and_another_plays_meanwhile(
    visiting: Visit, served: tuple[str, Room, Any]
) -> None:
    _, room, _ = served
    one, two = visiting(), visiting(dark=True)
    for page in (one, two):
        page.wait_for_selector(LIVE)
    (first, _) = room.turns.players
    one.reload()
    one.wait_for_selector(LIVE)
    wait_for(lambda: first.closed and len(room.turns) == 2, "the old session was kept")
    two.keyboard.down("l")
    two.wait_for_function("worldsim.applied > 0")
    two.wait_for_timeout(600)
    two.wait_for_function("document.querySelector('[data-name=players]').textContent == '2'")
    assert one.evaluate("worldsim.applied") == 0, "the other's key"
    assert "%" in figure(two, "share")
    two.screenshot(path=SHOTS / "dark.png")
    # A key that is down when the window is left is let go of.
    two.evaluate("window.dispatchEvent(new Event('blur'))")
    assert two.evaluate("worldsim.held.size") == 0


def test_without_a_websocket_buttons_bring_blocks(visiting: Visit) -> None:
    page = visiting(script="window.WebSocket = class { constructor() { throw new Error('none') } }")
    page.wait_for_selector("body.ws-slow #worldsim-slow")
    assert "no WebSocket" in page.inner_text(".badge")
    page.click("#worldsim-slow >> text=forward")
    image = page.wait_for_selector("#worldsim-slow-picture img")
    source = image.get_attribute("src")
    assert source.startswith("data:image/webp")
    page.click("#worldsim-slow >> text=forward")
    page.wait_for_function(
        "old => document.querySelector('#worldsim-slow-picture img').src != old", arg=source
    )
    page.screenshot(path=SHOTS / "slow.png")


def test_the_first_picture_of_a_key_is_found_by_its_pixels(
    world: World, served: tuple[str, Room, Any]
) -> None:
    """`bench --play`, in short."""
    run = visit(served[2], world, OPTIONS, presses=2)
    assert run.exact and run.delays and len(run.delays) + run.unseen == 2
    assert run.pictures > 20 and len(run.trips) >= len(run.delays)
    # No key can show before the page's own account of the same way says so.
    soonest = min(1e3 * trip.total for trip in run.trips)
    assert all(delay >= soonest - 1 for delay in run.delays)
