"""Any world as a gymnasium environment, one or many at a time (``pip install 'worldsim[env]'``).

An action is what is held during one block; an observation is the block's pictures. A world knows
no goal: rewards are 0 unless a function of the block gives them, and only `max_blocks` ends an
episode.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError("environments need gymnasium: pip install 'worldsim[env]'") from error

from worldsim.actions import ActionSpec
from worldsim.controls import ControlState
from worldsim.models.autoencoder import GROUP
from worldsim.session import Session
from worldsim.state import Block
from worldsim.world import World

Frames = NDArray[np.uint8]
Reward = Callable[[Block], float]
Action = Mapping[str, Any] | NDArray[np.int8] | Sequence[int]
LOOKED = 1000.0  # as far as a mouse moves in a block: samples of a space need a bound


def action_space(spec: ActionSpec) -> spaces.Space[Any]:
    """What a player can do: a bit for each of ``spec.keys``, and where the world takes more, a
    `Dict` of ``buttons`` and of what it takes (``look``, ``scroll``, ``move``)."""
    buttons = spaces.MultiBinary(max(1, len(spec.keys)))
    if not spec.analog:
        return buttons
    sizes = {"look": (LOOKED, 2), "scroll": (LOOKED, 1), "move": (1.0, 3)}
    boxes = {name: sizes[name] for name in spec.analog}
    analog = {name: spaces.Box(-most, most, (n,), np.float32) for name, (most, n) in boxes.items()}
    return spaces.Dict({"buttons": buttons, **analog})


def control_of(spec: ActionSpec, action: Action) -> ControlState:
    """The `ControlState` that an action stands for.

    Raises:
        ValueError: for one of another shape than `action_space` says.
    """
    told = dict(action) if isinstance(action, Mapping) else {"buttons": action}
    bits = np.asarray(told.pop("buttons", ())).astype(bool)
    wanted = max(1, len(spec.keys))
    if bits.shape != (wanted,):
        raise ValueError(f"an action has {wanted} bits, one for each key, got {list(bits.shape)}")
    held = frozenset(key for key, bit in zip(spec.keys, bits, strict=False) if bit)
    values: dict[str, Any] = {k: tuple(np.asarray(v, float).ravel()) for k, v in told.items()}
    if "scroll" in values:
        (values["scroll"],) = values["scroll"]
    return ControlState(held, **values)


class WorldEnv(gymnasium.Env[Frames, Any]):
    """One session of a world.

    Observations are uint8 ``[P, H, W, 3]``: the pictures of one block. A stream's very first block
    has three pictures less, since its first latent frame is a single one; they are filled up with
    its first picture, so that every observation has one shape.

    Args:
        world: shared by all environments that are made on it.
        prompt: what it shows, None for the world's own; ``reset(options={"prompt": …})`` overrides.
        max_blocks: after so many, the one of ``reset`` counted in, an episode is truncated; None
            never ends.
        reward: of a block.
        settings: of every session, see `World.session`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # as gymnasium does

    def __init__(
        self,
        world: World,
        prompt: str | None = None,
        max_blocks: int | None = None,
        reward: Reward | None = None,
        **settings: Any,
    ) -> None:
        if world.autoencoder is None:
            raise ValueError("this world has no decoder, so there is nothing to observe")
        self.world = world
        self.prompt = prompt
        self.max_blocks = max_blocks
        self.reward = reward
        self.settings = settings
        self.render_mode = "rgb_array"
        self.metadata = {**self.metadata, "render_fps": world.config.fps}
        self.action_space = action_space(world.actions)
        size = world.config.sized(settings.get("height"), settings.get("width"))
        shape = (GROUP * world.config.block_frames, *size, 3)
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self._session: Session | None = None
        self._newest: Frames | None = None
        self._begun = 0

    @property
    def session(self) -> Session:
        """The one that is live.

        Raises:
            ValueError: before the first `reset`.
        """
        if self._session is None:
            raise ValueError("this environment has not begun: call reset() first")
        return self._session

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Frames, dict[str, Any]]:
        """Open a world anew and make its first block, during which nothing is held.

        Args:
            seed: names the world's noise; None draws one.
            options: ``prompt``.
        """
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**63)) if seed is None else seed
        prompt = (options or {}).get("prompt", self.prompt)
        opened = self.world.session(prompt, drawn, **self.settings)
        self.close()
        self._session = opened
        self._begun = opened.block
        block = opened.step()
        return self._observed(block), self._told(block)

    def step(self, action: Action) -> tuple[Frames, float, bool, bool, dict[str, Any]]:
        """Hold what ``action`` says for one block."""
        session = self.session
        session.control(state=control_of(self.world.actions, action))
        block = session.step()
        made = session.block - self._begun
        truncated = self.max_blocks is not None and made >= self.max_blocks
        reward = 0.0 if self.reward is None else float(self.reward(block))
        return self._observed(block), reward, False, truncated, self._told(block)

    def render(self) -> Frames | None:
        """The newest picture, uint8 ``[H, W, 3]``."""
        return None if self._newest is None else self._newest[-1]

    def fork(self) -> "WorldEnv":
        """A twin that goes its own way from here, as `Session.fork`."""
        twin = WorldEnv(self.world, self.prompt, self.max_blocks, self.reward, **self.settings)
        twin._session, twin._newest, twin._begun = self.session.fork(), self._newest, self._begun
        return twin

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _observed(self, block: Block) -> Frames:
        missing = self.observation_space.shape[0] - len(block.frames)
        first = np.repeat(block.frames[:1], missing, axis=0)
        self._newest = np.concatenate([first, block.frames]) if missing else block.frames
        return self._newest

    def _told(self, block: Block) -> dict[str, Any]:
        return {"block": block.index, "pose": self.session.pose, "prompt": block.applied.prompt}


class WorldVectorEnv(VectorEnv[Any, Any, NDArray[Any]]):
    """Several sessions on shared weights, each to the bit what it would be alone.

    Episodes that end begin anew with the step after, under a seed of their own (gymnasium's
    "next step" autoreset).
    """

    def __init__(self, world: World, num_envs: int, **options: Any) -> None:
        """``options``: those of `WorldEnv`."""
        if num_envs < 1:
            raise ValueError(f"num_envs must be 1 or more, got {num_envs}")
        self.envs = [WorldEnv(world, **options) for _ in range(num_envs)]
        self.num_envs = num_envs
        self.single_action_space = self.envs[0].action_space
        self.single_observation_space = self.envs[0].observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.metadata = {
            **self.envs[0].metadata, "autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP
        }  # fmt: skip
        self.render_mode = "rgb_array"
        self._ended = [False] * num_envs

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Frames, dict[str, Any]]:  # fmt: skip
        """``seed``: that of the first one, the others follow; or one each."""
        seeds: Sequence[int | None]
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = seed
        began = [
            env.reset(seed=one, options=options) for env, one in zip(self.envs, seeds, strict=True)
        ]
        self._ended = [False] * self.num_envs
        return np.stack([pictures for pictures, _ in began]), _listed([info for _, info in began])

    def step(
        self, actions: Any
    ) -> tuple[Frames, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """One block of each."""
        done = []
        for i, env in enumerate(self.envs):
            if self._ended[i]:
                done.append((*env.reset()[:1], 0.0, False, False, {"block": 0}))
            else:
                done.append(env.step(_one(actions, i)))
        pictures, rewards, ends, cuts, infos = zip(*done, strict=True)
        self._ended = [a or b for a, b in zip(ends, cuts, strict=True)]
        return (
            np.stack(pictures), np.array(rewards), np.array(ends), np.array(cuts), _listed(infos)
        )  # fmt: skip

    def render(self) -> tuple[Frames | None, ...]:
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        for env in self.envs:
            env.close()


def _one(actions: Any, i: int) -> Any:
    """What the i-th of a batch of actions says."""
    if isinstance(actions, Mapping):
        return {name: values[i] for name, values in actions.items()}
    return actions[i]


def _listed(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for info in infos for name in info)
    return {name: [info.get(name) for info in infos] for name in names}
