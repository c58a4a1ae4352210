"""The page: one Gradio app around one canvas.

All that is quick (keys, pictures, the figures) is page.js over the WebSocket of `connection`. What
Gradio does itself is the way for browsers that cannot open one: buttons whose events each bring a
block, as a moving picture inside the answer; so no file is ever served by Gradio.
"""

import asyncio
import base64
import html
import io
from functools import partial
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
            slow(room)
    return blocks


def slow(room: Room) -> None:
    """The way without a WebSocket: a button a block."""
    shown = gr.HTML(
        "<p>Press a button: each one makes a block.</p>", elem_id="worldsim-slow-picture"
    )
    words = gr.Textbox(label="Prompt", value=room.world.config.prompt, max_length=500)
    key = gr.State("")
    with gr.Row():
        for code in (*room.world.actions.keys, ""):
            label = room.world.actions.labels.get(code, code) or "wait"
            button = gr.Button(label, size="sm", min_width=80)
            act = partial(_press, room, code)
            button.click(
                act, [key, words], [key, shown], show_progress="hidden", api_visibility="private",
                concurrency_limit=None,
            )  # fmt: skip


async def _press(room: Room, code: str, key: str, words: str) -> tuple[str, str]:
    """One block under one key, as a moving picture."""
    player = room.players.get(key)
    if player is None:
        try:
            key, player = room.enter(lambda: None, late_latching=False)
        except Full as error:
            return "", f"<p>{html.escape(str(error))}: try again later.</p>"
    held = frozenset([code] if code else [])
    player.control(ControlState(buttons=held))
    if words and words.strip() and words != player.asked:
        player.prompt(words)
    player.acknowledge_all()
    until = asyncio.get_running_loop().time() + PATIENCE
    while (taken := player.take(player.clock())) is None:
        if player.ended or asyncio.get_running_loop().time() > until:
            room.leave(key, "too slow")
            return "", f"<p>{html.escape(player.ended or 'that took too long')}</p>"
        await asyncio.sleep(0.005)
    ready, _ = taken
    notes = [told.data.get("text", "") for told in player.told() if told.kind == "notice"]
    return key, _moving(ready.block.frames, player) + "".join(
        f"<p>{html.escape(note)}</p>" for note in notes
    )


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
