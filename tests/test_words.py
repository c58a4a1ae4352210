"""Prompts as plain words: known, unknown and ignored ones, padding, and files."""

from pathlib import Path

import pytest
import torch

from worldsim.maze.themes import ALL_THEMES, IGNORED, VOCABULARY
from worldsim.models.weights import load_model
from worldsim.models.words import PADDING, Reading, WordEncoder


def encoder(length: int = 4) -> WordEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WordEncoder(
            ["brick", "hedge", "night"],
            synonyms={"red": "brick", "dark": "night", "green": "hedge"},
            ignored=["a", "at", "maze"],
            text_dim=6,
            length=length,
        )


@pytest.mark.parametrize(
    ("prompt", "rows", "unknown"),
    [
        ("", (), ()),
        ("  ,;  ", (), ()),
        ("brick", (1,), ()),
        ("NIGHT, Brick!", (3, 1), ()),  # in order of first mention
        ("red brick at night", (1, 3), ()),  # a synonym is the same row, each row once
        ("green-brick_dark", (2, 1, 3), ()),  # whatever is no letter or digit separates
        ("a maze", (), ()),
        ("a purple brick maze, purple and tall", (1,), ("purple", "and", "tall")),
    ],
)
def test_reading(prompt: str, rows: tuple[int, ...], unknown: tuple[str, ...]) -> None:
    assert encoder().read(prompt) == Reading(rows, unknown)


@pytest.mark.parametrize("prompt", ["purple", "a purple maze", "bricks"])
def test_a_prompt_without_a_known_word_is_one_clear_line(prompt: str) -> None:
    with pytest.raises(
        ValueError, match=f"'{prompt}' has no word .*knows brick, hedge, night$"
    ) as told:
        encoder().read(prompt)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="no word that this world knows"):
        encoder().ids(prompt)


def test_padding_to_the_length_of_the_world() -> None:
    ids = encoder().ids("dark green")
    assert ids.tolist() == [3, 2, PADDING, PADDING]
    assert ids.dtype == torch.int64
    assert encoder().ids("").tolist() == [PADDING] * 4
    # More than there is room for: the first words count.
    assert encoder(length=2).ids("dark green red").tolist() == [3, 2]


def test_encoding_looks_rows_up() -> None:
    words = encoder()
    ids = torch.stack((words.ids("night brick"), words.ids("hedge")))
    rows = words(ids)
    assert rows.shape == (2, 4, 6)
    assert torch.equal(rows[0, 0], words.embedding.weight[3])
    assert torch.equal(rows[0, 2], words.embedding.weight[PADDING])
    assert torch.equal(rows[1, 0], words(words.ids("green"))[0])


def test_a_synonym_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="synonyms of words that do not exist: night"):
        WordEncoder(["brick"], synonyms={"moon": "night"})


def test_saved_and_loaded_it_reads_the_same(tmp_path: Path) -> None:
    words = encoder()
    words.save_pretrained(tmp_path)
    for loaded in (load_model(WordEncoder, tmp_path), WordEncoder.from_pretrained(tmp_path)):
        prompt = "a dark purple maze of red brick"
        assert loaded.read(prompt) == words.read(prompt)
        assert loaded.known() == words.known()
        assert torch.equal(loaded(loaded.ids(prompt)), words(words.ids(prompt)))


def test_every_theme_of_the_maze_can_be_said() -> None:
    canonical = tuple(dict.fromkeys(VOCABULARY.values()))
    words = WordEncoder(canonical, VOCABULARY, IGNORED, length=4)
    said = {words.read(theme.prompt()) for theme in ALL_THEMES}
    assert all(len(reading.rows) == 4 and not reading.unknown for reading in said)
    assert len({frozenset(reading.rows) for reading in said}) == len(ALL_THEMES)
