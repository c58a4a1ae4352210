"""What players do: key sequences and theme changes to train on, one per latent frame.

A walk is a chain of behaviours, each a script of up to three phases (keys held for some latent
frames), drawn anew when the last one ends. Exploring alone looks where it goes. The mixture makes
memory pay: many scripts leave a view and come back to it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from worldsim.maze.simulator import (
    KEYS,
    PICTURES_PER_LATENT,
    SPEED,
    TURN,
    MazeMaps,
    advance,
    clearance,
    trajectory,
)
from worldsim.maze.themes import ATTRIBUTES

Tensor = torch.Tensor

HELD_OUT = 2**31
"""Seeds from here on are for evaluation only."""
TRAIN_SEEDS = range(0, HELD_OUT)

W, S, A, D, J, L = range(len(KEYS))
LATENT_TURN = PICTURES_PER_LATENT * TURN  # radians
LATENT_STEP = PICTURES_PER_LATENT * SPEED  # cells
HALF_TURN = round(math.pi / LATENT_TURN)  # latent frames
ROOM = 0.45  # cells: how near to a wall's face a scripted way out may end


@dataclass(frozen=True)
class Walk:
    """keys bool [B, N, 6] per latent frame (those of frame 0 move nothing) and the poses
    [B, 1 + 4 * (N - 1), 3] of every picture."""

    keys: Tensor
    poses: Tensor


@dataclass(frozen=True)
class Behaviour:
    """Up to four phases of held keys; lower-case letters are the drawn side ('j', 'a') and the
    other one ('l', 'd'). `first` and `second` are ranges of lengths in latent frames; with
    `mirror` the third and fourth phases last as long as the first two, else they are empty.
    `ahead`: the first phase walks on, so it is cut to the free way. `drill` is its weight among
    walks that hold single keys."""

    weight: float
    phases: tuple[str, ...]
    first: tuple[int, int]
    second: tuple[int, int] = (0, 0)
    mirror: bool = False
    ahead: bool = False
    drill: float = 0.0


ABOUT = (HALF_TURN, HALF_TURN)
EXPLORE = 0  # the first behaviour chooses its own keys
RANDOM = 1  # the second holds a random combination
BEHAVIOURS = (
    Behaviour(0.34, (), first=(6, 24), drill=0.1),
    Behaviour(0.14, (), first=(1, 4), drill=0.05),
    Behaviour(0.07, ("W", "j", "W", "j"), (2, 10), ABOUT, mirror=True, ahead=True),  # there, back
    Behaviour(0.06, ("W", "j"), (2, 10), ABOUT, ahead=True),
    Behaviour(0.12, ("W", "", "S", ""), (2, 10), (0, 2), mirror=True, ahead=True),  # back up
    Behaviour(0.15, ("j", "", "l", ""), (2, 10), (0, 3), mirror=True),  # look away and back
    Behaviour(0.04, ("j",), first=(2 * HALF_TURN, 2 * HALF_TURN)),  # look all round
    Behaviour(0.14, ("a", "", "d", ""), (1, 4), (0, 2), mirror=True, drill=0.1),
    Behaviour(0.02, ("",), first=(1, 5)),
    Behaviour(0.04, ("Wj", "W"), (1, 4), (1, 3)),
    Behaviour(0.0, ("W",), (2, 8), ahead=True, drill=0.2),
    Behaviour(0.0, ("S",), (2, 8), drill=0.2),
    Behaviour(0.0, ("j",), (2, 8), drill=0.2),
    Behaviour(0.0, ("",), (1, 6), drill=0.05),
    Behaviour(0.0, ("Wj",), (2, 6), drill=0.1),
    Behaviour(0.0, ("Sj",), (2, 6), drill=0.05),
)
PHASES = 4


def _scripts() -> Tensor:
    """Keys bool [behaviours, 2 sides, PHASES, 6]; the sides mirror each other."""
    table = torch.zeros(len(BEHAVIOURS), 2, PHASES, len(KEYS), dtype=torch.bool)
    both = {"W": W, "S": S}
    sides = (both | {"j": J, "l": L, "a": A, "d": D}, both | {"j": L, "l": J, "a": D, "d": A})
    for row, behaviour in enumerate(BEHAVIOURS):
        for side, names in enumerate(sides):
            for phase, held in enumerate(behaviour.phases):
                table[row, side, phase, [names[letter] for letter in held]] = True
    return table


def _between(span: tuple[int, int], share: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers of the closed range `span`, by shares in 0..1."""
    return (span[0] + np.floor(share * (span[1] - span[0] + 1))).astype(np.int64)


@dataclass(frozen=True)
class Deck:
    """A fresh behaviour for every row and latent frame, used where the last one has ended: kind
    and side int [B, N], lengths int [B, N, 2] of the first phases, random keys bool [B, N, 6]."""

    kind: Tensor
    side: Tensor
    lengths: Tensor
    keys: Tensor


def _deck(batch: int, frames: int, seed: int, device: torch.device, drilled: bool) -> Deck:
    random = np.random.Generator(np.random.Philox(key=[seed, 0]))
    weights = np.array([b.drill if drilled else b.weight for b in BEHAVIOURS])
    bounds = (weights / weights.sum()).cumsum()[:-1]
    kind = np.searchsorted(bounds, random.random((batch, frames)))
    side = random.integers(0, 2, (batch, frames))
    share = random.random((batch, frames, 2))
    lengths = np.empty((batch, frames, 2), dtype=np.int64)
    for row, behaviour in enumerate(BEHAVIOURS):
        for phase, span in enumerate((behaviour.first, behaviour.second)):
            lengths[kind == row, phase] = _between(span, share[kind == row, phase])
    keys = random.random((batch, frames, len(KEYS))) < np.array([0.5, 0.2, 0.2, 0.2, 0.3, 0.3])
    return Deck(*(torch.from_numpy(part).to(device) for part in (kind, side, lengths, keys)))


def walks(mazes: MazeMaps, start: Tensor, frames: int, seed: int, drilled: bool = False) -> Walk:
    """Walk every map from start [B, 3] for `frames` latent frames; deterministic in `seed`.
    `drilled`: mostly single keys, held for a second or two, wherever that leads.

    Raises ValueError for fewer than one frame."""
    if frames < 1:
        raise ValueError(f"a walk has at least one latent frame, not {frames}")
    device, row = start.device, torch.arange(len(mazes), device=start.device)
    deck = _deck(len(mazes), frames, seed, device, drilled)
    scripts = _scripts().to(device)
    kind, side = torch.zeros_like(row), torch.zeros_like(row)
    noise = torch.zeros_like(deck.keys[:, 0])
    ends = torch.zeros(len(mazes), PHASES, dtype=torch.long, device=device)  # last frame of each
    keys, poses = torch.zeros_like(deck.keys), [start]
    for n in range(1, frames):
        view = clearance(mazes, poses[-1], start.new_tensor(LOOKS))
        new = n > ends[:, -1]
        new_kind, lengths = _plan(deck.kind[:, n], deck.lengths[:, n], view[:, 0])
        kind = torch.where(new, new_kind, kind)
        side = torch.where(new, deck.side[:, n], side)
        noise = torch.where(new[:, None], deck.keys[:, n], noise)
        ends = torch.where(new[:, None], n - 1 + lengths.cumsum(1), ends)
        phase = (n > ends[:, :-1]).sum(1)
        held = torch.where((kind == RANDOM)[:, None], noise, scripts[kind, side, phase])
        explored = _explore(view, side, keys[:, n - 1])
        held = torch.where((kind == EXPLORE)[:, None], explored, held)
        keys[:, n] = held
        for _ in range(PICTURES_PER_LATENT):
            poses.append(advance(mazes, poses[-1], held))
    return Walk(keys, torch.stack(poses, dim=1))


def homing(mazes: MazeMaps, start: Tensor, frames: int, seed: int) -> Walk:
    """Walks that leave their start and come back to its very pose, over and over: turned away by
    some angle, a few steps on where that is free, and all of it undone in reverse, or a full turn;
    between two excursions a moment at home. Deterministic in `seed`."""
    random = np.random.Generator(np.random.Philox(key=[seed, 2]))
    keys = torch.zeros(len(mazes), frames, len(KEYS), dtype=torch.bool)
    trip = torch.zeros(len(mazes), frames, dtype=torch.long)  # number of the excursion
    for row in range(len(mazes)):
        n = 1
        while n < frames:
            trip[row, n:] += 1
            for held, length in _excursion(random):
                keys[row, n : n + length, list(held)] = True
                n += length
    keys = keys.to(start.device)
    while True:
        # Where steps ended at a wall, undoing them leads elsewhere: that excursion only turns.
        poses = trajectory(mazes, start, keys)
        away = (poses[:, ::PICTURES_PER_LATENT, :2] - start[:, None, :2]).abs().amax(-1).cpu()
        lost = (away > NEAR_HOME) & ~keys[..., [W, S]].any(-1).cpu() & _turned_home(keys).cpu()
        if not lost.any():
            return Walk(keys, poses)
        for row in lost.any(1).nonzero()[:, 0].tolist():
            first = trip[row, int(lost[row].long().argmax())]
            keys[row, trip[row] == first, :2] = False


NEAR_HOME = 1e-2  # cells


def _turned_home(keys: Tensor) -> Tensor:
    """Latent frames that end at the first heading, bool [B, N]."""
    turns = (keys[..., L].long() - keys[..., J].long()).cumsum(1)
    return turns % (2 * HALF_TURN) == 0


def _excursion(random: np.random.Generator) -> list[tuple[tuple[int, ...], int]]:
    """Held keys and for how many latent frames."""
    there, back = ((J,), (L,)) if random.random() < 0.5 else ((L,), (J,))
    pause = ((), int(random.integers(0, 3)))
    if random.random() < 0.3:
        return [(there, 2 * HALF_TURN), pause]
    turn, walk = int(random.integers(2, HALF_TURN + 3)), int(random.integers(0, 4))
    return [(there, turn), ((W,), walk), ((S,), walk), (back, turn), pause]


def _plan(kind: Tensor, lengths: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
    """Fit behaviours [B] to the free way `ahead`: kinds [B] and lengths of all phases [B, 4]."""
    walks_on = kind.new_tensor([behaviour.ahead for behaviour in BEHAVIOURS]).bool()[kind]
    mirror = kind.new_tensor([behaviour.mirror for behaviour in BEHAVIOURS])[kind]
    free = ((ahead - ROOM) / LATENT_STEP).floor().long()
    first = torch.where(walks_on, torch.minimum(lengths[:, 0], free), lengths[:, 0])
    second = lengths[:, 1]
    # No room for two steps: explore for a while instead.
    crowded = first < torch.where(walks_on, 2, 0)
    first = torch.where(crowded, 4, first)
    plan = torch.stack([first, second, first * mirror, second * mirror], dim=1)
    plan[:, 1:] *= ~crowded[:, None]
    return torch.where(crowded, EXPLORE, kind), plan


# Where an explorer looks, off its heading: ahead, one turn and two turns each way, and the sides.
LOOKS = (
    0.0,
    -LATENT_TURN,
    LATENT_TURN,
    -2 * LATENT_TURN,
    2 * LATENT_TURN,
    -math.pi / 2,
    math.pi / 2,
)


def _explore(view: Tensor, side: Tensor, before: Tensor) -> Tensor:
    """Keys bool [B, 6] for clearances [B, 7] at LOOKS, the row's `side` (0 left, 1 right) that
    breaks ties, and the keys held `before` [B, 6].

    Walk on while the way is open, bend towards a clearly longer view, and turn on the spot where a
    wall is near: towards the wider side, and then no longer to and fro."""
    ahead, left, right = view[:, 0], view[:, 1], view[:, 2]
    turning = ~before[:, W] & (before[:, J] ^ before[:, L])
    blocked = ahead < torch.where(turning, 1.6, 1.2)
    wide_left = torch.maximum(view[:, 3], view[:, 5])
    wide_right = torch.maximum(view[:, 4], view[:, 6])
    unsure = (wide_left - wide_right).abs() < 0.6
    go_left = torch.where(unsure, side == 0, wide_left > wide_right)
    go_left = torch.where(turning, before[:, J], go_left)
    bend = torch.maximum(left, right) > 1.5 * ahead + 0.5
    bend_left = bend & (left > right)
    keys = torch.zeros_like(before)
    keys[:, W] = ~blocked
    keys[:, J] = torch.where(blocked, go_left, bend_left)
    keys[:, L] = torch.where(blocked, ~go_left, bend & ~bend_left)
    return keys


def theme_track(batch: int, frames: int, seed: int, switch_probability: float = 0.3) -> Tensor:
    """Theme indices int64 [batch, frames, 4] per latent frame.

    Constant, except that a share `switch_probability` of the rows changes 1 to 4 attributes at a
    random latent frame >= 1. Raises ValueError for a probability outside 0..1."""
    if not 0 <= switch_probability <= 1:
        raise ValueError(f"switch_probability must lie in 0..1, not {switch_probability}")
    random = np.random.Generator(np.random.Philox(key=[seed, 1]))
    counts = np.array([len(words) for words in ATTRIBUTES])
    before = random.integers(0, counts, (batch, 4))
    moves = random.integers(1, counts, (batch, 4))  # never a whole round: the word does change
    order = random.random((batch, 4)).argsort(1).argsort(1)
    changed = order < random.integers(1, 5, (batch, 1))
    after = np.where(changed, (before + moves) % counts, before)
    when = random.integers(1, max(frames, 2), (batch, 1))
    when = np.where(random.random((batch, 1)) < switch_probability, when, frames)
    late = np.arange(frames)[None] >= when
    return torch.from_numpy(np.where(late[..., None], after[:, None], before[:, None]))


def per_picture(track: Tensor) -> Tensor:
    """Spread [B, N, ...] over pictures: latent frame 0 is one, each other four."""
    later = track[:, 1:].repeat_interleave(PICTURES_PER_LATENT, dim=1)
    return torch.cat([track[:, :1], later], dim=1)
