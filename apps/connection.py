"""One browser's WebSocket: controls in, pictures out, each on its own way.

What comes in is noted at once and answered; it never waits for a block. Pictures go out when they
are due. A message that is not as `wire` says ends this connection, with the reason, and no other.
"""

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from worldsim.apps.room import WAITING, Room
from worldsim.apps.wire import VERSION, Malformed, Rate, picture, read
from worldsim.controls import ControlState
from worldsim.streaming.pacing import AHEAD
from worldsim.streaming.player import Player
from worldsim.streaming.seat import Ready

PER_SECOND, AT_ONCE = 200, 400  # messages
HUD = 0.5  # seconds from one to the next
SOON = 0.002  # seconds: a timer that is due sooner has come
MALFORMED, REFUSED, LATER = 1008, 1008, 1013  # codes of WebSocket closings
OVER = 4000  # our own: the session has ended


class Connection:
    """Serves one WebSocket until either side ends it."""

    def __init__(self, socket: WebSocket, room: Room) -> None:
        self._socket = socket
        self._room = room
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()  # something to show
        self._news = asyncio.Event()  # something to tell
        self._sending = asyncio.Lock()
        self._key = ""
        self._player: Player | None = None

    async def run(self) -> None:
        """Everything, from the first message to the last."""
        await self._socket.accept()
        listening = asyncio.create_task(self._listen())
        playing = asyncio.create_task(self._play())
        tasks = {listening, playing}
        why, code = "the browser left", 1000
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if self._player is not None and self._player.ended:
                why, code = self._player.ended, OVER
        except Malformed as error:
            why, code = str(error), MALFORMED
        except TimeoutError as error:
            why, code = str(error), LATER
        except (WebSocketDisconnect, RuntimeError):  # it closed while we were sending
            pass
        finally:
            for task in tasks:
                task.cancel()
            self._room.leave(self._key, why)
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(Exception):  # it may be closed already
                await self._socket.close(code, why[:120])

    # --- in -------------------------------------------------------------------------------------
    async def _listen(self) -> None:
        rate = Rate(PER_SECOND, AT_ONCE, time.perf_counter())
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if not rate.allows(time.perf_counter()):
                raise Malformed(f"more than {PER_SECOND} messages a second")
            text = message.get("text")
            told = read(text if text is not None else message.get("bytes") or b"")
            if self._player is not None:
                await self._hear(self._player, told)

    async def _hear(self, player: Player, told: dict[str, Any]) -> None:
        kind = told.pop("type")
        if kind == "ack":
            times = (told[name] / 1e3 for name in ("received", "due", "painted"))
            player.acknowledge(told["number"], *times)
        elif kind == "control":
            told["event_id"], told["t_client"] = told.pop("id"), told.pop("t")
            state = self._known(told)
            await self._tell("receipt", id=state.event_id, block=player.control(state))
        elif kind == "prompt":
            block = player.prompt(told["text"], told["t"], told["id"])
            await self._tell("receipt", id=told["id"], block=block)
        else:
            player.ask(kind, *told.values())

    def _known(self, told: dict[str, Any]) -> ControlState:
        try:
            return self._room.world.actions.heard(ControlState.from_dict(told))
        except ValueError:
            raise Malformed("control: something that this world does not have") from None

    # --- out ------------------------------------------------------------------------------------
    async def _play(self) -> None:
        await self._admitted()
        player = self._player
        assert player is not None
        await self._hello(player)
        tasks = [
            asyncio.create_task(part)
            for part in (self._show(player), self._report(player), self._relay(player))
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _admitted(self) -> None:
        """Wait for a place, in the order of coming."""
        room = self._room
        if not room.free() or room.queue:
            if len(room.queue) >= WAITING:
                raise TimeoutError("too many are waiting: come back later")
            turn = asyncio.Event()
            room.queue.append(turn)
            try:
                while not (room.free() and room.queue[0] is turn):
                    place = 1 + room.queue.index(turn)
                    await self._tell("waiting", place=place, capacity=room.capacity)
                    with suppress(TimeoutError, asyncio.TimeoutError):
                        await asyncio.wait_for(turn.wait(), HUD)
                self._enter()
            finally:
                room.queue.remove(turn)
        else:
            self._enter()

    def _enter(self) -> None:
        self._key, self._player = self._room.enter(self._wake)

    def _wake(self) -> None:
        """From any thread: there is something to show or to tell."""

        def both() -> None:
            self._changed.set()
            self._news.set()

        with suppress(RuntimeError):  # the loop is closed: the server stops
            self._loop.call_soon_threadsafe(both)

    async def _hello(self, player: Player) -> None:
        config, actions = self._room.world.config, self._room.world.actions
        letters = {key: letter for letter, key in actions.letters.items()}
        await self._tell(
            "hello",
            version=VERSION,
            key=self._key,
            world=config.name,
            width=config.width,
            height=config.height,
            fps=config.fps,
            block_seconds=4 * config.block_frames / config.fps,
            seed=player.seed,
            prompt=config.prompt,
            keys=[
                {"code": key, "letter": letters.get(key, key), "label": actions.labels.get(key, "")}
                for key in actions.keys
            ],
            aliases=dict(actions.aliases),
            poses=actions.posed,
            analog=actions.analog,
            view=actions.field_of_view,
            pictures=self._room.takes_pictures,
            late_latching=player.late_latching,
        )

    async def _show(self, player: Player) -> None:
        """Blocks, each when it is due."""
        clock = player.clock
        while not player.ended:
            self._changed.clear()
            due = player.waiting()
            if due is None:
                await self._changed.wait()
            elif (left := due - clock()) > SOON:
                # Not to the end: a block may be withdrawn, and a pause may come.
                with suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), left)
            elif (taken := player.take(clock())) is not None:
                await self._send(player, *taken)

    async def _send(self, player: Player, ready: Ready, due: float) -> None:
        """A block's pictures, as soon as each is encoded: the browser knows when to paint it."""
        pacer, count = player.pacer, ready.count
        for index in range(count):
            while len(ready.pictures) <= index:
                await asyncio.sleep(SOON)
            now = player.clock()
            if not pacer.shows(now, due, index, count):
                continue
            data, seen = ready.pictures[index], pacer.at(due, index) + AHEAD
            message = picture(
                ready.kind, ready.run, ready.number + index, ready.block.index, ready.event,
                ready.pose, seen, now, data, index == 0,
            )  # fmt: skip
            async with self._sending:
                await self._socket.send_bytes(message)

    async def _relay(self, player: Player) -> None:
        """What the player's other side has to tell."""
        while True:
            self._news.clear()
            for told in player.told():
                await self._tell(told.kind, **told.data)
            if player.ended:
                return
            await self._news.wait()

    async def _report(self, player: Player) -> None:
        """How it goes, twice a second."""
        while True:
            await asyncio.sleep(HUD)
            await self._tell("hud", players=len(self._room.turns), **player.figures())

    async def _tell(self, kind: str, **data: Any) -> None:
        text = json.dumps({"type": kind, **data}, allow_nan=False)
        async with self._sending:
            await self._socket.send_text(text)
