"""The reference's semantics once more, out of tests/golden/README.md alone: an oracle for tests.

One row, plain torch, the original names of the weights, the cache arithmetic of its section 5 token
by token. Nothing here is shared with the code it judges, and nothing is fast. Section and trap
numbers are those of that file.

Shapes: C channels, F frames, h × w tokens of a frame, N = F·h·w tokens, D width, T text rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
Noise = Callable[[int, int, int], Tensor]  # (frame in ``noise``, how many, step) -> [1, C, n, H, W]
EPS = 1e-6


@dataclass(frozen=True)
class Setup:
    """What a case is run with; frames count latent frames.

    Attributes:
        window: with the sink and the block itself; None: everything.
        packed: keys lie unrotated and are turned anew in each call, by their slots in the window.
        alone: the first frame is a block of its own.
        context_noise: timestep of the context pass.
    """

    heads: int = 2
    text_rows: int = 16
    block: int = 3
    window: int | None = None
    sink: int = 0
    packed: bool = False
    alone: bool = False
    context_noise: float = 0.0
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0


@dataclass
class Store:
    """Keys and values of one layer, ``[tokens, D]``, and the two counters of section 5."""

    k: Tensor
    v: Tensor
    end: int = 0  # G, absolute
    fill: int = 0  # L


class Reference:
    """A clip in the making. ``most``: frames that are kept where there is no window."""

    def __init__(
        self, weights: Weights, setup: Setup, prompt: Tensor, each: int = 24, most: int = 30
    ) -> None:
        self.weights, self.setup = weights, setup
        self.layers = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks."))
        kept = (each * (setup.window or most), len(weights["patch_embedding.bias"]))
        self.stores = [Store(torch.zeros(kept), torch.zeros(kept)) for _ in range(self.layers)]
        rows = torch.zeros(setup.text_rows, prompt.shape[2])
        rows[: prompt.shape[1]] = prompt[0]  # padding is attended (trap 10)
        text = F.gelu(self.linear(rows, "text_embedding.0"), approximate="tanh")
        self.text = self.linear(text, "text_embedding.2")

    # --- section 4: a rollout -----------------------------------------------------------------
    def rollout(self, noise: Noise, blocks: int, given: Tensor | None = None) -> Tensor:
        """Given frames and so many made blocks, ``[1, C, frames, H, W]``."""
        done: list[Tensor] = []
        start, drawn = 0, 0
        while given is not None and start < given.shape[2]:
            n = self.frames_at(start)
            block = given[:, :, start : start + n]
            self.net(block, [0.0] * n, start)  # t = 0, whatever the context noise
            done.append(block)
            start += n
        sigmas, timesteps = schedule(self.setup.shift)
        listed = torch.cat((timesteps, torch.zeros(1)))[[1000 - s for s in self.setup.steps]]
        levels = [(float(t), sigmas[(timesteps - t).abs().argmin()]) for t in listed]
        for _ in range(blocks):
            n = self.frames_at(start)
            x = noise(drawn, n, 0)
            for k, (t, sigma) in enumerate(levels):
                flow = self.net(x, [t] * n, start)
                x0 = (x.double() - sigma.double() * flow.double()).to(x.dtype)
                if k + 1 < len(levels):
                    after = levels[k + 1][1]
                    x = (1 - after) * x0 + after * noise(drawn, n, k + 1)
            self.net(x0, [self.setup.context_noise] * n, start)
            done.append(x0)
            start, drawn = start + n, drawn + n
        return torch.cat(done, dim=2)

    def frames_at(self, start: int) -> int:
        return 1 if self.setup.alone and start == 0 else self.setup.block

    # --- section 4: the network ---------------------------------------------------------------
    def net(self, x: Tensor, t: Sequence[float], start: int) -> Tensor:
        """Flow of a block ``[1, C, F, H, W]`` whose first frame has index ``start``."""
        w = self.weights
        frames, h, wd = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        tokens = [
            x[0, :, f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1)  # (c, ph, pw)
            for f in range(frames) for i in range(h) for j in range(wd)
        ]  # fmt: skip
        y = torch.stack(tokens) @ w["patch_embedding.weight"].flatten(1).T
        y = y + w["patch_embedding.bias"]
        e = F.silu(self.linear(sinusoid(t), "time_embedding.0"))
        e = self.linear(e, "time_embedding.2")  # [F, D]
        e0 = self.linear(F.silu(e), "time_projection.1").unflatten(1, (6, -1))
        each = h * wd
        for i in range(self.layers):
            m = (w[f"blocks.{i}.modulation"] + e0).repeat_interleave(each, 0).unbind(1)
            y = self.layer(y, m, i, start, (frames, h, wd))
        shift, scale = (w["head.modulation"] + e[:, None]).repeat_interleave(each, 0).unbind(1)
        y = self.linear(plain_norm(y) * (1 + scale) + shift, "head.head")
        out = torch.empty_like(x)
        for n, row in enumerate(y):
            f, i, j = n // each, n % each // wd, n % wd
            patch = row.view(2, 2, -1).permute(2, 0, 1)  # from (ph, pw, c)
            out[0, :, f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch
        return out

    def layer(
        self, x: Tensor, m: tuple[Tensor, ...], i: int, start: int, shape: tuple[int, int, int]
    ) -> Tensor:
        name = f"blocks.{i}."
        own, cross = name + "self_attn.", name + "cross_attn."
        y = plain_norm(x) * (1 + m[1]) + m[0]
        q = self.normed(y, own + "q", own + "norm_q")
        k = self.normed(y, own + "k", own + "norm_k")
        y = self.attend(*self.remembered(i, q, k, self.linear(y, own + "v"), start, shape))
        x = x + self.linear(y, own + "o") * m[2]
        gain, bias = (self.weights[f"{name}norm3.{part}"] for part in ("weight", "bias"))
        q = self.normed(plain_norm(x) * gain + bias, cross + "q", cross + "norm_q")
        k = self.normed(self.text, cross + "k", cross + "norm_k")
        y = self.attend(q, k, self.linear(self.text, cross + "v"))
        x = x + self.linear(y, cross + "o")
        y = self.linear(plain_norm(x) * (1 + m[4]) + m[3], name + "ffn.0")
        return x + self.linear(F.gelu(y, approximate="tanh"), name + "ffn.2") * m[5]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def normed(self, x: Tensor, projection: str, norm: str) -> Tensor:
        """RMS over the full width, before the heads are split (trap 8)."""
        y = self.linear(x, projection)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        return y * self.weights[f"{norm}.weight"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (self.setup.heads, -1)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    # --- section 5: what is remembered --------------------------------------------------------
    def remembered(
        self, i: int, q: Tensor, k: Tensor, v: Tensor, start: int, shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write a block's keys and values; returns turned queries, and the keys and values that
        they see."""
        frames, h, w = shape
        each, n = h * w, frames * h * w
        setup, store = self.setup, self.stores[i]
        if not setup.packed:
            q, k = self.turned(q, start, h, w), self.turned(k, start, h, w)
        end, size, sink = start * each + n, len(store.k), setup.sink * each
        fill = store.fill + (end - store.end)
        if setup.window is not None and end > store.end and store.fill + n > size:
            evict = store.fill + n - size
            keep = store.fill - evict - sink
            for x in (store.k, store.v):
                x[sink : sink + keep] = x[sink + evict : sink + evict + keep].clone()
            fill -= evict
        store.k[fill - n : fill], store.v[fill - n : fill] = k, v
        store.fill, store.end = fill, end
        k, v = store.k[:fill], store.v[:fill]
        if setup.packed:  # slots 0, 1, … of the window
            q, k = self.turned(q, (fill - n) // each, h, w), self.turned(k, 0, h, w)
        return q, k, v

    def turned(self, x: Tensor, first: int, h: int, w: int) -> Tensor:
        """RoPE of whole frames ``[N, D]`` from frame ``first`` on, pair by pair (trap 9)."""
        n = torch.arange(len(x), dtype=torch.float64)
        place = (first + n // (h * w), n % (h * w) // w, n % w)
        m = x.shape[1] // self.setup.heads // 2
        angles = []
        for at, pairs in zip(place, (m - 2 * (m // 3), m // 3, m // 3), strict=True):
            j = torch.arange(pairs, dtype=torch.float64)
            angles.append(at[:, None] * 10000.0 ** (-j / pairs))
        turn = torch.polar(torch.ones(len(x), m, dtype=torch.float64), torch.cat(angles, dim=1))
        pairs = torch.view_as_complex(x.double().reshape(len(x), self.setup.heads, m, 2))
        return torch.view_as_real(pairs * turn[:, None]).reshape(x.shape).to(x.dtype)


def schedule(shift: float) -> tuple[Tensor, Tensor]:
    """σ and timesteps of section 6."""
    s = torch.linspace(1, 0, 1001)[:-1]
    sigmas = shift * s / (1 + (shift - 1) * s)
    return sigmas, 1000 * sigmas


def sinusoid(t: Sequence[float]) -> Tensor:
    """In float64, cosines first (trap 5)."""
    w = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = torch.tensor(t, dtype=torch.float64)[:, None] * w
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def plain_norm(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + EPS)
