"""A world: a loaded model bundle that sessions are opened on.

A world folder holds ``world.json`` and three diffusers folders: ``transformer``, ``vae`` and
``text_encoder``. Weights, the page pool and encoded prompts are shared by all sessions.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track as progress_track
from torch import Tensor

from worldsim.bundle import auto_dtype, check_device, locate
from worldsim.cache.context import Context
from worldsim.cache.mid import check_form
from worldsim.cache.pool import PagePool, PageShape
from worldsim.config import Settings, WorldConfig
from worldsim.controls import ActionSpec, Keys, parse_prompts
from worldsim.folder import DECODER, TEXT, TRANSFORMER, read_folder, write_folder
from worldsim.memory import MemoryReport, report
from worldsim.models.attention import NATIVE
from worldsim.models.autoencoder import GROUP, SPACE, Autoencoder, Carry, Decoder, from_pictures
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.weights import cast
from worldsim.models.words import TextEncoder
from worldsim.output import OUTPUTS, WorldOutput, as_output
from worldsim.pictures import read_pictures
from worldsim.quantize import check_quantization, is_quantized, nbytes, quantize
from worldsim.rollout import Noise, OnStep, compiled
from worldsim.schedule import Cell
from worldsim.script import Script
from worldsim.session import Asked, Block, Session, decode

PROMPTS_KEPT = 32

TextRows = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
OnStepEnd = Callable[["World", int, float, dict[str, Any]], Any]


class World:
    """See the module docstring; `World.from_pretrained` makes one."""

    def __init__(
        self,
        config: WorldConfig,
        transformer: CausalWanTransformer3DModel,
        autoencoder: Decoder | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.config = config
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.attention = NATIVE
        self.device = transformer.device
        self.dtype = transformer.proj_out.weight.dtype
        self.offloaded = False
        self.forward: Callable[..., Any] = transformer
        self.commit: Callable[..., Any] = transformer.commit
        self._progress: dict[str, Any] = {}
        self._pools: dict[tuple[int, int], PagePool] = {}
        self._texts: OrderedDict[str, TextRows] = OrderedDict()
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

    # --- loading and saving -------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        torch_dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        preset: str | None = None,
        decoder: str | Path | None = None,
        quantization_config: Any = None,
    ) -> "World":
        """Load the bundled world (``"maze"``), a world folder, a diffusers folder of the Wan2.1
        family, or a hub id of either.

        Args:
            source: name, path or hub id.
            torch_dtype: a dtype, or ``"auto"``: bfloat16 where the device computes in it.
            device: where to put it.
            preset: how to run a folder that does not say so itself, see `worldsim.presets`.
            decoder: a tiny decoder's file (``taew2_1.pth``) in place of the folder's autoencoder.
            quantization_config: quantise the transformer's linears by it, see
                `worldsim.quantize.check_quantization`.

        Raises:
            ValueError: an unknown name, an incomplete folder, damaged weights.
        """
        place = check_device(device)
        if quantization_config is not None:
            check_quantization(quantization_config)  # before anything large is read
        folder = locate(str(source))
        dtype = auto_dtype(place) if torch_dtype == "auto" else torch_dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch_dtype must be a torch dtype or 'auto', got {torch_dtype!r}")
        world = cls(*read_folder(folder, dtype, preset, _path(decoder)))
        return world._placed(place, quantization_config)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        preset: str = "self-forcing",
        base: str | Path | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        decoder: str | Path | None = None,
        quantization_config: Any = None,
    ) -> "World":
        """Load a generator in its original layout, such as ``self_forcing_dmd.pt``.

        Args:
            path: ``.pt`` or ``.safetensors``.
            preset: how to run it, see `worldsim.presets`.
            base: a diffusers folder or hub id of Wan2.1, for its decoder and text encoder. Without
                one there are latents only, and prompts are given as embeddings.
            config: sizes of the model, where neither the file nor its shapes tell them.
            torch_dtype: None takes the file's own.
            device: where to put it.
            decoder: a tiny decoder's file, in place of the base's autoencoder.
            quantization_config: see `from_pretrained`.

        Raises:
            ValueError: a file that cannot be read or does not fit, an unknown preset.
        """
        from worldsim.single_file import read_single_file

        place = check_device(device)
        if quantization_config is not None:
            check_quantization(quantization_config)  # before anything large is read
        folder = None if base is None else locate(str(base))
        read = read_single_file(Path(path), preset, folder, config, torch_dtype, _path(decoder))
        return cls(*read)._placed(place, quantization_config)

    def _placed(self, place: torch.device, quantization_config: Any) -> "World":
        """On its device, once it is loaded."""
        if quantization_config is not None:
            quantize(self.transformer, quantization_config, place)
        return self if place.type == "cpu" else self.to(place)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads, and diffusers too where it can.

        Raises:
            ValueError: for a world that is quantised or has a LoRA; nothing is written then.
        """
        if is_quantized(self.transformer):
            raise ValueError("quantised weights are not saved: save the world before quantising it")
        if getattr(self.transformer, "peft_config", None):
            raise ValueError("a world is saved without its LoRA: unload_lora() first")
        write_folder(Path(folder), self.config, self._models())

    def to(self, *targets: torch.device | str | torch.dtype) -> "World":
        """Move and cast, as in ``world.to("cuda", torch.bfloat16)``; open sessions cannot go on.

        Raises:
            ValueError: where the device is not there, or for a dtype of a quantised world, or an
                offloaded world; nothing has changed then.
        """
        checked = [t if isinstance(t, torch.dtype) else check_device(t) for t in targets]
        if self.offloaded:
            raise ValueError(
                "an offloaded world stays where it is: load it anew to move or cast it"
            )
        if is_quantized(self.transformer) and any(
            isinstance(t, torch.dtype) and t != self.dtype for t in checked
        ):
            raise ValueError("quantised weights keep their dtype: load them with torch_dtype=")
        for target in checked:
            if isinstance(target, torch.dtype):
                self.dtype = target
            else:
                self.device = target
        for model in self._models().values():
            if not is_quantized(model):
                cast(model, self.dtype)
            torch.nn.Module.to(model, self.device)
        self._begin_anew()
        return self

    def _begin_anew(self) -> None:
        """Forget what older weights or devices left behind; open sessions are told so."""
        self._pools.clear()
        self._texts.clear()

    # --- adapting -----------------------------------------------------------------------------
    def load_lora(
        self, source: str | Path | Mapping[str, Any], scale: float = 1.0, name: str = "default"
    ) -> None:
        """Add a LoRA to the transformer, ``scale`` times, beside those it has; open sessions
        cannot go on, since their context and text were made without it.

        Args:
            source: a file or its tensors, see `worldsim.lora.read_lora`.
            name: to tell several apart.

        Raises:
            ValueError: a LoRA that does not fit this model, a name that is taken, or peft is
                missing; nothing has changed then.
        """
        from worldsim.lora import load_lora

        load_lora(self.transformer, source, scale, name)
        self._begin_anew()

    def unload_lora(self) -> None:
        """Take all LoRAs off; the weights are the very same again. Open sessions cannot go on.

        Raises:
            ValueError: there is none.
        """
        from worldsim.lora import unload_lora

        unload_lora(self.transformer)
        self._begin_anew()

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep the models on the CPU; whichever is called is alone on the device.

        Each block moves the transformer and the decoder there and back, and neither works while
        the other does: for clips rather than for live streams. Open sessions cannot go on.

        Raises:
            ValueError: where the device is not there, or for a world that is compiled, or
                offloaded already.
        """
        from worldsim.offload import Turns

        place = self._offloadable(device)
        turns = Turns(place)
        for model in self._models().values():
            turns.take(model)
        self._offloaded_to(place)

    def enable_group_offload(
        self,
        device: torch.device | str = "cuda",
        num_blocks_per_group: int = 1,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Keep the transformer's layers on the CPU, and each group of them on the device only while
        it is computed; the text encoder is there only while it reads, the decoder always. Open
        sessions cannot go on.

        Args:
            num_blocks_per_group: layers that come and go together (diffusers calls them blocks).
            use_stream: bring the next layer while this one is computed (CUDA), one at a time.
            record_stream, low_cpu_mem_usage: see diffusers' `apply_group_offloading`.

        Raises:
            ValueError: as `enable_model_cpu_offload`, or for options that do not go together.
        """
        from worldsim.offload import Turns, offload_layers

        place = self._offloadable(device)
        if num_blocks_per_group < 1:
            raise ValueError(f"num_blocks_per_group must be 1 or more, got {num_blocks_per_group}")
        offload_layers(
            self.transformer, place, num_blocks_per_group=num_blocks_per_group,
            use_stream=use_stream, record_stream=record_stream,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )  # fmt: skip
        models = self._models()
        if TEXT in models:
            Turns(place).take(models[TEXT], stays=False)
        if DECODER in models:
            torch.nn.Module.to(models[DECODER], place)
        self._offloaded_to(place)

    def _offloadable(self, device: torch.device | str) -> torch.device:
        place = check_device(device)
        if self.offloaded:
            raise ValueError(
                "this world is offloaded already: load it anew to offload it otherwise"
            )
        if self.forward is not self.transformer:
            raise ValueError(
                "a compiled world is not offloaded: load it anew, and do not compile it"
            )
        return place

    def _offloaded_to(self, place: torch.device) -> None:
        self.offloaded = True
        self.device = place
        self.commit = self.transformer.commit  # the one that is hooked
        self._begin_anew()

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention kernel; ``native`` needs nothing. Open new sessions after it.

        Raises:
            ValueError: for a kernel that does not run here, naming those that exist.
        """
        self.transformer.set_attention_backend(name)
        self.attention = name

    def compile(self, **options: Any) -> None:
        """Compile the denoise and commit passes, each once; ``options`` go to `torch.compile`.

        Sessions with quantised pages run as before: see `worldsim.rollout.compiled`.

        Raises:
            ValueError: for an offloaded world.
        """
        if self.offloaded:
            raise ValueError("an offloaded world is not compiled: its weights come and go")
        self.forward = compiled(self.transformer, **options)
        self.commit = compiled(self.transformer.commit, **options)

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
        if self.autoencoder is not None:
            height, width = self.autoencoder.latent_size(*size)
        elif size[0] % SPACE or size[1] % SPACE:
            raise ValueError(f"picture size {size[0]}×{size[1]} must be a multiple of {SPACE}")
        else:
            height, width = size[0] // SPACE, size[1] // SPACE
        self.transformer.grid(height, width)
        return (1, self.transformer.config.in_channels, frames, height, width)

    def text(self, prompt: str) -> TextRows:
        """Cross-attention K/V of a prompt, computed once for each prompt.

        Warns of words that this world passes over because it does not know them.

        Raises:
            ValueError: if the prompt has no word that this world knows, or it has no text encoder.
        """
        if self.text_encoder is None:
            raise ValueError(
                "this world has no text encoder: give prompt_embeds, or load it with base= "
                "(a Wan2.1 folder)"
            )
        if prompt not in self._texts:
            with torch.inference_mode():
                rows = self.text_encoder.encode(prompt)
                self._texts[prompt] = self.transformer.encode_prompt(rows)
            while len(self._texts) > PROMPTS_KEPT:
                self._texts.popitem(last=False)
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

    @torch.inference_mode()
    def text_of(self, embeds: Tensor) -> TextRows:
        """The same of a text encoder's rows ``[1, T, text_dim]``, padded here with zeros.

        Raises:
            ValueError: for another shape, or more rows than the world's text length.
        """
        length = self.config.text_length if self.text_encoder is None else self.text_encoder.length
        width = self.transformer.config.text_dim
        if embeds.ndim != 3 or embeds.shape[0] != 1 or embeds.shape[2] != width:
            raise ValueError(f"prompt_embeds must be [1, T, {width}], got {list(embeds.shape)}")
        missing = length - embeds.shape[1]
        if missing < 0:
            raise ValueError(f"prompt_embeds has {embeds.shape[1]} rows, more than {length}")
        padded = torch.nn.functional.pad(embeds, (0, 0, 0, missing))
        return self.transformer.encode_prompt(padded.to(self.device, self.dtype))

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
            raise ValueError("give a prompt or prompt_embeds, not both")
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
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        noise: Noise | None = None,
        given: Tensor | None = None,
        pictures: Any = None,
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
            prompt_embeds, negative_prompt_embeds: rows of a text encoder ``[1, T, text_dim]``, in
                place of a prompt.
            noise: ``noise(block, step, shape)`` in place of the seed's: step 0 is what a block is
                made of, step s what is added before pass s.
            given: clean latents ``[1, C, F, h, w]`` that the stream begins with, whole blocks of
                them. Where a single frame is left over, it is a first block of its own.
            pictures: the same as pictures: one, or a video of whole blocks, see `read_pictures`.

        Raises:
            ValueError: for what this world cannot do.
        """
        if window is not ... or sink is not None or positions is not None:
            cache = self._windowed(cache, window, sink, positions)
        size = (height or self.config.height, width or self.config.width)
        self.latents_of(size, 1)
        if pictures is not None:
            if given is not None:
                raise ValueError("give latents or pictures, not both")
            given = self.encoded(read_pictures(pictures, size))
        if given is not None and independent_first_frame is None:
            left_over = given.shape[2] % self.config.block_frames
            independent_first_frame = True if left_over == 1 else None
        own = self.settings(seed, steps, cache, schedule)
        alone = independent_first_frame
        settings = replace(
            own,
            size=size,
            guidance=own.guidance if guidance is None else guidance,
            negative_prompt=own.negative_prompt if negative_prompt is None else negative_prompt,
            independent_first_frame=own.independent_first_frame if alone is None else alone,
        )
        frames = 0 if given is None else given.shape[2]
        if (frames - settings.independent_first_frame) % self.config.block_frames and frames:
            raise ValueError(
                f"given latents have {frames} frames, which are no whole blocks of "
                f"{self.config.block_frames}"
            )
        asked = self.ask(settings, prompt, prompt_embeds, negative_prompt_embeds)
        session = Session(self, settings, asked, noise)
        while given is not None and given.shape[2]:
            count = session.block_frames
            session.given.append(session.give(given[:, :, :count]))
            given = given[:, :, count:]
        return session

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

    def _windowed(
        self,
        line: str | None,
        window: int | EllipsisType | None,
        sink: int | None,
        positions: str | None,
    ) -> str:
        """A cache line out of the field's words for it."""
        if line is not None:
            raise ValueError("give a cache line, or window, sink and positions, not both")
        own = self.config.cache_config()
        said = {"sink": own.sink if sink is None else sink}
        if window is ...:
            read = None if own.recent is None else own.sink + own.recent + self.config.block_frames
        else:
            read = window
        fields = [f"{name}={value}" for name, value in said.items()]
        fields.append("recent=all" if read is None else f"window={read}")
        fields.append(f"positions={positions or own.positions}")
        return ",".join(fields)

    def settings(
        self,
        seed: int = 0,
        steps: int | None = None,
        cache: str | None = None,
        schedule: str | None = None,
    ) -> Settings:
        """What a session is opened with: the world's own settings, but for what is given."""
        listed, sampler = self.config.sampling(steps, schedule)
        kept = self.config.cache_config(cache)
        check_form(kept, self.actions.camera)
        return Settings(
            seed=seed,
            schedule=listed,
            cache=kept,
            sampler=sampler,
            dtype=str(self.dtype).removeprefix("torch."),
            attention=self.attention,
            size=(self.config.height, self.config.width),
            guidance=self.config.guidance,
            negative_prompt=self.config.negative_prompt,
            independent_first_frame=self.config.independent_first_frame,
        )

    def memory_report(self, cache: str | None = None) -> MemoryReport:
        """Bytes that a session with this cache would ever hold; nothing is allocated for it.

        Raises:
            ValueError: for a cache that cannot be, or that this world does not support.
        """
        settings = self.settings(cache=cache)
        pool = self.pool_of(settings.size)
        return self.memory_of(settings, Context(pool, settings.cache, self.actions.camera))

    def memory_of(
        self, settings: Settings, context: Context, scratch: int | None = None
    ) -> MemoryReport:
        """The same of a session's context, whose view takes ``scratch`` bytes."""
        tensors = (
            tensor
            for model in self._models().values()
            for tensor in (*model.parameters(), *model.buffers())
        )
        shape = self.latents_of(settings.size, self.config.block_frames)
        decoder = self.autoencoder
        carry = 0 if decoder is None else decoder.carry_nbytes(*shape[-2:])
        weights = sum(map(nbytes, tensors))
        return report(context, shape, weights, carry, scratch, settings.rows)

    def stream(
        self,
        prompt: str | None = None,
        controls: str | Sequence[Keys] | None = None,
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
    ) -> Iterator[Block]:
        """Blocks of a new session, one by one, for ever or ``blocks`` many.

        Args:
            prompt: one prompt, or several over time (``red brick[4s] | night[4s]``).
            controls: a script or held keys of each latent frame from the second on (the first is a
                single picture, which nothing moves). After its end nothing is held; None plays the
                world's own script over and over.
            decoding: False leaves ``block.frames`` empty for the caller to decode.
            on_step: sees every denoise cell and its predicted clean latents.
            schedule: a sampler and its step list, see `WorldConfig.sampling`.
            guidance, negative_prompt: see `session`.
            pictures: that it begins with, see `session`; they are its first blocks.

        Everything is checked at the call, before the first block.
        """
        if blocks is not None and blocks < 1:
            raise ValueError(f"a stream needs at least one block, got {blocks}")
        script = self.script(prompt, controls)
        self.settings(seed, steps, cache, schedule)
        size = (self.config.height, self.config.width)
        given = None if pictures is None else self.encoded(read_pictures(pictures, size))
        opened = partial(
            self.session, script.prompt(0), seed, steps, cache, schedule,
            guidance=guidance, negative_prompt=negative_prompt, given=given,
        )  # fmt: skip
        return self._blocks(opened, script, blocks, decoding, on_step)

    def script(
        self, prompt: str | None = None, controls: str | Sequence[Keys] | None = None
    ) -> Script:
        """Prompts and controls over time as `stream` takes them.

        Raises:
            ValueError: for what this world does not know.
        """
        segments = parse_prompts(
            self.config.prompt if prompt is None else prompt, self.latents_per_second
        )
        for segment in segments:
            self.text(segment.prompt)
        wanted = self.config.controls if controls is None else controls
        if isinstance(wanted, str):
            keys = self.actions.parse(wanted)
        else:
            keys = tuple(self.actions.resolve(held) for held in wanted)
        return Script(segments, keys, repeated=controls is None)

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
    ) -> Iterator[Block]:
        with opened() as session:
            for block in session.given:
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
            guidance_scale, negative_prompt: see `session`.
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

        count = self.blocks_for(num_frames, None if image is None else True)
        blocks = self.stream(
            prompt, controls, seed, count, num_inference_steps, cache,
            decoding=output_type != "latent", on_step=on_step, guidance=guidance_scale,
            negative_prompt=negative_prompt, pictures=image,
        )  # fmt: skip
        hidden = bool(self._progress.get("disable"))
        console = Console(stderr=True)
        made = list(progress_track(blocks, "blocks", count, console=console, disable=hidden))
        if output_type == "latent":
            return WorldOutput(torch.cat([block.latents for block in made], dim=2))
        return WorldOutput(
            as_output(np.concatenate([b.frames for b in made])[:num_frames], output_type)
        )

    def _models(self) -> Mapping[str, Any]:
        models = {TRANSFORMER: self.transformer, DECODER: self.autoencoder, TEXT: self.text_encoder}
        return {name: model for name, model in models.items() if model is not None}


def _path(source: str | Path | None) -> Path | None:
    return None if source is None else Path(source)
