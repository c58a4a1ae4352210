"""The causal DiT: the cached path is one block-causal forward, and leaves what it reads alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from worldsim.cache.config import CacheConfig
from worldsim.cache.context import Context
from worldsim.cache.pool import PagePool, PageShape
from worldsim.models.context import ClipContext, block_causal
from worldsim.models.embedders import time_sinusoid
from worldsim.models.transformer import CausalWanTransformer3DModel, Conditioning
from worldsim.models.view import ContextView
from worldsim.models.weights import cast, load_model
from worldsim.rollout import commit, publish, timesteps
from worldsim.schedule import CLEAN, Schedule
from worldsim.world import World

HEADS, HEAD_DIM, LAYERS, CHANNELS = 2, 16, 3, 4  # head_dim 16: 4/2/2 pairs, an unequal split
SIZE, GRID, TEXT = (4, 6), (2, 3), (5, 8)
TOKENS = math.prod(GRID)
NOISY = 833.3333  # no whole number: a level that is rounded somewhere shows
CPU = torch.device("cpu")


def tiny(action_dim: int = 0, dtype: torch.dtype = torch.float32) -> CausalWanTransformer3DModel:
    """Random weights without a trivial one: biases, gains and modulation all count."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CausalWanTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS,
            out_channels=CHANNELS, text_dim=TEXT[1], freq_dim=32, ffn_dim=64, num_layers=LAYERS,
            action_dim=action_dim,
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return cast(model.eval().requires_grad_(False), dtype)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def new_view(
    config: CacheConfig, block_frames: int, dtype: torch.dtype = torch.float32
) -> ContextView:
    pool = PagePool(PageShape(LAYERS, HEADS, GRID, HEAD_DIM), dtype, CPU)
    context = Context(pool, config)
    pool.reserve(context.needs(block_frames))
    return ContextView(context, block_frames)


class Clip:
    """Random latents, actions and prompts (two that alternate by block) of a few blocks."""

    def __init__(
        self, model: CausalWanTransformer3DModel, sizes: Sequence[int], seed: int = 0
    ) -> None:
        self.model, self.sizes = model, sizes
        self.dtype = model.proj_out.weight.dtype
        self.starts = [sum(sizes[:block]) for block in range(len(sizes))]
        shape = (1, CHANNELS, sum(sizes), *SIZE)
        self.clean = randn(2 + 4 * seed, *shape, dtype=self.dtype)
        self.noisy = randn(3 + 4 * seed, *shape, dtype=self.dtype)
        action_dim = model.config.action_dim
        actions = randn(4 + 4 * seed, 1, sum(sizes), max(1, action_dim), dtype=self.dtype)
        self.actions = actions if action_dim else None
        self.text = model.encode_prompt(randn(5 + 4 * seed, 2, *TEXT, dtype=self.dtype))
        self.block_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

    def frames(self, block: int) -> slice:
        return slice(self.starts[block], self.starts[block] + self.sizes[block])

    def conditioning(self, block: int) -> Conditioning:
        """Of one block, for the cached path: it reads a single prompt."""
        row = slice(block % 2, block % 2 + 1)
        keys, values = (tuple(tensor[row] for tensor in side) for side in self.text)
        actions = None if self.actions is None else self.actions[:, self.frames(block)]
        return Conditioning(keys, values, actions=actions)

    def level(self, frames: int, timestep: float) -> Tensor:
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.full((1, frames), timestep, dtype=dtype)

    def denoise(self, view: ContextView, block: int) -> Tensor:
        view.prepare(self.starts[block], self.sizes[block])
        noisy = self.noisy[:, :, self.frames(block)]
        level = self.level(self.sizes[block], NOISY)
        return self.model(noisy, level, self.conditioning(block), [view])

    def commit(self, view: ContextView, block: int) -> None:
        cell = Schedule.uniform(4, 3.0).commit_cell(block)
        clean = self.clean[:, :, self.frames(block)]
        lanes, start = {CLEAN: [view]}, self.starts[block]
        commit(self.model.commit, cell, clean, self.conditioning(block), lanes, start)
        publish([cell], lanes)

    def commit_after_prepare(self, view: ContextView, block: int) -> None:
        view.prepare(self.starts[block], self.sizes[block])
        self.commit(view, block)

    def cached(self, view: ContextView) -> list[Tensor]:
        """The flow of every block, noisy, after the earlier blocks were committed clean."""
        flows = []
        for block in range(len(self.sizes)):
            flows.append(self.denoise(view, block))
            self.commit(view, block)
        return flows

    def whole(self, config: CacheConfig, block: int) -> Tensor:
        """The same flow from one forward over the frames up to ``block``, without any cache."""
        end = self.frames(block).stop
        own = self.frames(block)
        latents = torch.cat((self.clean[:, :, : own.start], self.noisy[:, :, own]), dim=2)
        level = self.level(end, 0.0)
        level[:, own] = NOISY
        actions = None if self.actions is None else self.actions[:, :end]
        prompt = self.block_of[None, :end] % 2
        conditioning = Conditioning(*self.text, prompt=prompt, actions=actions)
        visible = self.visible(config)[:, :end, :end]
        frames = torch.arange(end)
        clip = ClipContext(visible, frames, GRID, HEAD_DIM, self.dtype)
        return self.model(latents, level, conditioning, clip)[:, :, own]

    def visible(self, config: CacheConfig) -> Tensor:
        """Own block; of the frames before it the first ``sink`` and the last ``recent``."""
        frame = torch.arange(sum(self.sizes))
        start = torch.tensor(self.starts)[self.block_of]
        own = self.block_of[:, None] == self.block_of[None, :]
        before = frame[None, :] < start[:, None]
        if config.recent is not None:
            near = frame[None, :] >= start[:, None] - config.recent
            before &= near | (frame < config.sink)[None, :]
        return (own | before)[None]


UNBOUNDED = CacheConfig()
WINDOWS = (
    CacheConfig(recent=3),
    CacheConfig(recent=2),  # no multiple of 3: frames of a block leave singly
    CacheConfig(recent=4, sink=1),
    CacheConfig(recent=1, sink=3),
    CacheConfig(recent=0, sink=2),
)


# --- the cached path --------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("action_dim", [0, 5])
@pytest.mark.parametrize("sizes", [(1,) * 6, (3,) * 4, (1, 3, 3)])
@torch.inference_mode()
def test_cached_path_is_the_block_causal_forward(
    sizes: tuple[int, ...], action_dim: int, dtype: torch.dtype, bound: float
) -> None:
    clip = Clip(tiny(action_dim, dtype), sizes)
    if len(set(sizes)) == 1:
        assert torch.equal(clip.visible(UNBOUNDED), block_causal(sum(sizes), sizes[0]))
    for block, flow in enumerate(clip.cached(new_view(UNBOUNDED, max(sizes), dtype))):
        slow = clip.whole(UNBOUNDED, block)
        assert (flow - slow).abs().max() <= bound * slow.std()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("config", WINDOWS, ids=CacheConfig.line)
@pytest.mark.parametrize("sizes", [(1,) * 7, (3,) * 5])
@torch.inference_mode()
def test_a_window_is_a_frame_mask(
    sizes: tuple[int, ...], config: CacheConfig, dtype: torch.dtype, bound: float
) -> None:
    clip = Clip(tiny(5, dtype), sizes)
    flows = clip.cached(new_view(config, max(sizes), dtype))
    for block, flow in enumerate(flows):
        slow = clip.whole(config, block)
        assert (flow - slow).abs().max() <= bound * slow.std()
    # The mask matters at all: without it the last block is another one.
    unmasked = clip.whole(UNBOUNDED, len(sizes) - 1)
    assert (flows[-1] - unmasked).abs().max() > 1e-3 * unmasked.std()


@torch.inference_mode()
def test_everything_a_block_is_conditioned_on_counts() -> None:
    # Otherwise equal outputs above would say nothing about actions, prompts and levels.
    model = tiny(5)
    clip = Clip(model, (1, 1, 1))
    view = new_view(UNBOUNDED, 1)
    flow = clip.cached(view)[2]
    base = clip.conditioning(2)
    x, level = clip.noisy[:, :, 2:3], clip.level(1, NOISY)
    fresh = new_view(UNBOUNDED, 1)
    fresh.prepare(2, 1)
    assert base.actions is not None
    other = clip.conditioning(1)
    changed = {
        "action": model(x, level, Conditioning(base.text_keys, base.text_values,
                                               actions=base.actions + 1), [view]),
        "prompt": model(x, level, Conditioning(other.text_keys, other.text_values,
                                               actions=base.actions), [view]),
        "level": model(x, level - 1, base, [view]),
        "context": model(x, level, base, [fresh]),
    }  # fmt: skip
    for name, altered in changed.items():
        assert (altered - flow).abs().max() > 1e-4 * flow.std(), name


# --- what a pass may touch --------------------------------------------------------------------
def committed(view: ContextView) -> list[Tensor]:
    """Copies of every committed page, keys and values."""
    pool = view.context.pool
    pages = [entry.page for entry in view.context.table]
    return [side(page).clone() for page in pages for side in (pool.keys, pool.values)]


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@torch.inference_mode()
def test_forward_leaves_committed_pages_alone() -> None:
    clip = Clip(tiny(5), (3,) * 4)
    view = new_view(CacheConfig(recent=4, sink=1), 3)
    for block in range(3):
        clip.denoise(view, block)
        clip.commit(view, block)
    table, pages = view.context.table, committed(view)
    flow = clip.denoise(view, 3)
    assert torch.equal(clip.denoise(view, 3), flow)
    assert view.context.table == table
    assert same_bits(committed(view), pages)


@torch.inference_mode()
def test_abort_and_retry_is_as_if_nothing_happened() -> None:
    config = CacheConfig(recent=4, sink=1)  # block 2 evicts frames, which must come back
    clip, wrong = Clip(tiny(5), (3,) * 4), Clip(tiny(5), (3,) * 4, seed=1)
    straight, retried = new_view(config, 3), new_view(config, 3)
    flows = clip.cached(straight)
    for block in range(2):
        clip.commit_after_prepare(retried, block)
    before = committed(retried)
    wrong.denoise(retried, 2)
    wrong.commit(retried, 2)
    assert not same_bits(committed(retried), before)
    retried.context.abort(2)
    assert same_bits(committed(retried), before)
    for block in (2, 3):
        assert torch.equal(clip.denoise(retried, block), flows[block])
        clip.commit(retried, block)
    assert same_bits(committed(retried), committed(straight))


@torch.inference_mode()
def test_slots_are_written_again_when_their_page_was_recycled() -> None:
    clip, wrong = Clip(tiny(5), (1,) * 3), Clip(tiny(5), (1,) * 3, seed=1)
    view, straight = new_view(UNBOUNDED, 1), new_view(UNBOUNDED, 1)
    flows = clip.cached(straight)
    clip.commit_after_prepare(view, 0)
    clip.commit_after_prepare(view, 1)
    wrong.denoise(view, 2)  # the slots are written
    # Abort and retry below the view's feet: the same page comes back with other content.
    page = view.context.table.recent[1]
    view.context.abort(1)
    clip.model.commit(wrong.clean[:, :, 1:2], clip.level(1, 0.0), wrong.conditioning(1), [view])
    view.context.stage(1, -1, [1], *view.staged(1))
    view.context.commit(1, -1)
    assert view.context.table.recent[1] == page
    other = clip.denoise(view, 2)
    assert not torch.equal(other, flows[2])
    slow = new_view(UNBOUNDED, 1)
    slow.context = view.context
    assert torch.equal(other, clip.denoise(slow, 2))


@torch.inference_mode()
def test_rows_in_one_forward_equal_each_row_alone() -> None:
    # Not bit for bit: a matrix product of more rows may be blocked another way, and then float32
    # sums round another way. (Time embeddings are: they are always made in chunks of 16 rows.)
    model = tiny(5)
    clips = [Clip(model, (3,) * 3, seed=seed) for seed in range(2)]
    views = [new_view(CacheConfig(recent=3), 3), new_view(UNBOUNDED, 3)]
    alone = [clip.cached(view)[2] for clip, view in zip(clips, views, strict=True)]
    views[0].context.abort(2)
    views[1].context.abort(2)
    for view in views:
        view.prepare(6, 3)
    each = [clip.conditioning(2) for clip in clips]
    together = Conditioning(
        tuple(map(torch.cat, zip(*(c.text_keys for c in each), strict=True))),
        tuple(map(torch.cat, zip(*(c.text_values for c in each), strict=True))),
        actions=torch.cat([c.actions for c in each if c.actions is not None]),
    )
    noisy = torch.cat([clip.noisy[:, :, 6:9] for clip in clips])
    flow = model(noisy, torch.full((2, 3), NOISY), together, views)
    assert (flow[0] - flow[1]).abs().max() > 0.1
    for row in range(2):
        assert (flow[row] - alone[row][0]).abs().max() <= 1e-6 * alone[row].std()
    # The commit pass serves rows just the same.
    clean = torch.cat([clip.clean[:, :, 6:9] for clip in clips])
    model.commit(clean, torch.zeros(2, 3), together, views)
    for clip, view in zip(clips, views, strict=True):
        rows = view.staged(3)
        clip.commit(view, 2)
        for batched, single in zip(rows, view.staged(3), strict=True):
            assert (batched - single).abs().max() <= 1e-5


@pytest.mark.parametrize("sizes", [(1,) * 6, (1, 3, 3, 3)])  # 1, 3: rows before the block idle
@torch.inference_mode()
def test_nan_in_unused_pages_and_slots_never_shows(sizes: tuple[int, ...]) -> None:
    config = CacheConfig(recent=4, sink=1)
    clip = Clip(tiny(5), sizes)
    clean = clip.cached(new_view(config, max(sizes)))
    poisoned = new_view(config, max(sizes))
    pool = poisoned.context.pool
    free = [pool.acquire(pool.frame) for _ in range(pool.free_pages)]
    unused = [side(page) for page in free for side in (pool.keys, pool.values)]
    unused += poisoned._keys + poisoned._values
    unused += [x for part in poisoned.staging for x in part]
    for tensor in unused:
        tensor.fill_(math.nan)
    for page in reversed(free):
        pool.release(page)
    for block, expected in enumerate(clean):
        assert torch.equal(clip.denoise(poisoned, block), expected)
        clip.commit(poisoned, block)
        if block == 0:  # the NaNs lie right behind what is read
            assert all(bool(torch.isnan(tensor).any()) for tensor in poisoned._keys)
            assert bool(torch.isnan(pool.keys(free[-1])).all())


# --- the real family --------------------------------------------------------------------------
WAN = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "5B": {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30,
           "in_channels": 48, "out_channels": 48},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}  # fmt: skip


@pytest.mark.parametrize("name", WAN)
def test_keys_and_shapes_of_wan(name: str) -> None:
    from diffusers import WanTransformer3DModel

    config = {"attention_head_dim": 128, "text_dim": 4096, **WAN[name]}
    with torch.device("meta"):
        ours = CausalWanTransformer3DModel(**config).state_dict()
        theirs = WanTransformer3DModel(**config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    billions = sum(tensor.numel() for tensor in ours.values()) / 1e9
    assert abs(billions - float(name.removesuffix("B"))) < 0.5


def test_configs_that_are_not_ours_are_refused() -> None:
    for wrong, message in (
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"image_dim": 1280}, "image cross-attention"),
        ({"patch_size": (2, 2, 2)}, "patch_size"),
    ):
        with torch.device("meta"), pytest.raises(ValueError, match=message):
            CausalWanTransformer3DModel(num_layers=1, **wrong)
    with pytest.raises(ValueError, match="latent size 5×6 is not a multiple of patch 2×2"):
        tiny().grid(5, 6)


# --- kernels ----------------------------------------------------------------------------------
def test_a_world_runs_on_another_kernel(make_world: Callable[..., World]) -> None:
    world = make_world(steps=2)

    def latents() -> Tensor:
        blocks = world.stream("red brick", blocks=3, decoding=False)
        return torch.cat([block.latents for block in blocks], dim=2)

    native = latents()
    with pytest.raises(ValueError, match="unknown attention backend 'fast'"):
        world.set_attention_backend("fast")
    assert world.attention == "native"
    world.set_attention_backend("_native_math")
    kernels = {layer.attn2.backend for layer in world.transformer.layers}
    assert kernels == {world.attention} == {"_native_math"}
    assert (latents() - native).abs().max() <= 1e-5 * native.std()


# --- compilation ------------------------------------------------------------------------------
class Counting:
    """A `torch.compile` backend that counts; the graphs run eagerly after functionalisation.

    That tracing stage is inductor's own and where lengths get specialised; the code generation
    after it takes a minute and would say nothing more.
    """

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: nn.Module, inputs: list[Tensor]) -> object:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_each_pass_compiles_once_over_a_hundred_blocks(make_world: Callable[..., World]) -> None:
    eager, compiled = (
        make_world(block_frames=2, steps=2, cache="sink=1,recent=5") for _ in range(2)
    )
    counting = Counting()
    compiled.compile(backend=counting)
    # A second session, with another capacity, that grows without end: the same two graphs.
    for blocks, cache in ((100, None), (20, "recent=all")):
        sessions = [world.session("red brick", seed=5, cache=cache) for world in (eager, compiled)]
        for block in range(blocks):
            for session in sessions:
                session.control({"KeyW"} if block % 3 else set(), "night" if block > 9 else None)
            slow, fast = (session.denoise().latents for session in sessions)
            assert (slow - fast).abs().max() <= 1e-5 * slow.std()
        assert len(sessions[0].context.table) == (6 if cache is None else 2 * (blocks - 1))
    counters = torch._dynamo.utils.counters
    assert counting.graphs == 2  # denoise and commit, one each
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


# --- dtypes -----------------------------------------------------------------------------------
def test_half_precision_keeps_levels_and_modulation_in_float32(tmp_path: Path) -> None:
    model = tiny(5)
    kept = ("time_embedder", "action_embedder", "scale_shift_table", "norm2")
    half = tiny(5, torch.bfloat16)
    for name, parameter in half.named_parameters():
        high = any(part in name.split(".") for part in kept)
        assert parameter.dtype == (torch.float32 if high else torch.bfloat16), name
    # Both loaders, diffusers' own and our strict one, keep the same ones.
    model.save_pretrained(tmp_path)
    theirs = CausalWanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = load_model(CausalWanTransformer3DModel, tmp_path, torch.bfloat16)
    for loaded in (theirs, ours):
        assert loaded.config.action_dim == 5
        for name, parameter in half.named_parameters():
            assert loaded.get_parameter(name).dtype == parameter.dtype, name
            assert torch.equal(loaded.get_parameter(name), parameter), name


@torch.inference_mode()
def test_timesteps_are_never_rounded() -> None:
    full, half = tiny(5), tiny(5, torch.bfloat16)
    # bfloat16 has 936 and 940 but no 937.5, and 833.3333 would become 832.
    level, rounded = torch.tensor([[937.5, 833.3333]]), torch.tensor([[936.0, 832.0]])
    assert torch.equal(level.bfloat16().float(), rounded)
    actions = randn(6, 1, 2, 5)
    embedding, _ = half.condition_embedder(level, actions)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, full.condition_embedder(level, actions)[0])
    assert not torch.equal(embedding, half.condition_embedder(rounded, actions)[0])
    cell = next(iter(Schedule((750,), shift=5.0).cells(0)))
    told = timesteps(cell, torch.zeros(1, 4, 2, 4, 6, dtype=torch.bfloat16))
    assert told.dtype == torch.float32
    assert told.tolist() == [[937.5, 937.5]]


def test_time_sinusoid_is_computed_in_float64() -> None:
    t = 833.3333129882812
    expected = [math.cos(t), math.cos(t * 1e-2), math.sin(t), math.sin(t * 1e-2)]
    single = time_sinusoid(torch.tensor([t]), 4)
    double = time_sinusoid(torch.tensor([t], dtype=torch.float64), 4)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert single[0].tolist() == torch.tensor(expected).tolist()
    assert (double[0] - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-12


@torch.inference_mode()
def test_bfloat16_runs_close_to_float32() -> None:
    config = CacheConfig(recent=3)
    half, full = tiny(5, torch.bfloat16), tiny(5)
    clip, reference = Clip(half, (1,) * 5), Clip(full, (1,) * 5)
    # Latents and actions stay float32, as in a session.
    clip.clean, clip.noisy, clip.actions = reference.clean, reference.noisy, reference.actions
    clip.text = half.encode_prompt(randn(5, 2, *TEXT))
    rough = torch.cat(clip.cached(new_view(config, 1, torch.bfloat16)), dim=2)
    exact = torch.cat(reference.cached(new_view(config, 1)), dim=2)
    assert (rough - exact).square().mean().sqrt() <= 0.02 * exact.square().mean().sqrt()
