"""The training recipes as plain data: for each world, one preset for a CPU and one for a GPU."""

from dataclasses import dataclass, field, replace

TOKEN = 16  # pixels along a side of a token: 8×8 a latent pixel, 2×2 of these a token


@dataclass(frozen=True)
class Fit:
    """How one stage is fitted.

    Attributes:
        steps: optimiser steps in all.
        batch: clips in a step, on each rank.
        frames: latent frames in a clip.
        muon, adam: peak learning rates of matrices and of everything else.
        warmup: steps to the peak; the rate falls linearly to zero over the last half.
        ema: decay of the averaged weights that are kept in the end.
    """

    steps: int
    batch: int
    frames: int
    muon: float = 0.01
    adam: float = 2e-3
    warmup: int = 100
    ema: float = 0.999


@dataclass(frozen=True)
class Footage:
    """Training material: walks of ``frames`` latent frames through ``maps`` new maps a batch."""

    maps: int
    frames: int
    keep: int  # batches held at once
    every: int  # steps after which the oldest batch is replaced


@dataclass(frozen=True)
class Lesson:
    """One of the fits of stage three; each goes on from the weights of the one before.

    Attributes:
        name: of its checkpoint and its curve.
        footage: walks, half of which come home over and over from ``homing_from`` on.
        drilled: the other half holds single keys, as a fork test does, instead of roaming.
        returning, switching: shares of clips that come back to what they remember, and in which the
            theme changes; see `worldsim.maze.clips`.
        generations: how many times over an own context may have been made, each time out of the one
            before; every number up to it is as likely.
        criticism: weight of the critic's opinion.
        rays_from, alone_from, homing_from: steps from which tokens are told where they look, many
            clips have nothing but their memory, and walks come home. What a lesson learned when.
    """

    name: str
    fit: Fit
    footage: Footage
    drilled: bool = False
    returning: float = 0.55
    switching: float = 0.2
    generations: int = 1
    criticism: float = 0.05
    rays_from: int = 0
    alone_from: int = 0
    homing_from: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights.

    Attributes:
        name: of the world.
        size: height and width of a picture.
        autoencoder: how it is fitted; None takes that of the bundled world "maze".
        lessons: of stage three; without any it is left out.
        cache: what the world keeps unless it is told otherwise.
        latent_noise: noise on the latents that the decoder learns to forgive.
        shift: timestep shift of the noise levels.
        context_noise: largest noise share given to a clip's context.
        open_prompts_from: DiT step from which prompts leave out any share of their words.
        few_steps: denoising steps of the rollouts that stage three trains.
        start: a bundled world that the lessons go on from; stages one and two are left out.
        rule: what the lessons' frames read of earlier ones: ``clean``, or ``lag0``, which is TPP's;
            see `worldsim.schedule.Schedule.rule`.
    """

    name: str = "maze"
    seed: int = 7
    size: tuple[int, int] = (64, 64)
    autoencoder: Fit | None = field(default_factory=lambda: Fit(steps=1800, batch=6, frames=4))
    autoencoder_footage: Footage = field(default_factory=lambda: Footage(48, 40, 3, 120))
    widths: tuple[int, int, int] = (112, 80, 48)
    latent_noise: float = 0.05
    dit: Fit = field(default_factory=lambda: Fit(steps=3600, batch=6, frames=12))
    dit_footage: Footage = field(default_factory=lambda: Footage(32, 96, 3, 400))
    layers: int = 6
    heads: int = 4
    head_dim: int = 64
    ffn_dim: int = 1024
    text_dim: int = 64
    text_length: int = 16
    shift: float = 3.0
    context_noise: float = 0.2
    open_prompts_from: int = 0
    lessons: tuple[Lesson, ...] = ()
    few_steps: int = 2
    cache: str = "window=12,sink=50%"
    start: str | None = None
    rule: str = "clean"

    @property
    def columns(self) -> int:
        """Tokens across a picture."""
        return self.size[1] // TOKEN


OWN = Lesson(
    "own",
    Fit(steps=2300, batch=8, frames=12, muon=0.005, adam=1e-3),
    Footage(24, 128, 3, 200),
    rays_from=897,
    alone_from=1083,
    homing_from=1433,
)
DRILL = Lesson(
    "drill",
    Fit(steps=1800, batch=8, frames=12, muon=0.005, adam=1e-3),
    Footage(24, 128, 3, 200),
    drilled=True,
    returning=0.4,
    switching=0.35,
    generations=2,
    criticism=0.1,
)
CPU = Recipe(open_prompts_from=2167, lessons=(OWN, DRILL))
SHORT = Recipe(  # sick on purpose: it has never seen its own frames, nor more than twelve
    name="maze-short",
    autoencoder=None,
    dit=Fit(steps=2400, batch=6, frames=12),
    heads=4,
    head_dim=40,
    layers=4,
    ffn_dim=640,
    cache="sink=0,recent=11,positions=absolute",
)
GPU = Recipe(  # one H200 for half an hour; docs/maze.md says how far the bundled weights went
    autoencoder=None,
    dit=Fit(steps=3000, batch=128, frames=16),
    dit_footage=Footage(1024, 128, 2, 2000),
    lessons=(
        replace(
            DRILL,
            fit=Fit(steps=4800, batch=128, frames=18, muon=0.01, adam=1e-3),
            footage=Footage(1024, 128, 2, 2500),
            generations=4,
        ),
    ),
)
SAME_LEVEL = Recipe(  # most of an hour of one core: the bundled maze under TPP's rule
    name="maze-tpp",
    seed=11,
    start="maze",
    rule="lag0",
    lessons=(
        replace(
            DRILL,
            name="same-level",
            fit=Fit(steps=1400, batch=8, frames=12, muon=0.005, adam=1e-3, warmup=40, ema=0.995),
            footage=Footage(32, 64, 4, 50),  # of fewer walks it learns the maps by heart
        ),
    ),
)
TINY = Recipe(  # seconds, for the tests: proves the path, not the picture
    autoencoder=Fit(steps=4, batch=2, frames=3),
    autoencoder_footage=Footage(4, 8, 1, 10),
    widths=(16, 16, 16),
    dit=Fit(steps=4, batch=2, frames=4),
    dit_footage=Footage(4, 12, 1, 10),
    lessons=(Lesson("own", Fit(steps=2, batch=4, frames=4), Footage(4, 24, 1, 10), True),),
    cache="sink=1,recent=2,positions=packed",
    layers=2,
    heads=2,
    head_dim=16,
    ffn_dim=64,
    text_dim=16,
)
PRESETS = {
    "maze": {"cpu": CPU, "gpu": GPU, "tiny": TINY},
    "maze-short": {
        "cpu": SHORT,
        "gpu": SHORT,
        "tiny": replace(TINY, name="maze-short", lessons=()),
    },
    "maze-tpp": {
        "cpu": SAME_LEVEL,
        "gpu": SAME_LEVEL,
        "tiny": replace(
            SAME_LEVEL,
            start="maze-short",
            lessons=(replace(TINY.lessons[0], fit=Fit(steps=2, batch=2, frames=4)),),
        ),
    },
}
