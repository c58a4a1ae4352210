"""Prompts through UMT5: a tiny one, made here, beside a plain call of transformers."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worldsim.models.umt5 import PromptEncoder, cleaned, load_prompt_encoder

LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, umt5: PromptEncoder) -> Path:
    path = tmp_path_factory.mktemp("umt5")
    umt5.save_pretrained(path)
    return path


def test_rows_are_those_of_transformers_and_padding_is_nought(
    umt5: PromptEncoder, folder: Path
) -> None:
    loaded = load_prompt_encoder(folder, length=LENGTH)
    rows = loaded.encode("a red maze")
    ids = umt5.tokenizer("a red maze").input_ids
    assert ids[-1] == umt5.tokenizer.eos_token_id
    with torch.inference_mode():
        plain = umt5.model(torch.tensor([ids])).last_hidden_state
    assert rows.shape == (1, LENGTH, 32) and loaded.text_dim == 32
    assert torch.allclose(rows[:, : len(ids)], plain, atol=1e-6)
    assert not rows[:, len(ids) :].any()
    assert torch.equal(rows, umt5.encode("a red maze"))


def test_prompts_are_cleaned() -> None:
    assert cleaned(" a  red\n maze &amp;amp; sky ") == "a red maze & sky"


def test_a_long_prompt_is_cut_and_told(umt5: PromptEncoder) -> None:
    with pytest.warns(UserWarning, match="cut off"):
        rows = umt5.encode("a red maze " * 9)
    assert rows.shape[1] == LENGTH and rows[0, -1].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert umt5.encode("").shape == (1, LENGTH, 32)


def test_half_precision(folder: Path) -> None:
    loaded = load_prompt_encoder(folder, torch.bfloat16, LENGTH)
    assert loaded.encode("sky").dtype == torch.bfloat16


@pytest.mark.parametrize("fault", ["no tokenizer", "missing", "truncated", "shape", "empty"])
def test_a_bad_folder_is_told_in_one_line(folder: Path, tmp_path: Path, fault: str) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = "encoder.final_layer_norm.weight"
    if fault == "no tokenizer":
        shutil.rmtree(copy / "tokenizer")
    elif fault == "missing":
        del tensors[name]
        save_file(tensors, weights, {"format": "pt"})
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif fault == "shape":
        tensors[name] = torch.ones(3)
        save_file(tensors, weights, {"format": "pt"})
    else:
        weights.unlink()
    with pytest.raises(ValueError) as error:
        load_prompt_encoder(copy, length=LENGTH)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)
