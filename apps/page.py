"""The page: one Gradio app around one canvas.

All that is quick (keys, pictures, the figures) is page.js over the WebSocket of `connection`. What
Gradio does itself is the way for browsers that cannot open one: buttons whose events each bring a
block, as a moving picture inside the answer; so no file is ever served by Gradio.
"""

import asyncio
import base64
import html
import io
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any

import gradio as gr
from PIL import Image

from worldsim.apps.room import Full, Room
from worldsim.controls import ControlState
from worldsim.streaming.player import Player

TITLE = "worldsim play"
PATIENCE = 30.0  # seconds for one block of the slow way
FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # those that are there


def text(name: str) -> str:
    """A file of the page."""
    return files("worldsim.apps").joinpath(name).read_text(encoding="utf-8")


def head() -> str:
    """What goes into the page's head: its style sheet, and nothing from elsewhere."""
    return f"<style>{text('page.css')}</style>"


def theme() -> gr.themes.Base:
    """Gradio's plainest, with fonts that every machine has: none is fetched."""
    return gr.themes.Base(font=FONTS[0], font_mono=FONTS[1])


def page(room: Room, root: str = "") -> gr.Blocks:
    """The app; ``root``: the path below which a proxy serves it."""
    markup = text("page.html").replace("{root}", html.escape(root, quote=True))
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(markup, js_on_load=text("page.js"), apply_default_css=False, elem_id="worldsim")
        with gr.Column(elem_id="worldsim-slow"):
            Slow(room).lay_out(blocks)
    return blocks


class Slow:
    """The way without a WebSocket: a button a block."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._keys: dict[str, str] = {}  # of players, by Gradio's name of the page

    def lay_out(self, blocks: gr.Blocks) -> None:
        """The picture and its buttons."""
        actions = self._room.world.actions
        shown = gr.HTML("<p>Each press makes one block.</p>", elem_id="worldsim-slow-picture")
        words = gr.Textbox(label="Prompt", value=self._room.world.config.prompt, max_length=500)
        with gr.Row():
            for code in (*actions.keys, ""):
                label = actions.labels.get(code, code) or "wait"
                gr.Button(label, size="sm", min_width=80).click(
                    self._pressed(code), words, shown, show_progress="hidden",
                    api_visibility="private", concurrency_limit=None,
                )  # fmt: skip
        blocks.unload(self._leave)

    def _pressed(self, code: str) -> Callable[[str, gr.Request], Coroutine[Any, Any, str]]:
        # A function of its own: of a partial one Gradio does not see that it wants the request.
        async def press(words: str, request: gr.Request) -> str:
            return await self._press(code, words, str(request.session_hash))

        return press

    def _leave(self, request: gr.Request) -> None:
        self._room.leave(self._keys.pop(str(request.session_hash), ""), "the browser left")

    async def _press(self, code: str, words: str, name: str) -> str:
        """One block under one key, as a moving picture."""
        clock = asyncio.get_running_loop().time
        player = self._room.players.get(self._keys.get(name, ""))
        if player is None:
            try:
                self._keys[name], player = self._room.enter(lambda: None, late_latching=False)
            except Full as error:
                return f"<p>{html.escape(str(error))}: try again later.</p>"
        player.control(ControlState(buttons=frozenset([code] if code else [])))
        if words.strip() and words != player.asked:
            player.prompt(words)
        player.acknowledge_all()
        until = clock() + PATIENCE
        while (taken := player.take(player.clock())) is None:
            if player.ended or clock() > until:
                why = player.ended or "that took too long"
                self._room.leave(self._keys.pop(name), why)
                return f"<p>{html.escape(why)}</p>"
            await asyncio.sleep(0.005)
        notes = [told.data["text"] for told in player.told() if told.kind == "notice"]
        said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        return _moving(taken[0].block.frames, player) + said


def _moving(frames: Any, player: Player) -> str:
    """An <img> that holds all its pictures, played once."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    file = io.BytesIO()
    first.save(
        file, "WEBP", save_all=True, append_images=rest, lossless=True, quality=0, method=0,
        duration=round(1e3 * player.pacer.period), loop=1,
    )  # fmt: skip
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="the world" src="data:image/webp;base64,{data}">'
