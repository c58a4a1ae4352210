"""Worlds as gymnasium environments and as async iterators: what sessions are, in their words."""

import asyncio
import time

import gymnasium
import numpy as np
import pytest
from conftest import random_world
from gymnasium.utils.env_checker import check_env

from worldsim.controls import ControlState
from worldsim.env import WorldEnv, WorldVectorEnv, action_space, control_of
from worldsim.world import World

FORWARD = np.array([1, 0, 0, 0, 0, 0], dtype=np.int8)
LEFT = np.array([0, 1, 0, 0, 0, 0], dtype=np.int8)


def test_gymnasium_accepts_it(world: World) -> None:
    check_env(WorldEnv(world, max_blocks=9), skip_render_check=True)


def test_it_is_a_session(world: World) -> None:
    env, keys = WorldEnv(world, prompt="night", max_blocks=4), world.actions.keys
    first, told = env.reset(seed=3)
    with world.session("night", seed=3) as session:
        block = session.step()
        assert (first[-len(block.frames) :] == block.frames).all() and told["prompt"] == "night"
        for i, action in enumerate((FORWARD, LEFT, FORWARD)):
            session.control(buttons={keys[int(action.argmax())]})
            seen, reward, ended, truncated, told = env.step(action)
            assert (seen == session.step().frames).all()
            assert (reward, ended, truncated) == (0.0, False, i == 2)
            assert told["pose"] == session.pose and (env.render() == seen[-1]).all()
    with pytest.raises(ValueError, match=r"an action has 6 bits, one for each key, got \[1\]"):
        env.step([1])
    env.close()
    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        env.step(FORWARD)


def test_forks_and_rewards(world: World) -> None:
    env = WorldEnv(world, reward=lambda block: float(block.index))
    env.reset(seed=1)
    env.step(FORWARD)
    twin = env.fork()
    ours, theirs = env.step(LEFT), twin.step(LEFT)
    assert (ours[0] == theirs[0]).all() and ours[1] == 2.0
    assert not (env.step(LEFT)[0] == twin.step(FORWARD)[0]).all()
    env.close()
    twin.close()


def test_many_are_each_what_it_would_be_alone(world: World) -> None:
    many = WorldVectorEnv(world, 3, max_blocks=3)
    assert isinstance(many, gymnasium.vector.VectorEnv)
    seen, _ = many.reset(seed=5)
    singles = [WorldEnv(world) for _ in range(3)]
    alone = [env.reset(seed=5 + i)[0] for i, env in enumerate(singles)]
    assert (seen == np.stack(alone)).all()
    actions = np.stack([FORWARD, LEFT, FORWARD])
    for count in (2, 3):
        seen, _, _, cuts, told = many.step(actions)
        alone = [env.step(action)[0] for env, action in zip(singles, actions, strict=True)]
        assert (seen == np.stack(alone)).all() and cuts.tolist() == [count == 3] * 3
    assert told["block"] == [2, 2, 2]
    seen, _, _, cuts, _ = many.step(actions)  # begins anew
    assert seen.shape == many.observation_space.shape and not cuts.any()
    assert many.action_space.contains(many.action_space.sample())
    many.close()


def test_actions_of_a_world_with_a_mouse() -> None:
    from worldsim.actions import ActionSpec, Motion

    spec = ActionSpec(keys=("KeyW",), motion=(Motion(1.0),), axes={"look.x": Motion(turn=0.1)})
    space = action_space(spec)
    assert isinstance(space, gymnasium.spaces.Dict) and set(space) == {"buttons", "look"}
    state = control_of(spec, {"buttons": [1], "look": [3.0, 0.0]})
    assert state == ControlState(frozenset({"KeyW"}), look=(3.0, 0.0))


def test_an_async_stream_is_the_same_and_ends() -> None:
    world = random_world()

    async def watch() -> list[bytes]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(tick())
        seen = []
        async for block in world.astream("night", seed=2):
            seen.append(block.frames.tobytes())
            if len(seen) == 4:
                break
        beside.cancel()
        assert ticks > 4, "the loop went on while blocks were made"
        return seen

    wanted = [block.frames.tobytes() for block in world.stream("night", seed=2, blocks=4)]
    assert asyncio.run(watch()) == wanted
    patience = time.monotonic() + 30  # its thread closes it, and nobody waited for that
    while world.pool.used_pages and time.monotonic() < patience:
        time.sleep(0.01)
    assert world.pool.used_pages == 0
    with pytest.raises(ValueError, match="unknown key"):
        world.astream(controls="X*4")
