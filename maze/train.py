"""`worldsim train maze`: pictures → autoencoder → latents → DiT → a folder that a world loads."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from worldsim.config import WorldConfig
from worldsim.maze.actions import ACTIONS
from worldsim.maze.autoencoder_stage import Reconstruction, picture_batches, set_statistics
from worldsim.maze.dit_stage import FlowMatching, clip_batches
from worldsim.maze.fitting import Rank, fit, launch
from worldsim.maze.footage import make_walks
from worldsim.maze.own_stage import OwnFrames, own_batches
from worldsim.maze.recipe import Recipe
from worldsim.maze.report import draw_rollouts, plot_losses
from worldsim.maze.rule_stage import SameLevel, rule_batches
from worldsim.maze.themes import IGNORED, SYNONYMS, VOCABULARY
from worldsim.models.attention import MATMUL, NATIVE
from worldsim.models.autoencoder import CausalAutoencoder
from worldsim.models.transformer import CausalWanTransformer3DModel
from worldsim.models.words import WordEncoder
from worldsim.world import World

RECIPE = "recipe.json"
WORLD = "world"  # the folder, beside the checkpoints, that a world loads


def train(recipe: Recipe, folder: Path, device: str = "cpu", ranks: int = 1) -> None:
    """Run or resume the whole recipe; weights, curves and sheets appear in ``folder``.

    Raises:
        ValueError: if ``folder`` holds a run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder / RECIPE, {"ranks": ranks, **asdict(recipe)})
    launch(ranks, _train, ranks, recipe, folder, device)


def _claim(path: Path, settings: dict[str, object]) -> None:
    """Note the recipe of a new run; refuse to go on with a run of another one."""
    wanted = json.dumps(settings, indent=2) + "\n"
    if path.exists() and path.read_text() != wanted:
        raise ValueError(f"{path.parent} holds a run of another recipe: give another --out")
    path.write_text(wanted)


def _train(index: int, ranks: int, recipe: Recipe, folder: Path, device: str) -> None:
    rank = Rank(index, ranks, device)
    if recipe.start is None:
        autoencoder = _autoencoder(recipe, folder, rank)
        dit, words = _dit(recipe, folder, rank, autoencoder)
    else:
        autoencoder, dit, words = _started(recipe.start, rank)
    _lessons(recipe, folder, rank, autoencoder, dit, words)
    dit.set_attention_backend(NATIVE)
    for model in (dit, words):
        model.eval()
    if rank.first:
        world = World(world_config(recipe), dit, autoencoder, words)
        world.to("cpu", torch.float16).save_pretrained(folder / WORLD)
        plot_losses(folder, folder / "losses.png")
        draw_rollouts(World.from_pretrained(folder / WORLD), folder / "rollouts.png")


def world_config(recipe: Recipe) -> WorldConfig:
    """How the trained world wants to be run."""
    height, width = recipe.size
    return WorldConfig(
        name=recipe.name,
        height=height,
        width=width,
        fps=16.0,
        steps=recipe.few_steps,
        shift=recipe.shift,
        sampler="euler",
        cache=recipe.cache,
        rule=recipe.rule,
        actions=ACTIONS,
        prompt="red brick walls, grass floor, day, clear",
        controls="W*5 L*5 W*4 J*5 W*6 . L*10 W*6 J*5 W*5 D*3 A*3 J*5 W*6 S*4 L*5 W*6",
    )


def _autoencoder(recipe: Recipe, folder: Path, rank: Rank) -> CausalAutoencoder:
    if recipe.autoencoder is None:
        borrowed = World.from_pretrained("maze", torch.float32).autoencoder
        assert isinstance(borrowed, CausalAutoencoder), "the bundled worlds have one of ours"
        return borrowed.to(rank.device)
    torch.manual_seed(recipe.seed)
    autoencoder = CausalAutoencoder(widths=recipe.widths, depths=(2, 2, 1))
    stage = Reconstruction(autoencoder, recipe.latent_noise)
    batch = picture_batches(recipe, rank)
    fit("autoencoder", stage, batch, recipe.autoencoder, folder, rank)
    autoencoder.requires_grad_(False).eval()
    walks = make_walks(32, 16, (recipe.seed, 5), rank.device)  # the same on every rank
    set_statistics(autoencoder, walks.pictures(0, 16, recipe.size, slice(None)))
    return autoencoder


def untrained(recipe: Recipe, channels: int) -> tuple[CausalWanTransformer3DModel, WordEncoder]:
    """The DiT of a recipe, for latents of so many channels, and its word encoder: random."""
    words = WordEncoder(
        tuple(SYNONYMS), VOCABULARY, sorted(IGNORED), recipe.text_dim, recipe.text_length
    )
    dit = CausalWanTransformer3DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=recipe.text_dim,
        ffn_dim=recipe.ffn_dim,
        num_layers=recipe.layers,
        action_dim=ACTIONS.dim,
        ray_dim=ACTIONS.ray_dim,
    )
    return dit, words


def _dit(
    recipe: Recipe, folder: Path, rank: Rank, autoencoder: CausalAutoencoder
) -> tuple[CausalWanTransformer3DModel, WordEncoder]:
    torch.manual_seed(recipe.seed)
    dit, words = untrained(recipe, autoencoder.config.latent_channels)
    assert dit.ray_embedder is not None, "the maze has a camera"
    for part in (dit.proj_out, dit.ray_embedder):
        nn.init.zeros_(part.weight)
    if rank.device == "cpu":
        dit.set_attention_backend(MATMUL)
    else:
        # A GPU waits for Python here, not the other way round: one graph serves every layer.
        for layer in dit.layers:
            layer.compile(dynamic=False)
    batch = clip_batches(recipe, rank, autoencoder, words)
    fit("dit", FlowMatching(dit, words), batch, recipe.dit, folder, rank)
    return dit, words


def _started(
    source: str, rank: Rank
) -> tuple[CausalAutoencoder, CausalWanTransformer3DModel, WordEncoder]:
    """The models of a bundled world, to go on with."""
    world = World.from_pretrained(source, torch.float32)
    autoencoder, words = world.autoencoder, world.text_encoder
    assert isinstance(autoencoder, CausalAutoencoder) and isinstance(words, WordEncoder), (
        "the bundled worlds have ours"
    )
    for model in (world.transformer, words):
        model.train().requires_grad_(True)
    for part in (autoencoder, world.transformer, words):
        part.to(rank.device)
    return autoencoder, world.transformer, words


def _lessons(
    recipe: Recipe,
    folder: Path,
    rank: Rank,
    autoencoder: CausalAutoencoder,
    dit: CausalWanTransformer3DModel,
    words: WordEncoder,
) -> None:
    torch.manual_seed(recipe.seed)
    stage: OwnFrames | SameLevel = OwnFrames(dit, words, recipe)
    batches = own_batches
    if recipe.rule != "clean":
        stage, batches = SameLevel(dit, words, world_config(recipe).schedule()), rule_batches
    for lesson in recipe.lessons:
        stage.criticism = lesson.criticism
        batch = batches(recipe, lesson, rank, autoencoder, words)
        fit(lesson.name, stage, batch, lesson.fit, folder, rank)
