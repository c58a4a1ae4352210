"""What ranks tell each other: messages of one fixed shape each, a header and a tensor.

The header carries what a block is made under; the tensor is its latents, or for a ring hidden
states. Both have one size for the whole run, so that a tick's messages and bytes never change.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from worldsim.cache.context import Event
from worldsim.controls import ControlState, Held
from worldsim.state import Applied, Asked, Change, Played
from worldsim.streaming.faults import PeerLost

HEADER = 16384  # bytes


@dataclass(frozen=True)
class Order:
    """One block, as the first rank decided it.

    Attributes:
        block: its number.
        start: absolute index of its first latent frame.
        epoch: changes of prompt, cuts, ways back and the like so far, this block's own counted in.
        played: what it is made under; None: there is none, stop.
        saves: after it, every rank writes its state into these folders.
        begun: when its first step was, as `time.time` has it.
        back: before it, every rank goes back to right before this block, which is the same.
        again: it is made once more, on the way to where one was sent back to; nobody sees it.
        kept: the blocks right before which states are kept to go back to.
    """

    block: int
    start: int
    epoch: int
    played: Played | None = None
    saves: tuple[str, ...] = ()
    begun: float = 0.0
    back: int | None = None
    again: bool = False
    kept: tuple[int, ...] = ()

    @property
    def turns(self) -> int:
        """By how much its epoch is more than that of the block before."""
        assert self.played is not None
        return len(self.played.changes) + (self.back is not None)

    def encode(self) -> bytes:
        """Raises:
        ValueError: for what no header can carry.
        """
        told: dict[str, object] = {
            "block": self.block, "start": self.start, "epoch": self.epoch, "saves": self.saves,
            "begun": self.begun, "back": self.back, "again": self.again, "kept": self.kept,
        }  # fmt: skip
        if self.played is not None:
            applied = self.played.applied
            told |= {
                "changes": [_plain(change) for change in self.played.changes],
                "controls": [state.as_dict() for state in applied.controls],
                "prompt": applied.prompt,
                "cut": applied.cut,
                "event": applied.event,
            }
        data = json.dumps(told, ensure_ascii=False).encode()
        if len(data) > HEADER - 4:
            raise ValueError(
                f"block {self.block} is asked for in {len(data)} bytes, and between ranks there is "
                f"room for {HEADER - 4}: a shorter prompt, or fewer latent frames in a block"
            )
        return data

    @classmethod
    def decode(cls, data: bytes, ask: Callable[[str], Asked]) -> "Order":
        told = json.loads(data)
        if "controls" not in told:
            return STOP
        controls = tuple(ControlState.from_dict(state) for state in told["controls"])
        applied = Applied(controls, told["prompt"], told["cut"], told["event"])
        changes: tuple[Change, ...] = tuple(
            Event(change["event"]) if "event" in change else ask(change["prompt"])
            for change in told["changes"]
        )
        played = Played(changes, Held(), applied)
        return cls(
            told["block"], told["start"], told["epoch"], played, tuple(told["saves"]),
            told["begun"], told["back"], told["again"], tuple(told["kept"]),
        )  # fmt: skip


STOP = Order(-1, -1, -1)


def _plain(change: Change) -> dict[str, str]:
    if isinstance(change, Event):
        return {"event": change.value}
    if change.embeds is not None:
        raise ValueError("between ranks a prompt goes as words: prompt_embeds need one rank")
    return {"prompt": change.prompt}


class Link:
    """A rank's messages.

    Attributes:
        sent, received: how many, for counting.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Of every message's tensor. ``device``: where the backend wants it. ``group``: of its own,
        where two ranks send both ways: NCCL does what one group is asked for in order."""
        self._group = group
        self._shape, self._dtype, self._device = shape, dtype, device
        self.sent = self.received = 0
        self._posted: dict[int, tuple[list[dist.Work], list[Tensor]]] = {}

    def send(self, to: int, header: bytes, payload: Tensor | None = None) -> None:
        """Post a message and go on; the one before it to the same rank has arrived by then.

        ``payload`` may be shorter than the shape says: the rest is whatever.

        Raises:
            PeerLost: where that rank is gone.
        """
        self.flush(to)
        head = torch.zeros(HEADER, dtype=torch.uint8)
        data = len(header).to_bytes(4, "little") + header
        head[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        body = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        if payload is not None:
            flat = payload.reshape(-1)
            body.view(-1)[: flat.numel()] = flat.to(self._device)
        try:
            works = [dist.isend(part, to, self._group) for part in (head, body)]
        except RuntimeError as error:
            raise PeerLost(f"rank {to} is gone: {error}") from None
        self._posted[to] = [work for work in works if work is not None], [head, body]
        self.sent += 1

    def receive(self, source: int) -> tuple[bytes, Tensor]:
        """The next message of a rank: its header, and its tensor (a flat one).

        Raises:
            PeerLost: where that rank is gone.
        """
        head = torch.empty(HEADER, dtype=torch.uint8)
        body = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        try:
            dist.recv(head, source, self._group)
            dist.recv(body, source, self._group)
        except RuntimeError as error:
            raise PeerLost(f"rank {source} is gone: {error}") from None
        self.received += 1
        data = head.numpy().tobytes()
        size = int.from_bytes(data[:4], "little")
        return data[4 : 4 + size], body.view(-1)

    def flush(self, to: int | None = None) -> None:
        """Wait until what was sent has arrived, at one rank or at all.

        Raises:
            PeerLost: where a rank is gone.
        """
        for rank in [to] if to is not None else list(self._posted):
            works, _ = self._posted.pop(rank, ([], []))
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                raise PeerLost(f"rank {rank} is gone: {error}") from None
