"""What prompts take: a world keeps some by their bytes, a session holds those that it needs."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import load_file

from worldsim.prompts import Prompts, TextRows
from worldsim.state import Asked
from worldsim.world import World

GOLDEN = Path(__file__).parent / "golden"


def rows(numbers: int) -> TextRows:
    return (torch.zeros(numbers),), (torch.zeros(numbers),)


def test_prompts_are_kept_by_their_bytes_and_the_newest_always() -> None:
    kept = Prompts(most=64)
    small = kept.read("a", lambda: rows(4))  # 32 bytes
    kept.read("b", lambda: rows(4))
    assert kept.read("a", lambda: rows(9)) is small
    kept.read("c", lambda: rows(4))  # b is the one that nobody asked for lately
    assert kept.read("a", lambda: rows(9)) is small and kept.nbytes == 64
    large = kept.read("d", lambda: rows(100))
    assert len(kept) == 1 and kept.read("d", lambda: rows(1)) is large


def test_threads_read_each_prompt_once_and_find_one_pool(make_world) -> None:
    world, made, together = make_world(), [], Barrier(4)
    encode = world.text_encoder.encode
    world.text_encoder.encode = lambda prompt: made.append(prompt) or encode(prompt)

    def ask(_: int) -> tuple[int, int]:
        together.wait()
        return id(world.text("red brick")), id(world.pool_of((32, 48)))

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(ask, range(4)))) == 1
    assert made == ["red brick"]


def test_what_is_past_holds_no_keys_of_its_prompts(make_world) -> None:
    world = make_world()
    words = ["red brick", "night", "green hedges"]
    with world.session(words[0], cache="recent=4", history=2**24) as session:
        for i in range(40):
            session.control(prompt=words[i % 3])
            session.step()
        session.settle()
        snapshot = session.snapshot()
        world._texts.clear()
        gc.collect()
        held = [x for x in gc.get_objects() if type(x) is Asked and x.keys]
        assert held == [session.asked]
        wanted = session.step().latents
        session.restore(snapshot)
        assert torch.equal(session.step().latents, wanted)
        session.rewind(12)
        assert session.prompt == words[11 % 3]
        fresh = world.session(words[0], cache="recent=4")
        for i in range(14):
            fresh.control(prompt=words[i % 3])
            last = fresh.step().latents
        for i in (12, 13):
            session.control(prompt=words[i % 3])
            again = session.step().latents
        assert torch.equal(again, last)
        fresh.close()


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_a_report_knows_size_guidance_and_what_is_given(guidance: float | None) -> None:
    world = World.from_single_file(GOLDEN / "model_sf.safetensors")
    embeds = load_file(GOLDEN / "inputs.safetensors")["prompt_embeds"]
    size = {"height": 64, "width": 96}
    told = world.memory_report("window=6", guidance=guidance, given=6, **size)
    negative = None if guidance is None else embeds[:, :3]
    with world.session(
        cache="window=6", guidance=guidance, prompt_embeds=embeds,
        given=torch.zeros(1, 16, 6, 8, 12), negative_prompt_embeds=negative, **size,
    ) as session:  # fmt: skip
        assert session.memory_report() == told
        asked = sum(x.nbytes for x in (*session.asked.keys, *session.asked.values))
    # Guided by words, the world would keep each prompt's own beside the session's pair.
    assert told.prompt == (asked if guidance is None else 2 * asked)
    assert told.given == 4 * 16 * 6 * 8 * 12
    assert told.session > world.memory_report("window=6", guidance=guidance, **size).session
    assert told.context < world.memory_report("window=6", guidance=guidance).context


def test_embeddings_go_into_streams_and_calls() -> None:
    world = World.from_single_file(GOLDEN / "model_sf.safetensors")
    world.config = type(world.config)(
        "small", 64, 96, block_frames=3, steps=2, shift=5.0, cache="window=6", text_length=16
    )
    embeds = load_file(GOLDEN / "inputs.safetensors")["prompt_embeds"]
    with world.session(prompt_embeds=embeds, seed=4) as session:
        wanted = torch.cat([session.step().latents for _ in range(2)], dim=2)
    made = [block.latents for block in world.stream(seed=4, blocks=2, prompt_embeds=embeds)]
    assert torch.equal(torch.cat(made, dim=2), wanted)
    world.set_progress_bar_config(disable=True)
    clip = world(num_frames=21, seed=4, prompt_embeds=embeds, output_type="latent").frames
    assert torch.equal(clip, wanted)
    guided = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds[:, :2], "guidance": 2.0}
    assert not torch.equal(next(world.stream(seed=4, blocks=1, **guided)).latents, wanted[:, :, :3])
    with pytest.raises(ValueError, match="not both"):
        world.stream("a cat", prompt_embeds=embeds)
    with pytest.raises(ValueError, match="no text encoder: give prompt_embeds"):
        world.stream()
    with pytest.raises(ValueError, match="does nothing without guidance"):
        next(world.stream(prompt_embeds=embeds, negative_prompt_embeds=embeds))


def test_a_block_is_told_in_one_line(make_world) -> None:
    block = make_world().session("red brick").step()
    told = "Block(index=0, start=0, latents=[1, 16, 1, 4, 6], frames=[1, 32, 48, 3], prompt="
    assert repr(block) == f"{told}'red brick')".replace("16", str(block.latents.shape[1]))
