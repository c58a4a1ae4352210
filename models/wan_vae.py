"""The VAE of the Wan family (diffusers' `AutoencoderKLWan`) as a stream with an explicit carry.

diffusers keeps the causal convolutions' memory in the model, and forgets it after each clip. Here
it is handed in and out instead: the model holds no state, any number of streams share it, and a
clip can be cut anywhere. Its tiling and slicing play no part here.

Shapes: B clips, T latent frames, P pictures (1 + group·(T-1) from the start of a stream, group·T
later), C latent channels; H, W pixels, h, w latent pixels.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
    WanUpsample,
    patchify,
    unpatchify,
)
from torch import Tensor, nn

from worldsim.models.autoencoder import Carry, latent_size
from worldsim.models.weights import load_model

# A carry is here what diffusers calls a feature cache: of each causal convolution, in the order of
# the pass, the newest one or two frames that it saw, [B, c, 1…2, h, w]; or diffusers' mark "Rep",
# where the first latent frame of a stream went by without being doubled in time.


class WanAutoencoder(nn.Module):
    """See the module docstring.

    Args:
        vae: the model; with or without patches (Wan2.2 and Wan2.1).

    Attributes:
        latent_channels: channels of a latent frame.
        group: pictures in a latent frame.
        space: pixels to a latent pixel, along each side.

    Raises:
        ValueError: if the latents' statistics do not have one number for each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        config = vae.config
        self.vae = vae
        self.latent_channels: int = config.z_dim
        self.patch: int = config.patch_size or 1
        # Counted, for nothing in diffusers holds scale_factor_… of the config to the structure.
        self.group: int = 2 ** sum(config.temperal_downsample)
        self.space: int = self.patch * 2 ** (len(config.dim_mult) - 1)
        for name in ("mean", "std"):
            numbers = torch.tensor(getattr(config, f"latents_{name}"), dtype=vae.dtype)
            if numbers.shape != (self.latent_channels,):
                given = numbers.numel()
                raise ValueError(f"latents_{name} has {given} numbers, not {self.latent_channels}")
            self.register_buffer(name, numbers.to(vae.device), persistent=False)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of a latent frame for pictures of ``height × width``.

        Raises:
            ValueError: if `space` does not divide the size.
        """
        return latent_size(height, width, self.space)

    def carry_nbytes(self, height: int, width: int) -> int:
        """Bytes that decoding a stream of ``height × width`` latent pixels carries along, from its
        second latent frame on."""
        decoder = self.vae.decoder
        numbers, side = 0, 1
        for part in (decoder.conv_in, decoder.mid_block, *decoder.up_blocks, decoder.conv_out):
            modules = list(part.modules())
            numbers += sum(
                (module.kernel_size[0] - 1) * module.in_channels * (side * height) * (side * width)
                for module in modules
                if isinstance(module, WanCausalConv3d)
            )
            # A block grows in space at its very end, after all of its causal convolutions.
            side *= 2 if any(isinstance(module, WanUpsample) for module in modules) else 1
        return numbers * self.mean.dtype.itemsize

    def encode(self, pictures: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]:
        """Encode the next pictures of a stream, one latent frame at a time.

        Args:
            pictures: ``[B, 3, P, H, W]`` in -1…1; P = 1 + group·n where ``carry`` is None, else
                group·n.
            carry: what the previous call returned; None at the beginning.

        Returns:
            normalised latents ``[B, C, T, h, w]`` (the middle of the posterior) and the new carry.

        Raises:
            ValueError: if P does not fill whole latent frames, or `space` does not divide the size.
        """
        self.latent_size(*pictures.shape[-2:])
        first, count = carry is None, pictures.shape[2]
        if count < 1 or (count - first) % self.group:
            rule = (
                f"1 + {self.group}·n at the beginning of a stream" if first else f"{self.group}·n"
            )
            raise ValueError(f"{count} pictures do not fill latent frames: give {rule}")
        sizes = [1] * first + [self.group] * (count // self.group)
        latents = []
        for group in patchify(pictures.to(self.mean.dtype), self.patch).split(sizes, dim=2):
            x, carry = _run(self.vae.encoder, group, carry)
            mean, _ = self.vae.quant_conv(x).chunk(2, dim=1)  # the other half is the variance
            latents.append(mean)
        return self.normalised(torch.cat(latents, dim=2)), carry

    def decode(self, latents: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]:
        """Decode the next latent frames of a stream, one at a time.

        Args:
            latents: normalised, ``[B, C, T, h, w]``.
            carry: what the previous call returned; None at the beginning.

        Returns:
            pictures ``[B, 3, P, H, W]``, clamped to -1…1, and the new carry.

        Raises:
            ValueError: if there is no latent frame, or it has not C channels.
        """
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or not latents.shape[2]:
            given, wanted = list(latents.shape), f"[B, {self.latent_channels}, T ≥ 1, h, w]"
            raise ValueError(f"latents {given} must be {wanted}")
        pictures = []
        for frame in self.denormalised(latents).split(1, dim=2):
            x = self.vae.post_quant_conv(frame)
            x, carry = _run(self.vae.decoder, x, carry, first_chunk=carry is None)
            pictures.append(unpatchify(x, self.patch).clamp(-1, 1))
        return torch.cat(pictures, dim=2), carry

    def normalised(self, z: Tensor) -> Tensor:
        """``[B, C, T, h, w]`` → zero mean, unit variance in each channel."""
        return (z - self.mean[:, None, None, None]) / self.std[:, None, None, None]

    def denormalised(self, latents: Tensor) -> Tensor:
        """The inverse of `normalised`, in the model's dtype."""
        z = latents.to(self.mean.dtype)
        return z * self.std[:, None, None, None] + self.mean[:, None, None, None]

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the VAE as diffusers does; `load_vae` and diffusers read it."""
        self.vae.save_pretrained(folder, **options)


def load_vae(folder: Path, dtype: torch.dtype = torch.float32) -> WanAutoencoder:
    """The VAE in a diffusers folder (``config.json`` and one safetensors file).

    Raises:
        ValueError: a file is missing, truncated, of another model, or has NaN in it.
    """
    return WanAutoencoder(load_model(AutoencoderKLWan, folder, dtype))


def _run(coder: nn.Module, x: Tensor, carry: Carry, **options: Any) -> tuple[Tensor, Carry]:
    """One pass of an encoder or decoder, with the carry before and after it."""
    if carry is None:
        # More slots than the pass uses: some causal convolutions see no other frame.
        slots: list[Any] = [None] * sum(isinstance(m, WanCausalConv3d) for m in coder.modules())
    else:
        slots = list(carry)  # the pass replaces entries of its list, but writes into no tensor
    used = [0]
    y = coder(x, feat_cache=slots, feat_idx=used, **options)
    return y, tuple(slots[: used[0]])
