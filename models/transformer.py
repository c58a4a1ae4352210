"""The causal video DiT: Wan2.1's architecture, attending block by block through a context.

Parameter names are those of diffusers' `WanTransformer3DModel`, so its checkpoints load as they
are; ``action_embedder`` and ``ray_embedder`` exist only where ``action_dim`` and ``ray_dim`` are
set. The model holds no cache, no schedule and no positions: what self-attention reads is handed in
(`worldsim.models.context`).

Shapes: R rows, C channels, F latent frames, H × W latent pixels, N = F·h·w tokens of width
D = heads · head_dim, T text rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from worldsim.models.attention import NATIVE, attention, check_backend
from worldsim.models.context import Attends, Rows
from worldsim.models.embedders import FIXED_ROWS, ConditionEmbedder
from worldsim.models.norms import AffineNorm, RMSNorm, add_gated, modulated_norm
from worldsim.models.packed import Linear, unpack


@dataclass(frozen=True)
class Conditioning:
    """What a forward pass is conditioned on, computed before it.

    Attributes:
        text_keys, text_values: cross-attention K/V of P prompts, one ``[P, heads, T, head_dim]``
            per layer (see `CausalWanTransformer3DModel.encode_prompt`).
        prompt: which prompt each frame reads, int ``[R, F]``; None where row r reads prompt r.
        actions: action vector of each latent frame, ``[R, F, action_dim]``, or None.
        rays: where each column of tokens looks from and to, ``[R, F, w, ray_dim]``, or None. Alike
            rays have alike keys, so that a place is found again by its bearing (as camera models
            do with Plücker rays).
    """

    text_keys: tuple[Tensor, ...]
    text_values: tuple[Tensor, ...]
    prompt: Tensor | None = None
    actions: Tensor | None = None
    rays: Tensor | None = None

    def text(self, layer: int) -> "Text":
        return Text(self.text_keys[layer], self.text_values[layer], self.prompt)


class Text(NamedTuple):
    """What one layer reads of the prompts; see `Conditioning`."""

    keys: Tensor
    values: Tensor
    prompt: Tensor | None


class Attention(nn.Module):
    """Projections of one attention: RMS norm over all heads, then the split into heads."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.backend = NATIVE
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def queries(self, x: Tensor) -> Tensor:
        return self._split(self.norm_q(self.to_q(x)))

    def keys(self, x: Tensor) -> Tensor:
        return self._split(self.norm_k(self.to_k(x)))

    def values(self, x: Tensor) -> Tensor:
        return self._split(self.to_v(x))

    def out(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GELUProjection(nn.Module):
    """First half of the feed-forward network; the name ``proj`` is diffusers'."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.proj, Linear):
            return self.proj.with_gelu(x)
        return F.gelu(self.proj(x), approximate="tanh")  # with a LoRA beside it


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(dim, inner), nn.Identity(), Linear(inner, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class Layer(nn.Module):
    """One transformer layer; ``norm2`` is the affine norm before cross-attention (as diffusers)."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, cross_attn_norm: bool, eps: float):
        super().__init__()
        self.attn1 = Attention(dim, heads, eps)
        self.attn2 = Attention(dim, heads, eps)
        self.norm2 = AffineNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.eps = eps

    def modulation(self, m: Tensor) -> tuple[Tensor, ...]:
        """Per-frame (shift, scale, gate) of attention and of the feed-forward network."""
        return (self.scale_shift_table + m).unbind(2)

    def projected(self, x: Tensor, m: Tensor, asked: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (where they are asked for), keys and values: all that the layer leaves behind."""
        shift, scale, *_ = self.modulation(m)
        y = modulated_norm(x, shift, scale, self.eps)
        queries = self.attn1.queries(y) if asked else None
        return queries, self.attn1.keys(y), self.attn1.values(y)

    def forward(
        self, x: Tensor, m: Tensor, index: int, text: Text, context: Attends, stage: bool
    ) -> Tensor:
        """``x [R, N, D]``, ``m [R, F, 6, D]`` → ``[R, N, D]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(m)
        y = modulated_norm(x, shift1, scale1, self.eps)
        q, k, v = self.attn1.queries(y), self.attn1.keys(y), self.attn1.values(y)
        if stage:
            context.stage(index, q if context.asks else None, k, v)
        y = self.attn1.out(context.attend(index, q, k, v))
        x = add_gated(x, y, gate1)
        x = x + self.read_text(self.norm2(x), text, frames=m.shape[1])
        y = self.ffn(modulated_norm(x, shift2, scale2, self.eps))
        return add_gated(x, y, gate2)

    def end_fused(
        self, x: Tensor, m: Tensor, index: int, text: Text, contexts: Sequence[Attends]
    ) -> Tensor:
        """The last layer of a `fused` pass: the first row ends with what it leaves behind, and the
        second goes on, ``[1, N, D]``."""
        finished, ahead = contexts
        text = Text(text.keys[1:], text.values[1:], None)
        # As functions: where layers are offloaded, this call brings the weights, for both.
        finished.stage(index, *Layer.projected(self, x[:1], m[:1], finished.asks))
        return Layer.forward(self, x[1:], m[1:], index, text, ahead, stage=False)

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention K/V of prompts ``[P, T, D]``, each ``[P, heads, T, head_dim]``."""
        # One head after the other, as attention reads them, many times.
        return self.attn2.keys(text).contiguous(), self.attn2.values(text).contiguous()

    def read_text(self, y: Tensor, text: Text, frames: int) -> Tensor:
        q = self.attn2.queries(y)
        k, v, prompt = text
        if prompt is None:
            return self.attn2.out(attention(q, k, v, backend=self.attn2.backend))
        # Frames with prompts of their own are rows of their own.
        rows = q.shape[0]
        which = prompt.flatten()
        q = rearrange(q, "r h (f s) d -> (r f) h s d", f=frames)
        y = attention(q, k[which], v[which], backend=self.attn2.backend)
        return self.attn2.out(rearrange(y, "(r f) h s d -> r h (f s) d", r=rows))


class CausalWanTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the flow (noise minus clean latent) of a block, given its context.

    The config is that of diffusers' `WanTransformer3DModel`, plus ``action_dim`` and ``ray_dim``
    (0: none).
    """

    # Lists, since diffusers' loader wants lists.
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "time_embedder", "action_embedder", "scale_shift_table", "norm2",
    ]  # fmt: skip
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        action_dim: int = 0,
        ray_dim: int = 0,
    ) -> None:
        super().__init__()
        del rope_max_seq_len, pos_embed_seq_len  # there is no table here; kept for the configs
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm must be 'rms_norm_across_heads', got {qk_norm!r}")
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError(
                "image cross-attention (image_dim, added_kv_proj_dim) is not supported"
            )
        if patch_size[0] != 1:
            raise ValueError(f"patch_size must start with 1 (one latent frame), got {patch_size}")
        dim = num_attention_heads * attention_head_dim
        _, patch_height, patch_width = patch_size
        patch = (1, patch_height, patch_width)
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, action_dim)
        self.blocks = nn.ModuleList(
            Layer(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        self.proj_out = Linear(dim, out_channels * patch_height * patch_width)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.ray_embedder = nn.Linear(ray_dim, dim, bias=False) if ray_dim else None

    @property
    def layers(self) -> Sequence[Layer]:
        """The transformer layers; diffusers calls them blocks, a word that is taken here."""
        return self.blocks  # type: ignore[return-value]  # a ModuleList does not say of what

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens of one latent frame of ``height × width`` latent pixels.

        Raises:
            ValueError: if the patch does not divide the size.
        """
        _, ph, pw = self.config.patch_size
        if height % ph or width % pw:
            raise ValueError(f"latent size {height}×{width} is not a multiple of patch {ph}×{pw}")
        return height // ph, width // pw

    def set_attention_backend(self, backend: str) -> None:
        """Kernel of the text attention; self-attention's is its context's own."""
        dtype = self.proj_out.weight.dtype
        check_backend(backend, self.device, dtype, self.config.attention_head_dim)
        for layer in self.layers:
            layer.attn2.backend = backend

    def fuse_lora(self, *args: Any, **options: Any) -> None:
        """See diffusers; it writes into the weights behind torch's back."""
        super().fuse_lora(*args, **options)
        unpack(self)

    def unfuse_lora(self, *args: Any, **options: Any) -> None:
        """See diffusers."""
        super().unfuse_lora(*args, **options)
        unpack(self)

    def encode_prompt(self, embeds: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Cross-attention K/V of prompts, once per prompt.

        Args:
            embeds: text-encoder rows ``[P, T, text_dim]``, already padded: padding is attended.

        Returns:
            keys and values, one ``[P, heads, T, head_dim]`` per layer.
        """
        text = self.condition_embedder.text_embedder(embeds)
        # Layer by layer: where layers are offloaded, each comes once.
        pairs = [layer.encode_text(text) for layer in self.layers]
        return tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        contexts: Attends | Sequence[Attends],
        stage: bool = False,
    ) -> Tensor:
        """Flow of each row's frames; the context is only read.

        Args:
            latents: noisy latents ``[R, C, F, H, W]``.
            timestep: level of each frame as a timestep in 0…1000, float ``[R, F]``.
            conditioning: text K/V and actions.
            contexts: one context for each row, or one that answers for all rows.
            stage: have the context note the keys and values of these noisy frames as well, the
                by-product that some schedules read in place of a context pass.

        Returns:
            flow ``[R, C, F, H, W]``.
        """
        x, e, m, context = self._embed(latents, timestep, conditioning, contexts)
        return self.flow(self.through(x, m, conditioning, context, stage), e, latents)

    # The parts of `forward`, for ranks that have some of the layers each.
    def modulation(self, timestep: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Embedding ``[R, F, D]`` and modulation ``[R, F, 6, D]`` of levels and actions."""
        return self.condition_embedder(timestep, conditioning.actions)

    def tokens(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """What the first layer takes, ``[R, N, D]``."""
        x = self._patchify(latents)
        if self.ray_embedder is not None and conditioning.rays is not None:
            x = x + self._rays(conditioning.rays, latents)
        return x

    def through(
        self, x: Tensor, m: Tensor, conditioning: Conditioning, context: Attends, stage: bool
    ) -> Tensor:
        """All layers that are here: ``[R, N, D] → [R, N, D]``."""
        for index, layer in enumerate(self.layers):
            x = layer(x, m, index, conditioning.text(index), context, stage)
        return x

    def flow(self, x: Tensor, e: Tensor, latents: Tensor) -> Tensor:
        """What the last layer gives, as a flow of the shape of ``latents``."""
        shift, scale = (self.scale_shift_table + e[:, :, None]).unbind(2)
        x = self.proj_out(modulated_norm(x, shift, scale, self.config.eps))
        return self._unpatchify(x, latents)

    def keep_layers(self, layers: range) -> None:
        """Drop all layers but these; they are numbered anew."""
        self.blocks = nn.ModuleList(self.blocks[index] for index in layers)
        self.register_to_config(num_layers=len(layers))

    def commit(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        contexts: Attends | Sequence[Attends],
    ) -> None:
        """The context pass: stage what finished blocks leave behind, layer by layer.

        It ends with the last layer's projections, since nobody reads what would come after.
        Arguments as in `forward`.
        """
        x, _, m, context = self._embed(latents, timestep, conditioning, contexts)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if index < last:
                x = layer(x, m, index, conditioning.text(index), context, stage=True)
            else:
                context.stage(index, *layer.projected(x, m, context.asks))

    def fused(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        contexts: Sequence[Attends],
    ) -> Tensor:
        """`commit` of the first row and `forward` of the second, which may read what the first one
        leaves behind: one pass over the weights in place of two.

        Args:
            latents: a finished block and a noisy one, ``[2, C, F, H, W]``; the others alike.
            conditioning: of a prompt for each.
            contexts: that of each, asked in this order in every layer.

        Returns:
            flow of the second row, ``[1, C, F, H, W]``.
        """
        x, e, m, both = self._embed(latents, timestep, conditioning, contexts)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if index < last:
                x = layer(x, m, index, conditioning.text(index), both, stage=True)
        x = self.layers[last].end_fused(x, m, last, conditioning.text(last), contexts)
        return self.flow(x, e[1:], latents[1:])

    def _embed(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        contexts: Attends | Sequence[Attends],
    ) -> tuple[Tensor, Tensor, Tensor, Attends]:
        context = Rows(contexts) if isinstance(contexts, Sequence) else contexts
        e, m = self.modulation(timestep, conditioning)
        return self.tokens(latents, conditioning), e, m, context

    def _rays(self, rays: Tensor, latents: Tensor) -> Tensor:
        """``[R, F, w, ray_dim] → [R, N, D]``: every token of a column looks along one ray."""
        assert self.ray_embedder is not None
        height, _ = self.grid(*latents.shape[-2:])
        rows = rays.to(self.ray_embedder.weight.dtype).flatten(0, 2)
        # As for levels: training has no bits to keep, and one chunk for all rows is faster.
        size = len(rows) if self.training else FIXED_ROWS
        padded = F.pad(rows, (0, 0, 0, -len(rows) % size))
        told = torch.cat([self.ray_embedder(chunk) for chunk in padded.split(size)])[: len(rows)]
        columns = told.unflatten(0, rays.shape[:3])
        return repeat(columns, "r f w d -> r (f h w) d", h=height)

    def _patchify(self, latents: Tensor) -> Tensor:
        # A convolution whose kernel is its stride is one matrix product.
        weight = self.patch_embedding.weight
        _, ph, pw = self.config.patch_size
        x = rearrange(
            latents.to(weight.dtype), "r c f (h a) (w b) -> r (f h w) (c a b)", a=ph, b=pw
        )
        return F.linear(x, weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, x: Tensor, like: Tensor) -> Tensor:
        _, ph, pw = self.config.patch_size
        _, _, frames, height, width = like.shape
        return rearrange(
            x, "r (f h w) (a b c) -> r c f (h a) (w b)",
            f=frames, h=height // ph, w=width // pw, a=ph, b=pw,
        )  # fmt: skip
