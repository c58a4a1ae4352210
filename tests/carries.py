"""Clips in parts, a carry from one to the next: what the tests ask of each autoencoder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from worldsim.models.autoencoder import Autoencoder, Carry, Decoder


def picture_cuts(cuts: Sequence[int]) -> list[int]:
    """Pictures of each call: 4 for every latent frame, the very first has one."""
    return [4 * count - 3 * (i == 0) for i, count in enumerate(cuts)]


def decoded(model: Decoder, z: Tensor, cuts: Sequence[int]) -> tuple[Tensor, Carry]:
    """All pictures of ``z``, so many latent frames a call, and what is remembered in the end."""
    carry: Carry = None
    parts = []
    for part in z.split(list(cuts), dim=2):
        shown, carry = model.decode(part, carry)
        parts.append(shown)
    assert [part.shape[2] for part in parts] == picture_cuts(cuts)
    return torch.cat(parts, dim=2), carry


def encoded(model: Autoencoder, clip: Tensor, cuts: Sequence[int]) -> tuple[Tensor, Carry]:
    """All latents of a clip, so many latent frames a call, and what is remembered in the end."""
    carry: Carry = None
    parts = []
    for part in clip.split(picture_cuts(cuts), dim=2):
        z, carry = model.encode(part, carry)
        parts.append(z)
    assert [part.shape[2] for part in parts] == list(cuts)
    return torch.cat(parts, dim=2), carry


def check_streams_apart(
    model: Autoencoder, clips: Sequence[Tensor], codes: Sequence[Tensor]
) -> None:
    """Streams that take turns, frame by frame, come out as each does alone."""
    encoding: list[Carry] = [None for _ in clips]
    decoding: list[Carry] = [None for _ in codes]
    coded: list[list[Tensor]] = [[] for _ in clips]
    shown: list[list[Tensor]] = [[] for _ in codes]
    for frame in range(codes[0].shape[2]):
        for stream, (clip, code) in enumerate(zip(clips, codes, strict=True)):
            first = 4 * frame - 3 if frame else 0
            part = clip[:, :, first : 4 * frame + 1]
            z, encoding[stream] = model.encode(part, encoding[stream])
            coded[stream].append(z)
            x, decoding[stream] = model.decode(code[:, :, frame : frame + 1], decoding[stream])
            shown[stream].append(x)
    for stream, (clip, code) in enumerate(zip(clips, codes, strict=True)):
        assert torch.equal(torch.cat(coded[stream], dim=2), model.encode(clip)[0])
        assert torch.equal(torch.cat(shown[stream], dim=2), model.decode(code)[0])
