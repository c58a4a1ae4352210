"""Worlds of the Wan2.1 family: sampling, guidance, beginnings, and folders that diffusers reads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file
from torch import Tensor

from worldsim.models.context import ClipContext
from worldsim.models.transformer import Conditioning
from worldsim.presets import NEGATIVE_PROMPT, PRESETS
from worldsim.rollout import Known
from worldsim.schedule import Cell, Schedule
from worldsim.world import World

GOLDEN = Path(__file__).parent / "golden"
SIZE = {"height": 64, "width": 96}
CELLS = list(PRESETS["self-forcing"].schedule().cells(0))


@pytest.fixture(scope="module")
def world() -> World:
    return World.from_single_file(GOLDEN / "model_sf.safetensors", preset="self-forcing")


@pytest.fixture(scope="module")
def embeds() -> Tensor:
    return load_file(GOLDEN / "inputs.safetensors")["prompt_embeds"]


def seeded(block: int, step: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * block + step)
    return torch.randn(shape, generator=generator)


class Slow:
    """The reference's rollout from nothing: the whole clip again for every pass, no cache."""

    def __init__(
        self, world: World, embeds: Tensor, window: int | None = None, sink: int = 0
    ) -> None:
        self.window, self.sink = window, sink
        self.model = world.transformer
        keys, values = world.text_of(embeds)
        self.conditioning = Conditioning(keys, values)
        self.clean: list[Tensor] = []

    @torch.inference_mode()
    def flow(self, x: Tensor, levels: list[float]) -> Tensor:
        """Flow of a block after the clean blocks before it."""
        whole = torch.cat([*self.clean, x], dim=2)
        sizes = [block.shape[2] for block in (*self.clean, x)]
        block = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
        index, end = torch.arange(len(block)), torch.tensor(sizes).cumsum(0)[block]
        visible = block[:, None] >= block[None, :]
        if self.window is not None:
            # The window counts the sink and the block itself, frame by frame.
            newest = index[None, :] >= (end - (self.window - self.sink))[:, None]
            visible &= newest | (index < self.sink)[None, :]
        context = ClipContext(visible[None], index, (4, 6), 32)
        told = [0.0] * (len(block) - x.shape[2]) + levels
        flow = self.model(whole, torch.tensor([told]), self.conditioning, context)
        return flow[:, :, -x.shape[2] :]

    def block(self, index: int, frames: int = 3) -> Tensor:
        """A block's clean latents by Self-Forcing's few steps."""
        shape = (1, 16, frames, 8, 12)
        x = seeded(index, 0, shape)
        for cell in CELLS:
            x = renoised(cell, index, x, self.flow(x, [cell.timestep] * frames))
        return x


def renoised(cell: Cell, index: int, x: Tensor, flow: Tensor) -> Tensor:
    """The next input of a block, or its clean latents after the last cell."""
    x0 = (x.double() - cell.sigma * flow.double()).float()
    if not cell.next_sigma:
        return x0
    fresh = seeded(index, cell.level + 1, tuple(x.shape))
    return (1 - cell.next_sigma) * x0 + cell.next_sigma * fresh


def test_first_frame_alone_then_blocks(world: World, embeds: Tensor) -> None:
    slow = Slow(world, embeds)
    with world.session(
        prompt_embeds=embeds, noise=seeded, window=None, independent_first_frame=True, **SIZE
    ) as session:
        blocks = [session.step() for _ in range(3)]
    assert [block.latents.shape[2] for block in blocks] == [1, 3, 3]
    assert [block.start for block in blocks] == [0, 1, 4]
    for index, block in enumerate(blocks):
        slow.clean.append(slow.block(index, block.latents.shape[2]))
        assert (slow.clean[-1] - block.latents).abs().max() <= 2e-5


@pytest.mark.parametrize(("window", "sink"), [(6, 0), (7, 0), (8, 1), (9, 3), (9, 4), (3, 0)])
def test_rolling_windows_count_the_sink_and_the_block(
    world: World, embeds: Tensor, window: int, sink: int
) -> None:
    slow = Slow(world, embeds, window, sink)
    with world.session(
        prompt_embeds=embeds, noise=seeded, window=window, sink=sink, **SIZE
    ) as session:
        blocks = [session.step().latents for _ in range(6)]
    for index, made in enumerate(blocks):
        slow.clean.append(slow.block(index))
        assert (slow.clean[-1] - made).abs().max() <= 2e-5


@pytest.mark.parametrize("frames", [1, 4, 3, 6])
def test_a_stream_begins_with_what_is_given(world: World, embeds: Tensor, frames: int) -> None:
    given = torch.randn(1, 16, frames, 8, 12, generator=torch.Generator().manual_seed(1))
    with world.session(
        prompt_embeds=embeds, noise=seeded, window=None, given=given, **SIZE
    ) as session:
        assert torch.equal(torch.cat([b.latents for b in session.given], 2), given)
        block = session.step()
        assert block.start == frames and block.latents.shape[2] == 3
        slow = Slow(world, embeds)
        slow.clean = [b.latents for b in session.given]
    assert [b.shape[2] for b in slow.clean] == [1] * (frames % 3) + [3] * (frames // 3)
    assert (slow.block(block.index) - block.latents).abs().max() <= 2e-5


def test_two_frames_are_no_whole_blocks(world: World, embeds: Tensor) -> None:
    with pytest.raises(ValueError, match="no whole blocks of 3"):
        world.session(prompt_embeds=embeds, given=torch.zeros(1, 16, 2, 8, 12), **SIZE)


def test_known_frames_have_a_timestep_of_their_own(world: World, embeds: Tensor) -> None:
    wanted = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    last = torch.tensor([False, False, True])
    slow = Slow(world, embeds)
    with world.session(prompt_embeds=embeds, noise=seeded, window=None, **SIZE) as session:
        made = session.step(known=Known(last, wanted)).latents
    assert torch.equal(made[:, :, 2], wanted[:, :, 2])
    x = seeded(0, 0, (1, 16, 3, 8, 12))
    for cell in CELLS:
        x = torch.cat([x[:, :, :2], wanted[:, :, 2:]], dim=2)
        x = renoised(cell, 0, x, slow.flow(x, [cell.timestep, cell.timestep, 0.0]))
    assert (x[:, :, :2] - made[:, :, :2]).abs().max() <= 8e-6


def test_plain_grid_takes_steps_as_timesteps() -> None:
    cells = list(PRESETS["causvid"].schedule().cells(0))
    assert [cell.timestep for cell in cells] == [1000.0, 757.0, 522.0]
    sigmas = [1.0, 0.7567568, 0.5217391]
    assert np.allclose([cell.sigma for cell in cells], sigmas, atol=1e-6)


def test_step_nought_is_the_last_level_of_the_table() -> None:
    *_, before, last = PRESETS["krea-realtime"].schedule().cells(0)
    assert last.timestep == 0.0 and abs(last.sigma - 0.00498008) < 1e-6
    assert before.next_sigma == last.sigma and last.next_sigma == 0.0


def test_solver_grid_is_that_of_wans_solvers() -> None:
    cells = list(PRESETS["many-step"].schedule().cells(0))
    told = [cell.timestep for cell in cells]
    assert told[:5] == [999, 995, 991, 987, 982] and told[-5:] == [356, 302, 241, 172, 92]
    assert abs(cells[0].sigma - 0.9998) < 1e-6 and abs(cells[-1].sigma - 0.092507) < 1e-6
    assert len(NEGATIVE_PROMPT) == 137


def test_unipc_with_guidance_is_diffusers_solver_on_both_flows(
    world: World, embeds: Tensor
) -> None:
    """Two slow rollouts, one for each prompt, and diffusers' own scheduler between them."""
    other = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(3))
    with world.session(
        prompt_embeds=embeds, noise=seeded, window=None, schedule="unipc", steps=6,
        guidance=3.0, negative_prompt_embeds=other, **SIZE,
    ) as session:  # fmt: skip
        blocks = [session.step().latents for _ in range(2)]
    pair = [Slow(world, embeds), Slow(world, other)]
    sigmas = [c.sigma for c in Schedule.uniform(6, 5.0, grid="solver").cells(0)]
    for index, made in enumerate(blocks):
        solver = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2
        )
        solver.set_timesteps(sigmas=np.array(sigmas))
        x = seeded(index, 0, (1, 16, 3, 8, 12))
        for timestep in solver.timesteps:
            wanted, unwanted = (slow.flow(x, [float(timestep)] * 3) for slow in pair)
            x = solver.step(unwanted + 3.0 * (wanted - unwanted), timestep, x).prev_sample
        assert (x - made).abs().max() <= 5e-5
        for slow in pair:
            slow.clean.append(made)


def test_guidance_of_one_is_none_at_all(world: World, embeds: Tensor) -> None:
    made = []
    for guidance in (None, 1.0):
        with world.session(
            prompt_embeds=embeds, noise=seeded, window=6, guidance=guidance, **SIZE
        ) as session:
            assert len(session.views) == 1
            made.append(torch.cat([session.step().latents for _ in range(3)], 2))
    assert torch.equal(*made)


def test_a_guided_session_forks_and_keeps_its_promise(world: World, embeds: Tensor) -> None:
    with world.session(
        prompt_embeds=embeds, window=6, guidance=2.0, negative_prompt_embeds=embeds[:, :3], **SIZE
    ) as session:
        for _ in range(4):
            session.step()
        promised = session.memory_report()
        assert promised.context == session.context.pool.nbytes
        with session.fork() as twin:
            assert torch.equal(twin.step().latents, session.step().latents)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "a cat"}, "no text encoder"),
        ({}, "no text encoder"),
        ({"prompt_embeds": torch.zeros(1, 17, 32)}, "17 rows, more than 16"),
        ({"prompt_embeds": torch.zeros(1, 4, 31)}, r"must be \[1, T, 32\]"),
        ({"height": 60}, "multiple of 8"),
        ({"height": 72, "width": 96}, "multiple of patch"),
        ({"window": 5, "sink": 3}, "window=5 is too small"),
        ({"window": 9, "cache": "recent=3"}, "not both"),
        ({"positions": "relative"}, "positions must be one of"),
        ({"pictures": np.zeros((64, 96, 3), np.uint8)}, "reads no pictures"),
        ({"guidance": -1.0}, "guidance must be 0 or more"),
        ({"negative_prompt": "blur"}, "does nothing without guidance"),
        ({"given": torch.zeros(1, 4, 3, 8, 12)}, "given latents must be"),
        ({"given": torch.zeros(3, 8, 12)}, "given latents must be"),
        ({"given": torch.zeros(1, 16, 0, 8, 12)}, "given latents must be"),
        ({"given": [1]}, "given must be a tensor of floating-point numbers, got list"),
        ({"given": torch.full((1, 16, 3, 8, 12), torch.nan)}, "given holds numbers that are not"),
        ({"prompt_embeds": torch.zeros(1, 0, 32)}, r"must be \[1, T, 32\]"),
        ({"prompt_embeds": torch.full((1, 3, 32), torch.inf)}, "prompt_embeds holds numbers"),
        ({"prompt_embeds": torch.zeros(1, 3, 32, dtype=torch.int64)}, "got torch.int64"),
        ({"noise": lambda *_: torch.zeros(1)}, "noise must be"),
        ({"noise": lambda *_: None}, r"noise\(0, 0, …\) must be a tensor .* got NoneType"),
        ({"noise": lambda *at: torch.full(at[2], torch.nan)}, r"noise\(0, 0, …\) holds numbers"),
        ({"height": 0}, "must be 1 pixel or more"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    world: World, embeds: Tensor, options: dict[str, object], said: str
) -> None:
    given = {**SIZE, "prompt_embeds": embeds, **options}
    if "prompt" in options or not options:
        del given["prompt_embeds"]
    with pytest.raises(ValueError, match=said) as error:
        world.session(**given).step()
    assert "\n" not in str(error.value)


def test_what_is_refused_leaves_nothing_promised(world: World, embeds: Tensor) -> None:
    pool = world.pool_of((64, 96))
    with world.session(prompt_embeds=embeds, window=6, **SIZE):
        pass
    before = pool.nbytes
    for _ in range(3):
        with pytest.raises(ValueError, match="given latents must be"):
            world.session(prompt_embeds=embeds, window=6, given=torch.zeros(1, 4, 3, 8, 12), **SIZE)
    with world.session(prompt_embeds=embeds, window=6, **SIZE) as session:
        session.step()
        assert pool.nbytes == before


def test_window_words_keep_the_rest_of_the_worlds_cache() -> None:
    world = World.from_single_file(GOLDEN / "model_sf.safetensors", preset="longlive")
    line = world.config.windowed(9, 3, None).line()
    assert line.endswith("recent=3,positions=absolute,prompt=recache")
    line = world.config.windowed(..., None, "packed").line()
    assert line.startswith("sink=3,recent=6,positions=packed")


def test_a_fork_of_a_given_beginning_goes_on(world: World, embeds: Tensor) -> None:
    given = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(4))
    with world.session(prompt_embeds=embeds, given=given, window=6, **SIZE) as session:
        given.zero_()  # the session has its own
        with session.fork() as twin:
            assert torch.equal(twin.step().latents, session.step().latents)
        assert session.given[0].latents.any()
