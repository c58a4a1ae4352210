"""A tiny decoder for the latents of the Wan family (the decoder of TAEHV), as a stream.

Much cheaper than the VAE's own, and softer. Convolutions are two-dimensional; time enters through
blocks that also see their own input of the frame before, and through layers that turn one frame
into two. Those blocks' memory is the whole state of a stream, so a clip can be cut anywhere.

It takes latents as the transformer makes them, that is normalised: it was trained on these and
needs no statistics. It has no encoder.

Shapes: B clips, T latent frames, P pictures (1 + group·(T-1) from the start of a stream, group·T
later), C latent channels; H, W pixels, h, w latent pixels.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldsim.models.autoencoder import Carry, latent_size
from worldsim.models.files import mapped, unpickled
from worldsim.models.weights import cast, check_fit

BLOCKS = 3  # memory blocks at each size


class SoftClamp(nn.Module):
    """Bends values smoothly into -3…3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Residual block over the current and the previous frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """``x [B, T, c, h, w]``, ``past [B, 1, c, h, w]`` → ``[B, T, c, h, w]``."""
        before = torch.cat((past, x[:, :-1]), dim=1)
        y = self.conv(torch.cat((x, before), dim=2).flatten(0, 1))
        return F.relu(x + y.unflatten(0, x.shape[:2]))


class Grow(nn.Module):
    """Turns each frame into ``growth`` frames, side by side in time."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, growth * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w]`` → ``[n·growth, c, h, w]``."""
        return self.conv(x).unflatten(1, (-1, x.shape[1])).flatten(0, 1)


class TinyDecoder(nn.Module):
    """See the module docstring; `load_tiny_decoder` makes one from published weights.

    Args:
        latent_channels: channels of a latent frame.
        widths: channels at 1/8, 1/4, 1/2 of the picture's size, and at its size.
        growths: how many frames one becomes, at each doubling of the size; their product is the
            pictures in a latent frame.

    Attributes:
        latent_channels: channels of a latent frame.
        group: pictures in a latent frame.
        space: pixels to a latent pixel, along each side.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        widths: Sequence[int] = (256, 128, 64, 64),
        growths: Sequence[int] = (1, 2, 2),
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.group = math.prod(growths)
        self.space = 2 ** len(growths)
        # One flat list, modules without weights among it: their places are the names in the file.
        layers: list[nn.Module] = [
            SoftClamp(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU(),
        ]  # fmt: skip
        for width, following, growth in zip(widths[:-1], widths[1:], growths, strict=True):
            layers += [MemoryBlock(width) for _ in range(BLOCKS)]
            layers += [
                nn.Upsample(scale_factor=2), Grow(width, growth),
                nn.Conv2d(width, following, 3, padding=1, bias=False),
            ]  # fmt: skip
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)]
        self.decoder = nn.ModuleList(layers)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of a latent frame for pictures of ``height × width``.

        Raises:
            ValueError: if `space` does not divide the size.
        """
        return latent_size(height, width, self.space)

    def carry_nbytes(self, height: int, width: int) -> int:
        """Bytes that decoding a stream of ``height × width`` latent pixels carries along."""
        numbers, side = 0, 1
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                numbers += layer.width * (side * height) * (side * width)
            elif isinstance(layer, nn.Upsample):
                side *= 2
        return numbers * self._dtype().itemsize

    def decode(self, latents: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]:
        """Decode the next latent frames of a stream, one at a time.

        Args:
            latents: normalised, ``[B, C, T, h, w]``.
            carry: what the previous call returned (each memory block's newest input frame); None
                at the beginning.

        Returns:
            pictures ``[B, 3, P, H, W]`` in -1…1 and the new carry.

        Raises:
            ValueError: if there is no latent frame, or it has not C channels.
        """
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or not latents.shape[2]:
            given, wanted = list(latents.shape), f"[B, {self.latent_channels}, T ≥ 1, h, w]"
            raise ValueError(f"latents {given} must be {wanted}")
        pictures = []
        for frame in latents.to(self._dtype()).transpose(1, 2).split(1, dim=1):
            # The first latent frame stands for one picture, the last of its group.
            skipped = self.group - 1 if carry is None else 0
            x, carry = self._run(frame, carry)
            pictures.append(x[:, skipped:].clamp(0, 1) * 2 - 1)
        return torch.cat(pictures, dim=1).transpose(1, 2), carry

    def _run(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """One latent frame ``[B, 1, C, h, w]`` → ``[B, group, 3, H, W]``, about 0…1."""
        memories: Iterator[Tensor] | None = None if carry is None else iter(carry)
        kept = []
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                past = torch.zeros_like(x[:, :1]) if memories is None else next(memories)
                kept.append(x[:, -1:].clone())  # a view would keep the other frames alive
                x = layer(x, past)
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, (len(x), -1))
        return x, tuple(kept)

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def load_tiny_decoder(path: Path, dtype: torch.dtype = torch.float32) -> TinyDecoder:
    """A decoder from a file like the published ``taew2_1.pth`` or ``taew2_1.safetensors``.

    Channels are those of the file. Its encoder is passed over.

    Raises:
        ValueError: the file is missing, damaged, of another model, or holds more than tensors.
    """
    tensors = {
        name: tensor for name, tensor in _read(path).items() if not name.startswith("encoder.")
    }
    model = _sized_for(tensors)
    check_fit(model, tensors, path)
    model.load_state_dict(tensors)
    return cast(model.eval().requires_grad_(False), dtype)


def _sized_for(tensors: dict[str, Tensor]) -> TinyDecoder:
    try:
        first, *later = (tensors[f"decoder.{place}.weight"].shape for place in (1, 8, 14, 20))
        return TinyDecoder(first[1], (first[0], *(shape[0] for shape in later)))
    except (KeyError, IndexError):
        return TinyDecoder()  # the published sizes, which then tell what is missing


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path} must be a .pth or a .safetensors file")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    tensors = mapped(path)[0] if path.suffix == ".safetensors" else unpickled(path)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} does not hold tensors by name")
    return tensors
