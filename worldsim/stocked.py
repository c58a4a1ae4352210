"""What the sessions of a world share: page pools, prompts that were read, and its sizes."""

from threading import Lock

import torch
from torch import Tensor

from worldsim.actions import ActionSpec
from worldsim.bundle import check_numbers
from worldsim.cache.pool import PagePool, PageShape
from worldsim.config import Settings, WorldConfig
from worldsim.fingerprint import fingerprint
from worldsim.loaded import Loaded
from worldsim.models.autoencoder import (
    GROUP,
    SPACE,
    Autoencoder,
    Decoder,
    from_pictures,
    latent_size,
)
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.words import TextEncoder
from worldsim.prompts import Prompts, TextRows
from worldsim.quantize import nbytes
from worldsim.state import Asked

NOT_BOTH = "give a prompt or prompt_embeds, not both"


class Stocked(Loaded):
    """What `worldsim.world.World` opens sessions on; see the module docstring.

    Attributes:
        latent_shape: of a block of the world's own size, ``[1, C, F, h, w]``.
        grid: rows and columns of tokens of a latent frame.
        warned_of: rules of schedules that it has warned of, since it was not trained for them.
    """

    def __init__(
        self,
        config: WorldConfig,
        transformer: CausalWanTransformer3DModel,
        autoencoder: Decoder | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__(config, transformer, autoencoder, text_encoder)
        self._fingerprint: str | None = None
        self.warned_of: set[str] = set()
        self._pools: dict[tuple[int, int], PagePool] = {}
        self._pools_lock = Lock()  # streams may run on threads of their own
        self._texts = Prompts()
        self._check_fit()
        self.latent_shape = self.latents_of(config.size, config.block_frames)
        self.grid = transformer.grid(*self.latent_shape[-2:])

    def _check_fit(self) -> None:
        """Whether the models fit each other."""
        config, takes, parts = self.config, self.transformer.config, {}
        if self.autoencoder is not None:
            parts["channels of a latent"] = (self.autoencoder.latent_channels, takes.in_channels)
        if self.text_encoder is not None:
            parts["width of a word"] = (self.text_encoder.text_dim, takes.text_dim)
        parts["length of an action"] = (self.actions.dim, takes.action_dim)
        parts["length of a ray"] = (self.actions.ray_dim, takes.ray_dim)
        if config.actions is not None:
            parts["pictures moved by a control"] = (config.actions.pictures, GROUP)
        for what, (given, taken) in parts.items():
            if given != taken:
                raise ValueError(
                    f"world {config.name!r}: {what} is {given}, but the models take {taken}"
                )

    def _begin_anew(self) -> None:
        """Open sessions are told so when they go on."""
        self._fingerprint = None
        with self._pools_lock:
            self._pools.clear()
        self._texts.clear()

    @property
    def actions(self) -> ActionSpec:
        """The world's controls; a world without any has an empty spec."""
        return self.config.actions or ActionSpec(keys=())

    @property
    def pool(self) -> PagePool:
        """The page pool of pictures of the world's own size."""
        return self.pool_of(self.config.size)

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
        check_numbers("prompt_embeds", embeds)
        one = embeds.ndim == 3 and embeds.shape[0] == 1 and embeds.shape[1] > 0
        if not one or embeds.shape[2] != width:
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

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all its models."""
        return sum(
            nbytes(tensor)
            for model in self._models().values()
            for tensor in (*model.parameters(), *model.buffers())
        )

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
