"""Files of a player over HTTP: what can be taken away, and what can be handed in."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from worldsim.apps.room import Room
from worldsim.apps.uploads import body, opening_picture, recorded
from worldsim.streaming.player import Player

NOBODY = "there is nobody to show it to"


def give_files(app: FastAPI, room: Room) -> None:
    """The film of what was seen, and the run that makes it again."""

    @app.get("/worldsim/{key}/film.mp4")
    async def film_file(key: str) -> Response:
        player = room.players.get(key)
        film = None if player is None else player.recording
        if film is None or film.on or not film.path.is_file():
            return PlainTextResponse("there is no film", 404)
        return FileResponse(film.path, media_type="video/mp4", filename="worldsim.mp4")

    @app.get("/worldsim/{key}/run.wsrun")
    async def run_file(key: str) -> Response:
        player = room.players.get(key)
        path = None if player is None else player.course.run
        if path is None or not path.is_file():
            return PlainTextResponse("there is no run", 404)
        # At once: it grows, so its length is only true of what is read now.
        named = {"content-disposition": 'attachment; filename="worldsim.wsrun"'}
        data = await asyncio.to_thread(path.read_bytes)
        return Response(data, media_type="application/x-ndjson", headers=named)


def take_files(app: FastAPI, room: Room) -> None:
    """A run to see again, and a picture to begin with."""
    reading = asyncio.Lock()

    async def taken(
        player: Player, what: str, request: Request, read: Callable[..., Any], *more: Any
    ) -> Response:
        """Ask for what a file holds. It is read beside the event loop, on which everybody's
        pictures leave, and one at a time."""
        try:
            data = await body(request)
            async with reading:
                made = await asyncio.to_thread(read, data, *more)
        except ValueError as error:
            return PlainTextResponse(str(error), 400)
        if not player.ask(what, made):
            return PlainTextResponse("another file is still to be opened: wait a moment", 409)
        return JSONResponse({})

    @app.post("/worldsim/{key}/run")
    async def replay(key: str, request: Request) -> Response:
        player = room.players.get(key)
        if player is None:
            return PlainTextResponse(NOBODY, 404)
        return await taken(player, "load", request, recorded, room.world, room.wanted())

    @app.post("/worldsim/{key}/picture")
    async def picture(key: str, request: Request) -> Response:
        player = room.players.get(key)
        if player is None or not room.takes_pictures:
            return PlainTextResponse(NOBODY, 404)
        size = room.world.config.size
        return await taken(player, "begin", request, opening_picture, size)
