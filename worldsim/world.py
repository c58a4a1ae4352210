"""A world: a loaded model bundle that sessions are opened on.

What it is to people. Loading is the business of `worldsim.loaded`, what its sessions share that of
`worldsim.stocked`.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from worldsim.aio import asynchronous
from worldsim.beginning import check_beginning, frame_alone, given_latents
from worldsim.cache.context import Context
from worldsim.config import Settings
from worldsim.controls import Control
from worldsim.memory import MemoryReport, latents_nbytes, report
from worldsim.models.autoencoder import GROUP, Carry
from worldsim.output import OUTPUTS, WorldOutput, drawn, output, shown, telling
from worldsim.pictures import read_pictures
from worldsim.rollout import Noise, OnStep
from worldsim.saving import load
from worldsim.script import PromptSegment, Script, parse_prompts
from worldsim.session import Session, decode
from worldsim.state import Asked, Block
from worldsim.stocked import NOT_BOTH, Stocked
from worldsim.wanted import Wanted, settled

OnStepEnd = Callable[["World", int, float, dict[str, Any]], Any]


class World(Stocked):
    """See the module docstring; `World.from_pretrained` makes one."""

    _hidden = False  # its progress bar

    def set_progress_bar_config(self, **options: Any) -> None:
        """``disable=True`` turns the progress bar of a call off."""
        self._hidden = bool(options.get("disable"))

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
        size = self.config.sized(height, width)
        wanted = Wanted(
            prompt, seed, steps, cache, schedule, guidance, negative_prompt, size,
            independent_first_frame, context_noise, prompt_embeds, negative_prompt_embeds,
        )  # fmt: skip
        begins = given_latents(self, size, given, pictures)
        return self._begin(wanted, begins, noise, history)

    def _begin(
        self,
        wanted: Wanted,
        given: Tensor | None = None,
        noise: Noise | None = None,
        history: int = 0,
    ) -> Session:
        """A session that has taken what it is given; see `session`."""
        frames, each = 0 if given is None else given.shape[2], self.config.block_frames
        if wanted.independent_first_frame is None and frame_alone(frames, each):
            wanted = replace(wanted, independent_first_frame=True)
        settings = settled(self, wanted)
        check_beginning(settings, frames, each)
        session = self.open(settings, self.ask(settings, *wanted.words), history, noise)
        try:
            while given is not None and session.frame < frames:
                session.give(given[:, :, session.frame : session.frame + session.block_frames])
        except BaseException:
            session.close()
            raise
        return session

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
        return settled(
            self,
            Wanted(
                None, seed, steps, cache, schedule, guidance, negative_prompt, size,
                independent_first_frame, context_noise,
            ),
        )  # fmt: skip

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
        size = self.config.sized(height, width)
        settings = settled(
            self, Wanted(cache=cache, schedule=schedule, guidance=guidance, size=size)
        )
        context = Context(self.pool_of(size), settings.cache, self.actions.camera)
        begins = latents_nbytes(self.latents_of(size, given))
        return report(self, settings, context, None, history, begins)

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
        return report(self, settings, context, scratch, history, given)

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
        wanted = Wanted(
            prompt, seed, steps, cache, schedule, guidance, negative_prompt,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        return self._stream(wanted, controls, blocks, decoding, on_step, pictures, record)

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

    def _stream(
        self,
        wanted: Wanted,
        controls: str | Sequence[Control] | None,
        blocks: int | None,
        decoding: bool,
        on_step: OnStep | None,
        pictures: Any,
        record: str | Path | None = None,
    ) -> Iterator[Block]:
        """See `stream`."""
        if blocks is not None and blocks < 1:
            raise ValueError(f"a stream needs at least one block, got {blocks}")
        embeds = wanted.prompt_embeds
        script = self.script(wanted.prompt, controls, embeds)
        begins = replace(wanted, prompt=script.prompt(0) if embeds is None else None)
        self.ask(settled(self, begins), *begins.words)
        given = given_latents(self, self.config.size, None, pictures)
        opened = partial(self._begin, begins, given)
        return self._blocks(opened, script, blocks, decoding, on_step, record)

    def _blocks(
        self,
        opened: Callable[[], Session],
        script: Script,
        blocks: int | None,
        decoding: bool,
        on_step: OnStep | None,
        record: str | Path | None,
    ) -> Iterator[Block]:
        with opened() as session, ExitStack() as stack:
            if record is not None:
                stack.callback(session.record(record).close)
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
        on_step = None
        if callback_on_step_end is not None:
            on_step = telling(partial(callback_on_step_end, self))
        alone = None
        if image is not None:
            image = read_pictures(image, self.config.size).numpy()
            latents = 1 + (len(image) - 1) // GROUP
            alone = frame_alone(latents, self.config.block_frames) or None
        count = self.blocks_for(num_frames, alone)
        wanted = Wanted(
            prompt, seed if generator is None else drawn(generator), num_inference_steps, cache,
            guidance=guidance_scale, negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        decoding = output_type != "latent"
        blocks = self._stream(wanted, controls, count, decoding, on_step, image)
        return output(shown(blocks, count, self._hidden), num_frames, output_type)
