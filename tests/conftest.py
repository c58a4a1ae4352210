"""Small worlds for the tests: random weights, none of them trivial, made in milliseconds."""

import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import pytest
import torch

from worldsim.apps import cli
from worldsim.maze.recipe import TINY, Recipe
from worldsim.maze.train import untrained, world_config
from worldsim.models.autoencoder import CausalAutoencoder
from worldsim.models.umt5 import PromptEncoder
from worldsim.world import World

# Tiny models gain nothing from threads, and beside other work a barrier can cost a hundredfold.
torch.set_num_threads(1)

MakeWorld = Callable[..., World]


def random_world(recipe: Recipe = TINY, **config: object) -> World:
    """An untrained maze of a recipe's sizes; ``config`` overrides fields of its `WorldConfig`."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        autoencoder = CausalAutoencoder(widths=recipe.widths)
        transformer, words = untrained(recipe, autoencoder.config.latent_channels)
    models = (transformer, autoencoder, words)
    for model in models:
        model.eval().requires_grad_(False)
    wanted = {"height": 32, "width": 48} | config  # no square: a mixed-up axis shows
    return World(replace(world_config(recipe), **wanted), *models)


class Said(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str  # bytes that are no text are there as surrogates
    err: str


def command(*arguments: object) -> Said:
    """`worldsim` in this process, without the seconds that a start takes."""
    before, threads, err = sys.argv, torch.get_num_threads(), StringIO()
    with TemporaryFile("w+", encoding="utf-8", errors="surrogateescape", newline="") as out:
        sys.argv = ["worldsim", *map(str, arguments)]
        try:
            with (
                warnings.catch_warnings(),  # it shows them in its own way
                redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended,
            ):  # fmt: skip
                cli.main()
        finally:
            sys.argv = before
            torch.set_num_threads(threads)
        out.seek(0)
        written, code = out.read(), ended.value.code
    if isinstance(code, str):  # what Python does at the end of a process
        return Said(1, written, f"{err.getvalue()}{code}\n")
    return Said(code or 0, written, err.getvalue())


@pytest.fixture(scope="session")
def make_world() -> MakeWorld:
    return random_world


@pytest.fixture(scope="module")
def world() -> World:
    """One latent frame a block; a file whose tests want another world has its own."""
    return random_world()


@pytest.fixture(scope="module")
def wide() -> World:
    """Three latent frames a block."""
    return random_world(block_frames=3)


@pytest.fixture(scope="session")
def umt5() -> PromptEncoder:
    """A tiny UMT5 of random weights, and a tokenizer of single characters and a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    pieces = ["▁a", "▁red", "▁maze", "▁night", "▁", *"abcdefghijklmnopqrstuvwxyz,.&"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    made = Tokenizer(Unigram(vocabulary + [(piece, -len(pieces)) for piece in pieces], unk_id=2))
    made.pre_tokenizer = Metaspace()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    sizes = UMT5Config(
        vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = UMT5EncoderModel(sizes).eval().requires_grad_(False)
    return PromptEncoder(tokenizer, model, length=12)


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved world that the command line can open; nobody may change it."""
    folder = tmp_path_factory.mktemp("worlds") / "tiny"
    random_world().save_pretrained(folder)
    return folder
