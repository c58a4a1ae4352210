"""What of a world one of several ranks needs."""

from dataclasses import dataclass

from worldsim.schedule import Schedule
from worldsim.wavefront import check_ranks, ranges


@dataclass(frozen=True)
class Share:
    """One rank's part of the work, and so of the weights.

    Attributes:
        rank, ranks: which of how many.
        steps: denoising steps that it takes; none where it only decodes.
        layers: of the transformer; None: all of them.
        decodes: it makes pictures out of latents.
        reads: it reads prompts, for all others too.
    """

    rank: int = 0
    ranks: int = 1
    steps: range = range(0)
    layers: range | None = None
    decodes: bool = True
    reads: bool = True

    @property
    def last(self) -> bool:
        return self.rank == self.ranks - 1


WHOLE = Share()


def shares(schedule: Schedule, layers: int, ranks: int) -> list[Share]:
    """How the work of a schedule is shared out: steps or layers in a row. With one rank more than
    steps the last one decodes and does nothing else.

    Raises:
        ValueError: for ranks that it cannot use.
    """
    check_ranks(schedule, ranks)
    count, last = len(schedule.steps), ranks - 1
    if schedule.order == "layers":
        if ranks > layers:
            raise ValueError(
                f"schedule: a ring over {ranks} ranks needs as many layers, and this model has "
                f"{layers}"
            )
        return [
            Share(rank, ranks, range(count), mine, rank == last, rank == 0)
            for rank, mine in enumerate(ranges(layers, ranks))
        ]
    stages = min(ranks, count)
    steps = [*ranges(count, stages), *[range(0)] * (ranks - stages)]
    return [
        Share(rank, ranks, mine, None, rank == last, rank == 0) for rank, mine in enumerate(steps)
    ]
