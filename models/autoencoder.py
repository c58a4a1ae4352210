"""The small causal autoencoder: pictures ↔ latents, as a stream with an explicit carry.

The first picture alone makes the first latent frame, every later latent frame holds four pictures;
space shrinks 8×8. All convolutions are two-dimensional; time enters only through blocks that also
see their own input of the previous latent frame (the design of TAEHV). That memory is the whole
state of a stream, so a clip can be cut anywhere.

Shapes: B clips, T latent frames, P pictures (1 + 4·(T-1) from the start of a stream, 4·T later),
C latent channels.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 4  # pictures in a latent frame
SPACE = 8  # pixels to a latent pixel, along each side

# What a stream remembers, here each memory block's input at the newest latent frame,
# [B, 1, c, h, w]. None is the beginning of a stream.
Carry = tuple[Any, ...] | None


class Decoder(Protocol):
    """Anything that turns latents into pictures as a stream; see `CausalAutoencoder`'s methods.

    Attributes:
        latent_channels: channels of a latent frame.
    """

    latent_channels: int

    def latent_size(self, height: int, width: int) -> tuple[int, int]: ...

    def carry_nbytes(self, height: int, width: int) -> int: ...

    def decode(self, latents: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]: ...


@runtime_checkable
class Autoencoder(Decoder, Protocol):
    """A decoder that can also read pictures."""

    def encode(self, pictures: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]: ...


def latent_size(height: int, width: int, space: int) -> tuple[int, int]:
    """Size of a latent frame for pictures of ``height × width``, ``space`` pixels to each side of a
    latent pixel.

    Raises:
        ValueError: if ``space`` does not divide the size.
    """
    if height % space or width % space or min(height, width) <= 0:
        raise ValueError(f"picture size {height}×{width} must be a multiple of {space}")
    return height // space, width // space


class MemoryBlock(nn.Module):
    """Residual block over the current and the previous latent frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """``x [B, T, c, h, w]``, ``past [B, 1, c, h, w]`` → ``[B, T, c, h, w]``."""
        before = torch.cat((past, x[:, :-1]), dim=1)
        y = torch.cat((x, before), dim=2).flatten(0, 1)
        y = self.conv2(F.silu(self.conv1(F.silu(y))))
        return x + y.unflatten(0, x.shape[:2])


class Frames(nn.Module):
    """A two-dimensional module applied to every latent frame alike."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.each = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class CausalAutoencoder(ModelMixin, ConfigMixin):
    """Encoder and decoder; see the module docstring.

    Args:
        latent_channels: channels of a latent frame.
        widths: channels at 1/8, 1/4 and 1/2 of the picture's size.
        depths: memory blocks at each of these sizes.
        latents_mean, latents_std: per-channel statistics; latents are handed out normalised.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 8,
        widths: Sequence[int] = (112, 80, 48),
        depths: Sequence[int] = (2, 2, 1),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        deep, middle, fine = widths
        pixels = 3 * GROUP * 4  # a group of pictures, 2×2 pixels folded into channels
        self.encoder = nn.ModuleList([
            Frames(nn.PixelUnshuffle(2), nn.Conv2d(pixels, fine, 3, padding=1)),
            *(MemoryBlock(fine) for _ in range(depths[2])),
            Frames(nn.Conv2d(fine, middle, 4, stride=2, padding=1)),
            *(MemoryBlock(middle) for _ in range(depths[1])),
            Frames(nn.Conv2d(middle, deep, 4, stride=2, padding=1)),
            *(MemoryBlock(deep) for _ in range(depths[0])),
            Frames(nn.SiLU(), nn.Conv2d(deep, latent_channels, 3, padding=1)),
        ])  # fmt: skip
        self.decoder = nn.ModuleList([
            Frames(nn.Conv2d(latent_channels, deep, 3, padding=1)),
            *(MemoryBlock(deep) for _ in range(depths[0])),
            Frames(nn.Conv2d(deep, 4 * middle, 1), nn.PixelShuffle(2)),
            *(MemoryBlock(middle) for _ in range(depths[1])),
            Frames(nn.Conv2d(middle, 4 * fine, 1), nn.PixelShuffle(2)),
            *(MemoryBlock(fine) for _ in range(depths[2])),
            Frames(nn.SiLU(), nn.Conv2d(fine, pixels, 3, padding=1), nn.PixelShuffle(2)),
        ])  # fmt: skip
        self.register_buffer("mean", _statistics(latents_mean, 0.0, latent_channels), False)
        self.register_buffer("std", _statistics(latents_std, 1.0, latent_channels), False)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of a latent frame for pictures of ``height × width``.

        Raises:
            ValueError: if 8 does not divide the size.
        """
        return latent_size(height, width, SPACE)

    def carry_nbytes(self, height: int, width: int) -> int:
        """Bytes that decoding a stream of ``height × width`` latent pixels carries along."""
        numbers = sum(
            depth * channels * (side * height) * (side * width)
            for depth, channels, side in zip(
                self.config.depths, self.config.widths, (1, 2, 4), strict=True
            )
        )
        return numbers * self.mean.dtype.itemsize

    def encode(self, pictures: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]:
        """Encode the next pictures of a stream, one latent frame at a time.

        Args:
            pictures: ``[B, 3, P, H, W]`` in -1…1; P = 1 + 4·n where ``carry`` is None, else 4·n.
            carry: what the previous call returned; None at the beginning.

        Returns:
            normalised latents ``[B, C, T, H/8, W/8]`` and the new carry.

        Raises:
            ValueError: if P does not fill whole latent frames, or 8 does not divide the size.
        """
        self.latent_size(*pictures.shape[-2:])
        groups = _group(pictures, first=carry is None)
        latents = []
        for group in groups.split(1, dim=1):  # always one by one: bits do not depend on chunking
            z, carry = _run(self.encoder, group, carry)
            latents.append(z)
        return self.normalised(torch.cat(latents, dim=1)), carry

    def decode(self, latents: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]:
        """Decode the next latent frames of a stream, one at a time.

        Args:
            latents: normalised, ``[B, C, T, h, w]``.
            carry: what the previous call returned; None at the beginning.

        Returns:
            pictures ``[B, 3, P, 8h, 8w]`` (about -1…1, not clamped) and the new carry.
        """
        pictures = []
        for frame in self.denormalised(latents).split(1, dim=1):
            first = carry is None
            group, carry = _run(self.decoder, frame, carry)
            pictures.append(_ungroup(group, first))
        return torch.cat(pictures, dim=2), carry

    def encode_clip(self, pictures: Tensor) -> Tensor:
        """A whole clip in one pass, un-normalised latents ``[B, T, C, h, w]`` (training)."""
        return _run(self.encoder, _group(pictures, first=True), None)[0]

    def decode_clip(self, latents: Tensor) -> Tensor:
        """The inverse of `encode_clip`, ``[B, 3, P, H, W]`` (training)."""
        return _ungroup(_run(self.decoder, latents, None)[0], first=True)

    def normalised(self, z: Tensor) -> Tensor:
        """``[B, T, C, h, w]`` → zero mean, unit variance, ``[B, C, T, h, w]``."""
        z = (z - self.mean[:, None, None]) / self.std[:, None, None]
        return z.transpose(1, 2)

    def denormalised(self, latents: Tensor) -> Tensor:
        """The inverse of `normalised`, in the model's dtype."""
        z = latents.transpose(1, 2).to(self.mean.dtype)
        return z * self.std[:, None, None] + self.mean[:, None, None]


def to_pictures(decoded: Tensor) -> Tensor:
    """Decoder output ``[1, 3, P, H, W]`` → uint8 ``[P, H, W, 3]``."""
    pixels = ((decoded[0].float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    return rearrange(pixels, "c p h w -> p h w c").contiguous()


def from_pictures(pictures: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 ``[..., P, H, W, 3]`` → ``[..., 3, P, H, W]`` in -1…1."""
    return rearrange(pictures, "... p h w c -> ... c p h w").to(dtype) / 127.5 - 1


def _run(stages: nn.ModuleList, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
    memories: Iterator[Tensor] | None = None if carry is None else iter(carry)
    kept = []
    for stage in stages:
        if isinstance(stage, MemoryBlock):
            past = torch.zeros_like(x[:, :1]) if memories is None else next(memories)
            kept.append(x[:, -1:])
            x = stage(x, past)
        else:
            x = stage(x)
    return x, tuple(kept)


def _group(pictures: Tensor, first: bool) -> Tensor:
    """``[B, 3, P, H, W]`` → ``[B, T, 3·4, H, W]``; a stream's first picture fills its group."""
    count = pictures.shape[2]
    if count < 1 or (count - first) % GROUP:
        rule = f"1 + {GROUP}·n at the beginning of a stream" if first else f"{GROUP}·n"
        raise ValueError(f"{count} pictures do not fill latent frames: give {rule}")
    if first:
        pictures = torch.cat((pictures[:, :, :1].expand(-1, -1, GROUP - 1, -1, -1), pictures), 2)
    return rearrange(pictures, "b c (t g) h w -> b t (c g) h w", g=GROUP)


def _ungroup(groups: Tensor, first: bool) -> Tensor:
    pictures = rearrange(groups, "b t (c g) h w -> b c (t g) h w", g=GROUP)
    return pictures[:, :, GROUP - 1 :] if first else pictures


def _statistics(values: Sequence[float] | None, default: float, channels: int) -> Tensor:
    return torch.full((channels,), default) if values is None else torch.tensor(values)
