"""A world: a loaded model bundle that sessions are opened on.

Weights, the page pool and encoded prompts are shared by all sessions. Loading is the business of
`worldsim.loaded`.
"""

import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track as progress_track
from torch import Tensor

from worldsim.actions import ActionSpec
from worldsim.aio import asynchronous
from worldsim.cache.context import Context
from worldsim.cache.mid import check_form
from worldsim.cache.pool import PagePool, PageShape
from worldsim.config import Settings, WorldConfig
from worldsim.controls import Control
from worldsim.fingerprint import fingerprint
from worldsim.loaded import Loaded
from worldsim.memory import LATENT_BYTES, MemoryReport, report
from worldsim.models.autoencoder import (
    GROUP,
    SPACE,
    Autoencoder,
    Carry,
    Decoder,
    from_pictures,
    latent_size,
)
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.words import TextEncoder
from worldsim.output import OUTPUTS, WorldOutput, as_output
from worldsim.pictures import read_pictures
from worldsim.prompts import Prompts, TextRows
from worldsim.quantize import nbytes
from worldsim.rollout import Noise, OnStep
from worldsim.saving import load
from worldsim.schedule import Cell
from worldsim.script import PromptSegment, Script, parse_prompts
from worldsim.session import Session, check_recache, decode
from worldsim.state import Asked, Block

NOT_BOTH = "give a prompt or prompt_embeds, not both"

OnStepEnd = Callable[["World", int, float, dict[str, Any]], Any]


class World(Loaded):
    """See the module docstring; `World.from_pretrained` makes one."""

    def __init__(
        self,
        config: WorldConfig,
        transformer: CausalWanTransformer3DModel,
        autoencoder: Decoder | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__(config, transformer, autoencoder, text_encoder)
        self._progress: dict[str, Any] = {}
        self._fingerprint: str | None = None
        self._strange: list[str] = []  # rules of schedules that it was warned of
        self._pools: dict[tuple[int, int], PagePool] = {}
        self._pools_lock = Lock()  # streams may run on threads of their own
        self._texts = Prompts()
        takes = transformer.config
        parts = {}
        if autoencoder is not None:
            parts["channels of a latent"] = (autoencoder.latent_channels, takes.in_channels)
        if text_encoder is not None:
            parts["width of a word"] = (text_encoder.text_dim, takes.text_dim)
        parts["length of an action"] = (self.actions.dim, takes.action_dim)
        parts["length of a ray"] = (self.actions.ray_dim, takes.ray_dim)
        if config.actions is not None:
            parts["pictures moved by a control"] = (config.actions.pictures, GROUP)
        for what, (given, taken) in parts.items():
            if given != taken:
                raise ValueError(
                    f"world {config.name!r}: {what} is {given}, but the models take {taken}"
                )
        self.latent_shape = self.latents_of((config.height, config.width), config.block_frames)
        self.grid = transformer.grid(*self.latent_shape[-2:])

    def _begin_anew(self) -> None:
        """Open sessions are told so when they go on."""
        self._fingerprint = None
        with self._pools_lock:
            self._pools.clear()
        self._texts.clear()

    def set_progress_bar_config(self, **options: Any) -> None:
        """``disable=True`` turns the progress bar of a call off."""
        self._progress = options

    # --- what sessions share -------------------------------------------------------------------
    @property
    def actions(self) -> ActionSpec:
        """The world's controls; a world without any has an empty spec."""
        return self.config.actions or ActionSpec(keys=())

    @property
    def pool(self) -> PagePool:
        """The page pool of pictures of the world's own size."""
        return self.pool_of((self.config.height, self.config.width))

    def pool_of(self, size: tuple[int, int]) -> PagePool:
        """The page pool for pictures of (height, width), made when it is first asked for."""
        grid = self.transformer.grid(*self.latents_of(size, 1)[-2:])
        with self._pools_lock:
            if grid not in self._pools:
                config = self.transformer.config
                shape = PageShape(
                    layers=config.num_layers,
                    heads=config.num_attention_heads,
                    grid=grid,
                    head_dim=config.attention_head_dim,
                )
                self._pools[grid] = PagePool(shape, self.dtype, self.device)
            return self._pools[grid]

    def latents_of(self, size: tuple[int, int], frames: int) -> tuple[int, ...]:
        """Shape ``[1, C, F, h, w]`` of a block for pictures of (height, width).

        Raises:
            ValueError: for a size that the models cannot make.
        """
        decoder = self.autoencoder
        height, width = latent_size(*size, SPACE) if decoder is None else decoder.latent_size(*size)
        self.transformer.grid(height, width)
        return (1, self.transformer.config.in_channels, frames, height, width)

    def text(self, prompt: str) -> TextRows:
        """Cross-attention K/V of a prompt, computed once for as long as it is kept.

        Warns of words that this world passes over because it does not know them.

        Raises:
            ValueError: if the prompt has no word that this world knows, or it has no text encoder.
        """
        encoder = self.text_encoder
        if encoder is None:
            raise ValueError(
                "this world has no text encoder: give prompt_embeds, or load it with base= "
                "(a Wan2.1 folder)"
            )

        @torch.inference_mode()
        def encode() -> TextRows:
            return self.transformer.encode_prompt(encoder.encode(prompt))

        return self._texts.read(prompt, encode)

    @torch.inference_mode()
    def text_of(self, embeds: Tensor) -> TextRows:
        """The same of a text encoder's rows ``[1, T, text_dim]``, padded here with zeros.

        Raises:
            ValueError: for another shape, or more rows than the world's text length.
        """
        length, width = self.text_length, self.transformer.config.text_dim
        if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width:
            raise ValueError(f"prompt_embeds must be [1, T, {width}], got {list(embeds.shape)}")
        missing = length - embeds.shape[1]
        if missing < 0:
            raise ValueError(f"prompt_embeds has {embeds.shape[1]} rows, more than {length}")
        padded = torch.nn.functional.pad(embeds, (0, 0, 0, missing))
        return self.transformer.encode_prompt(padded.to(self.device, self.dtype))

    @property
    def text_length(self) -> int:
        """Rows of an encoded prompt."""
        return self.config.text_length if self.text_encoder is None else self.text_encoder.length

    def ask(
        self,
        settings: Settings,
        prompt: str | None = None,
        embeds: Tensor | None = None,
        negative: Tensor | None = None,
    ) -> Asked:
        """What a session asks for in words, or in their embeddings; neither: the world's prompt.

        Raises:
            ValueError: for both, or for what `text` and `text_of` cannot read.
        """
        if prompt is not None and embeds is not None:
            raise ValueError(NOT_BOTH)
        words = self.config.prompt if prompt is None else prompt
        rows = [self.text(words) if embeds is None else self.text_of(embeds)]
        if settings.rows > 1:
            unwanted = settings.negative_prompt
            rows.append(self.text(unwanted) if negative is None else self.text_of(negative))
        keys, values = (
            parts[0] if len(rows) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
            for parts in zip(*rows, strict=True)
        )
        return Asked("" if embeds is not None else words, embeds, negative, keys, values)

    @property
    def latents_per_second(self) -> float:
        return self.config.fps / GROUP

    # --- running -------------------------------------------------------------------------------
    def session(
        self,
        prompt: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        cache: str | None = None,
        schedule: str | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        window: int | EllipsisType | None = ...,
        sink: int | None = None,
        positions: str | None = None,
        independent_first_frame: bool | None = None,
        context_noise: float | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        noise: Noise | None = None,
        given: Tensor | None = None,
        pictures: Any = None,
        history: int = 0,
    ) -> Session:
        """Open a live world. What is None is the world's own.

        Args:
            seed: names the noise.
            steps: denoising steps.
            cache: a cache line, see `CacheConfig.parse`.
            schedule: a sampler and its step list, see `WorldConfig.sampling`.
            height, width: size of a picture in pixels.
            guidance, negative_prompt: classifier-free guidance, see `WorldConfig`.
            window, sink, positions: the same as ``cache`` says in one line; ``window`` counts the
                sink and the block itself, as the field does, and None keeps everything.
            independent_first_frame: the first latent frame is a block of its own.
            context_noise: timestep of the context pass, see `WorldConfig.context_timestep`.
            prompt_embeds, negative_prompt_embeds: rows of a text encoder ``[1, T, text_dim]``, in
                place of a prompt.
            noise: ``noise(block, step, shape)`` in place of the seed's: step 0 is what a block is
                made of, step s what is added before pass s.
            given: clean latents ``[1, C, F, h, w]`` that the stream begins with, whole blocks of
                them. Where a single frame is left over, it is a first block of its own.
            pictures: the same as pictures: one, or a video of whole blocks, see `read_pictures`.
            history: bytes of pages that snapshots may keep, which `Session.rewind` starts from;
                with 0 it starts from the beginning and makes every block once more.

        Raises:
            ValueError: for what this world cannot do.
        """
        if window is not ... or sink is not None or positions is not None:
            if cache is not None:
                raise ValueError("give a cache line, or window, sink and positions, not both")
            cache = self.config.windowed(window, sink, positions).line()
        size = (height or self.config.height, width or self.config.width)
        self.latents_of(size, 1)
        begins = self._beginning(given, pictures, size)
        frames = 0 if begins is None else begins.shape[2]
        if independent_first_frame is None and frames % self.config.block_frames == 1:
            independent_first_frame = True
        settings = self.settings(
            seed, steps, cache, schedule, guidance, negative_prompt, size, independent_first_frame,
            context_noise,
        )  # fmt: skip
        if settings.rows == 1 and (negative_prompt, negative_prompt_embeds) != (None, None):
            raise ValueError(
                "a negative prompt does nothing without guidance: give guidance=3, say"
            )
        if frames and (frames - settings.independent_first_frame) % self.config.block_frames:
            raise ValueError(
                f"given latents have {frames} frames, which are no whole blocks of "
                f"{self.config.block_frames}"
            )
        asked = self.ask(settings, prompt, prompt_embeds, negative_prompt_embeds)
        session = self.open(settings, asked, history, noise)
        try:
            while begins is not None and session.frame < frames:
                session.give(begins[:, :, session.frame : session.frame + session.block_frames])
        except BaseException:
            session.close()
            raise
        return session

    def _beginning(
        self, given: Tensor | None, pictures: Any, size: tuple[int, int]
    ) -> Tensor | None:
        """Clean latents that a stream begins with, if any; see `session`."""
        if pictures is not None:
            if given is not None:
                raise ValueError("give latents or pictures, not both")
            return self.encoded(read_pictures(pictures, size))
        if given is None:
            return None
        if given.ndim != 5:
            raise ValueError(f"given latents must be [1, C, F, h, w], got {list(given.shape)}")
        wanted = self.latents_of(size, given.shape[2])
        if given.shape != wanted:
            raise ValueError(f"given latents must be {list(wanted)}, got {list(given.shape)}")
        return given

    def open(
        self, settings: Settings, asked: Asked, history: int = 0, noise: Noise | None = None
    ) -> Session:
        """A session of checked settings, such as another one has; see `session`."""
        return Session(self, settings, asked, noise, history)

    def load_session(self, path: str | Path, history: int = 0) -> Session:
        """A session that was written by `Session.save`: it goes on bit for bit, where the machine
        is of the same kind.

        Raises:
            ValueError: for a file that is none, is damaged, or is of another world.
        """
        return load(self, path, partial(self.open, history=history))

    @property
    def fingerprint(self) -> str:
        """Names this world to the bit: its settings and all its weights, in their dtype."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.config, self._models())
        return self._fingerprint

    @torch.inference_mode()
    def encoded(self, pictures: Tensor) -> Tensor:
        """Latents ``[1, C, F, h, w]`` of pictures uint8 ``[P, H, W, 3]`` that begin a stream.

        Raises:
            ValueError: without a decoder, or for pictures that are no whole latent frames.
        """
        if not isinstance(self.autoencoder, Autoencoder):
            raise ValueError(
                "this world reads no pictures: load it with an autoencoder (base= a Wan2.1 folder, "
                "and no tiny decoder), or give latents"
            )
        source = from_pictures(pictures[None]).to(self.device, self.dtype)
        return self.autoencoder.encode(source)[0].float()

    def settings(
        self,
        seed: int = 0,
        steps: int | None = None,
        cache: str | None = None,
        schedule: str | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
        independent_first_frame: bool | None = None,
        context_noise: float | None = None,
    ) -> Settings:
        """What a session is opened with: the world's own settings, but for what is given."""
        own, alone = self.config, independent_first_frame
        listed, sampler = own.sampling(steps, schedule)
        if context_noise is not None:
            listed = replace(listed, context_timestep=float(context_noise))
        kept = self.config.cache_config(cache)
        check_form(kept, self.actions.camera)
        if listed.context == "joint":
            raise ValueError(
                "schedule: nothing runs joint windows yet; 'worldsim schedule show' draws them"
            )
        if kept.prompt == "recache":
            check_recache(listed)
        if listed.rule not in (own.rule, *self._strange):
            self._strange.append(listed.rule)
            warnings.warn(
                f"{own.name} was trained to read what is {own.rule} of earlier blocks, and under "
                f"this schedule reads what is {listed.rule}",
                stacklevel=3,
            )
        return Settings(
            seed=seed,
            schedule=listed,
            cache=kept,
            sampler=sampler,
            dtype=str(self.dtype).removeprefix("torch."),
            attention=self.attention,
            size=(own.height, own.width) if size is None else size,
            guidance=own.guidance if guidance is None else guidance,
            negative_prompt=own.negative_prompt if negative_prompt is None else negative_prompt,
            independent_first_frame=own.independent_first_frame if alone is None else alone,
        )

    def memory_report(
        self,
        cache: str | None = None,
        history: int = 0,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
        schedule: str | None = None,
        given: int = 0,
    ) -> MemoryReport:
        """Bytes that such a session would ever hold; nothing is allocated for it.

        Args:
            given: latent frames that it begins with. The others are those of `session`.

        Raises:
            ValueError: for what cannot be, or what this world does not support.
        """
        size = (height or self.config.height, width or self.config.width)
        settings = self.settings(cache=cache, schedule=schedule, guidance=guidance, size=size)
        context = Context(self.pool_of(size), settings.cache, self.actions.camera)
        begins = LATENT_BYTES * prod(self.latents_of(size, given))
        return self.memory_of(settings, context, None, history, begins)

    def memory_of(
        self,
        settings: Settings,
        context: Context,
        scratch: int | None,
        history: int,
        given: int = 0,
    ) -> MemoryReport:
        """The same of a session's context, whose view takes ``scratch`` bytes, and whose ``given``
        latents so many."""
        tensors = (
            tensor
            for model in self._models().values()
            for tensor in (*model.parameters(), *model.buffers())
        )
        shape = self.latents_of(settings.size, self.config.block_frames)
        decoder = self.autoencoder
        return report(
            context,
            shape,
            weights=sum(map(nbytes, tensors)),
            carry=0 if decoder is None else decoder.carry_nbytes(*shape[-2:]),
            scratch=scratch,
            rows=settings.rows * len(settings.schedule.lanes),
            history=history,
            prompt=self.prompt_nbytes(settings.rows),
            given=given,
        )

    def prompt_nbytes(self, rows: int) -> int:
        """Of the keys and values that a session with so many rows asks for in words."""
        sizes = self.transformer.config
        width = sizes.num_attention_heads * sizes.attention_head_dim
        one = 2 * sizes.num_layers * self.text_length * width * self.dtype.itemsize
        # The world keeps each prompt's own; a guided session has a copy of both, side by side.
        return one if rows == 1 else 2 * rows * one

    def stream(
        self,
        prompt: str | None = None,
        controls: str | Sequence[Control] | None = None,
        seed: int = 0,
        blocks: int | None = None,
        steps: int | None = None,
        cache: str | None = None,
        decoding: bool = True,
        on_step: OnStep | None = None,
        schedule: str | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        pictures: Any = None,
        record: str | Path | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Iterator[Block]:
        """Blocks of a new session, one by one, for ever or ``blocks`` many.

        Args:
            prompt: one prompt, or several over time (``red brick[4s] | night[4s]``).
            controls: a script, or held keys or a `ControlState` for each latent frame from the
                second on (the first is a single picture, which nothing moves). After its end
                nothing is held; None plays the world's own script over and over.
            decoding: False leaves ``block.frames`` empty for the caller to decode.
            on_step: sees every denoise cell and its predicted clean latents.
            schedule: a sampler and its step list, see `WorldConfig.sampling`.
            guidance, negative_prompt: see `session`.
            pictures: that it begins with, see `session`; they are its first blocks.
            record: a replay file (.wsrun) to write, see `Session.record`.
            prompt_embeds, negative_prompt_embeds: in place of the prompts, see `session`.

        Everything is checked at the call, before the first block.
        """
        if blocks is not None and blocks < 1:
            raise ValueError(f"a stream needs at least one block, got {blocks}")
        script = self.script(prompt, controls, prompt_embeds)
        settings = self.settings(seed, steps, cache, schedule, guidance, negative_prompt)
        words = script.prompt(0) if prompt_embeds is None else None
        self.ask(settings, words, prompt_embeds, negative_prompt_embeds)
        size = (self.config.height, self.config.width)
        given = None if pictures is None else self.encoded(read_pictures(pictures, size))
        opened = partial(
            self.session, words, seed, steps, cache, schedule,
            guidance=guidance, negative_prompt=negative_prompt, given=given,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        return self._blocks(opened, script, blocks, decoding, on_step, record)

    def astream(self, *args: Any, **options: Any) -> AsyncIterator[Block]:
        """`stream` for asyncio, with the same arguments: blocks are made on a thread of their own,
        and the event loop never waits for one."""
        return asynchronous(self.stream(*args, **options))

    def script(
        self,
        prompt: str | None = None,
        controls: str | Sequence[Control] | None = None,
        prompt_embeds: Tensor | None = None,
    ) -> Script:
        """Prompts and controls over time as `stream` takes them; with embeddings there is one
        prompt for ever, and it has no words.

        Raises:
            ValueError: for what this world does not know.
        """
        if prompt_embeds is None:
            segments = parse_prompts(
                self.config.prompt if prompt is None else prompt, self.latents_per_second
            )
            for segment in segments:
                self.text(segment.prompt)
        elif prompt is not None:
            raise ValueError(NOT_BOTH)
        else:
            segments = (PromptSegment("", 0),)
        wanted = self.config.controls if controls is None else controls
        if isinstance(wanted, str):
            states = self.actions.parse(wanted)
        else:
            states = tuple(map(self.actions.state, wanted))
        return Script(segments, states, repeated=controls is None)

    def decoded(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Decode a stream's blocks (made with ``decoding=False``) as they come, in order."""
        carry: Carry = None
        for block in blocks:
            if self.autoencoder is not None:
                carry = decode(self.autoencoder, block, carry)
            yield block

    def _blocks(
        self,
        opened: Callable[[], Session],
        script: Script,
        blocks: int | None,
        decoding: bool,
        on_step: OnStep | None,
        record: str | Path | None,
    ) -> Iterator[Block]:
        with opened() as session:
            if record is not None:
                session.record(record)
            for block in session.given[:blocks]:
                yield session.decode(block) if decoding else block
            while blocks is None or session.block < blocks:
                block = session.denoise(session.follow(script), on_step)
                yield session.decode(block) if decoding else block

    def blocks_for(self, pictures: int, alone: bool | None = None) -> int:
        """Blocks that hold at least ``pictures`` pictures.

        ``alone``: the first latent frame is a block of its own; None is the world's own way.

        Raises:
            ValueError: for less than one picture.
        """
        if pictures < 1:
            raise ValueError(f"ask for at least one picture, got {pictures}")
        latents = 1 + -(-(pictures - 1) // GROUP)
        if self.config.independent_first_frame if alone is None else alone:
            return 1 - (-(latents - 1) // self.config.block_frames)
        return -(-latents // self.config.block_frames)

    def __call__(
        self,
        prompt: str | None = None,
        num_frames: int = 81,
        controls: str | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "np",
        callback_on_step_end: OnStepEnd | None = None,
        cache: str | None = None,
        image: Any = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> WorldOutput:
        """A clip in the call shape of diffusers' video pipelines.

        Args:
            num_frames: pictures; whole blocks are made and trimmed to it.
            generator: draws the seed, if given.
            output_type: ``np`` (float ``[1, F, H, W, 3]`` in 0…1), ``pil`` (list of images),
                ``pt`` (float ``[1, F, 3, H, W]``) or ``latent`` (``[1, C, F, h, w]``).
            callback_on_step_end: called as ``callback(world, step, timestep, {"latents": x0})``;
                it only looks, what it returns is not used.
            image: that the clip begins with, see `session`.
            guidance_scale, negative_prompt, prompt_embeds, negative_prompt_embeds: see `session`.
        """
        if output_type not in OUTPUTS:
            raise ValueError(
                f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}"
            )
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
        on_step: OnStep | None = None
        if callback_on_step_end is not None:
            told = callback_on_step_end

            def on_step(cell: Cell, x0: Tensor) -> None:
                told(self, cell.level, cell.timestep, {"latents": x0})

        alone = None
        if image is not None:
            image = read_pictures(image, (self.config.height, self.config.width)).numpy()
            alone = (1 + (len(image) - 1) // GROUP) % self.config.block_frames == 1 or None
        count = self.blocks_for(num_frames, alone)
        blocks = self.stream(
            prompt, controls, seed, count, num_inference_steps, cache,
            decoding=output_type != "latent", on_step=on_step, guidance=guidance_scale,
            negative_prompt=negative_prompt, pictures=image, prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        hidden = bool(self._progress.get("disable"))
        console = Console(stderr=True)
        made = list(progress_track(blocks, "blocks", count, console=console, disable=hidden))
        if output_type == "latent":
            return WorldOutput(torch.cat([block.latents for block in made], dim=2))
        return WorldOutput(
            as_output(np.concatenate([b.frames for b in made])[:num_frames], output_type)
        )
