"""A world: a loaded model bundle that sessions are opened on.

A world folder holds ``world.json`` and three diffusers folders: ``transformer``, ``vae`` and
``text_encoder``. Weights, the page pool and encoded prompts are shared by all sessions.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
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
from worldsim.memory import MemoryReport, report
from worldsim.models.attention import NATIVE
from worldsim.models.autoencoder import GROUP, Carry, CausalAutoencoder
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.weights import cast, load_model
from worldsim.models.words import WordEncoder
from worldsim.output import OUTPUTS, WorldOutput, as_output
from worldsim.rollout import OnStep
from worldsim.schedule import Cell
from worldsim.script import Script
from worldsim.session import Block, Session, decode

TRANSFORMER, DECODER, TEXT = "transformer", "vae", "text_encoder"
PROMPTS_KEPT = 32

TextRows = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
OnStepEnd = Callable[["World", int, float, dict[str, Any]], Any]


class World:
    """See the module docstring; `World.from_pretrained` makes one."""

    def __init__(
        self,
        config: WorldConfig,
        transformer: CausalWanTransformer3DModel,
        autoencoder: CausalAutoencoder,
        text_encoder: WordEncoder,
    ) -> None:
        self.config = config
        self.transformer = transformer
        self.autoencoder = autoencoder
        self.text_encoder = text_encoder
        self.attention = NATIVE
        self.device = transformer.device
        self.dtype = transformer.proj_out.weight.dtype
        self.forward: Callable[..., Any] = transformer
        self.commit: Callable[..., Any] = transformer.commit
        self._progress: dict[str, Any] = {}
        self._pool: PagePool | None = None
        self._texts: OrderedDict[str, TextRows] = OrderedDict()
        height, width = autoencoder.latent_size(config.height, config.width)
        self.grid = transformer.grid(height, width)
        takes = transformer.config
        self.latent_shape = (1, takes.in_channels, config.block_frames, height, width)
        parts = {
            "channels of a latent": (autoencoder.config.latent_channels, takes.in_channels),
            "width of a word": (text_encoder.config.text_dim, takes.text_dim),
        }
        parts["length of an action"] = (self.actions.dim, takes.action_dim)
        parts["length of a ray"] = (self.actions.ray_dim, takes.ray_dim)
        if config.actions is not None:
            parts["pictures moved by a control"] = (config.actions.pictures, GROUP)
        for what, (given, taken) in parts.items():
            if given != taken:
                raise ValueError(
                    f"world {config.name!r}: {what} is {given}, but the models take {taken}"
                )

    # --- loading and saving -------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        torch_dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
    ) -> "World":
        """Load the bundled world (``"maze"``), a world folder, or a hub id.

        Args:
            source: name, path or hub id.
            torch_dtype: a dtype, or ``"auto"``: bfloat16 where the device computes in it.
            device: where to put it.

        Raises:
            ValueError: an unknown name, an incomplete folder, damaged weights.
        """
        place = check_device(device)
        folder = locate(str(source))
        config = WorldConfig.load(folder)
        dtype = auto_dtype(place) if torch_dtype == "auto" else torch_dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch_dtype must be a torch dtype or 'auto', got {torch_dtype!r}")
        world = cls(
            config,
            load_model(CausalWanTransformer3DModel, folder / TRANSFORMER, dtype),
            load_model(CausalAutoencoder, folder / DECODER, dtype),
            load_model(WordEncoder, folder / TEXT, dtype),
        )
        return world if place.type == "cpu" else world.to(place)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, model in self._models().items():
            model.save_pretrained(target / name)
        self.config.save(target)  # last: a folder without it is no world

    def to(self, *targets: torch.device | str | torch.dtype) -> "World":
        """Move and cast, as in ``world.to("cuda", torch.bfloat16)``; open sessions cannot go on.

        Raises:
            ValueError: where the device is not there; nothing has changed then.
        """
        checked = [t if isinstance(t, torch.dtype) else check_device(t) for t in targets]
        for target in checked:
            if isinstance(target, torch.dtype):
                self.dtype = target
            else:
                self.device = target
        for model in self._models().values():
            cast(model, self.dtype)
            torch.nn.Module.to(model, self.device)
        self._pool = None
        self._texts.clear()
        return self

    def set_attention_backend(self, name: str) -> None:
        """Choose the attention kernel; ``native`` needs nothing. Open new sessions after it.

        Raises:
            ValueError: for a kernel that does not run here, naming those that exist.
        """
        self.transformer.set_attention_backend(name)
        self.attention = name

    def compile(self, **options: Any) -> None:
        """Compile the denoise and commit passes, each once; ``options`` go to `torch.compile`."""
        self.forward = torch.compile(self.transformer, fullgraph=True, **options)
        self.commit = torch.compile(self.transformer.commit, fullgraph=True, **options)

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
        """The page pool, made when the first session opens."""
        if self._pool is None:
            config = self.transformer.config
            shape = PageShape(
                layers=config.num_layers,
                heads=config.num_attention_heads,
                grid=self.grid,
                head_dim=config.attention_head_dim,
            )
            self._pool = PagePool(shape, self.dtype, self.device)
        return self._pool

    def text(self, prompt: str) -> TextRows:
        """Cross-attention K/V of a prompt, computed once for each prompt.

        Warns of words that this world passes over because it does not know them.

        Raises:
            ValueError: if the prompt has no word that this world knows.
        """
        if prompt not in self._texts:
            if unknown := self.text_encoder.read(prompt).unknown:
                known = self.text_encoder.known()
                warnings.warn(
                    f"passed over {', '.join(unknown)}; this world knows {known}", stacklevel=2
                )
            ids = self.text_encoder.ids(prompt).to(self.device)
            with torch.inference_mode():
                self._texts[prompt] = self.transformer.encode_prompt(self.text_encoder(ids[None]))
            while len(self._texts) > PROMPTS_KEPT:
                self._texts.popitem(last=False)
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

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
    ) -> Session:
        """Open a live world.

        Args:
            prompt: None takes the world's own.
            seed: names the noise.
            steps: denoising steps, None for the world's own.
            cache: a cache line, see `CacheConfig.parse`, None for the world's own.
            schedule: a sampler and its step list, see `WorldConfig.sampling`.
        """
        settings = self.settings(seed, steps, cache, schedule)
        return Session(self, settings, self.config.prompt if prompt is None else prompt)

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
        )

    def memory_report(self, cache: str | None = None) -> MemoryReport:
        """Bytes that a session with this cache would ever hold; nothing is allocated for it.

        Raises:
            ValueError: for a cache that cannot be, or that this world does not support.
        """
        kept = self.config.cache_config(cache)
        return self.memory_of(Context(self.pool, kept, self.actions.camera))

    def memory_of(self, context: Context, scratch: int | None = None) -> MemoryReport:
        """The same of a session's context, whose view takes ``scratch`` bytes."""
        tensors = (
            tensor
            for model in self._models().values()
            for tensor in (*model.parameters(), *model.buffers())
        )
        carry = self.autoencoder.carry_nbytes(*self.latent_shape[-2:])
        weights = sum(tensor.nbytes for tensor in tensors)
        return report(context, self.latent_shape, weights, carry, scratch)

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

        Everything is checked at the call, before the first block.
        """
        if blocks is not None and blocks < 1:
            raise ValueError(f"a stream needs at least one block, got {blocks}")
        script = self.script(prompt, controls)
        settings = self.settings(seed, steps, cache, schedule)
        return self._blocks(settings, script, blocks, decoding, on_step)

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
            carry = decode(self.autoencoder, block, carry)
            yield block

    def _blocks(
        self,
        settings: Settings,
        script: Script,
        blocks: int | None,
        decoding: bool,
        on_step: OnStep | None,
    ) -> Iterator[Block]:
        with Session(self, settings, script.prompt(0)) as session:
            while blocks is None or session.block < blocks:
                block = session.denoise(session.follow(script), on_step)
                yield session.decode(block) if decoding else block

    def blocks_for(self, pictures: int) -> int:
        """Blocks that hold at least ``pictures`` pictures.

        Raises:
            ValueError: for less than one picture.
        """
        if pictures < 1:
            raise ValueError(f"ask for at least one picture, got {pictures}")
        latents = 1 + -(-(pictures - 1) // GROUP)
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
    ) -> WorldOutput:
        """A clip in the call shape of diffusers' video pipelines.

        Args:
            num_frames: pictures; whole blocks are made and trimmed to it.
            generator: draws the seed, if given.
            output_type: ``np`` (float ``[1, F, H, W, 3]`` in 0…1), ``pil`` (list of images),
                ``pt`` (float ``[1, F, 3, H, W]``) or ``latent`` (``[1, C, F, h, w]``).
            callback_on_step_end: called as ``callback(world, step, timestep, {"latents": x0})``;
                it only looks, what it returns is not used.
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

        count = self.blocks_for(num_frames)
        blocks = self.stream(
            prompt, controls, seed, count, num_inference_steps, cache,
            decoding=output_type != "latent", on_step=on_step,
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
        return {TRANSFORMER: self.transformer, DECODER: self.autoencoder, TEXT: self.text_encoder}
