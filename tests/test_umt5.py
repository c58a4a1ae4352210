"""Prompts through UMT5: a tiny one, made here, beside a plain call of transformers."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worldsim.models.umt5 import PromptEncoder, cleaned, load_prompt_encoder
from worldsim.models.weights import cast

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_gives_what_loading_gives(folder: Path, dtype: torch.dtype) -> None:
    """The second product of a feed-forward overflows in float16, so transformers leaves it out."""
    read = load_prompt_encoder(folder, dtype, LENGTH)
    made = cast(load_prompt_encoder(folder, length=LENGTH), dtype)
    kinds = {name: tensor.dtype for name, tensor in read.state_dict().items()}
    assert kinds == {name: tensor.dtype for name, tensor in made.state_dict().items()}
    assert (torch.float32 in kinds.values()) == (dtype == torch.float16)
    assert torch.equal(read.encode("sky"), made.encode("sky"))


def test_the_tokenizer_is_what_its_file_says(folder: Path, tmp_path: Path) -> None:
    """Wan's folders name a class that transformers 5 builds anew: other ids, and not a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder")
    special = ["<pad>", "</s>", "<s>", "<unk>"]  # as in umT5: <unk> is no 2
    pieces = ["▁", "▁sky", *(f"<0x{byte:02X}>" for byte in "Ω".encode())]
    made = Tokenizer(
        Unigram([(piece, -1.0) for piece in special + pieces], unk_id=3, byte_fallback=True)
    )
    made.pre_tokenizer = Metaspace()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.add_special_tokens(special)
    path = tmp_path / "tokenizer"
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    (path / "spiece.model").write_bytes(b"lies beside it, and is not needed")
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": []}
    named = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings | named))
    read = load_prompt_encoder(tmp_path, length=LENGTH).tokenizer
    assert read("sky Ω").input_ids == made.encode("sky Ω").ids == [5, 4, 6, 7, 1]
    assert read("sky Я").input_ids == [5, 4, 3, 1]  # no bytes for this one


def test_one_embedding_under_two_names(umt5: PromptEncoder, folder: Path, tmp_path: Path) -> None:
    """Wan's config says "untied", its weights have one: transformers has left the other random."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    loaded = load_prompt_encoder(copy, length=LENGTH)
    assert loaded.model.encoder.embed_tokens.weight is loaded.model.shared.weight
    assert torch.equal(loaded.encode("sky"), umt5.encode("sky"))


def test_weights_in_shards(umt5: PromptEncoder, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "tokenizer", copy / "tokenizer")
    umt5.model.save_pretrained(copy / "text_encoder", max_shard_size="20KB")
    shards = sorted((copy / "text_encoder").glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_prompt_encoder(copy, length=LENGTH).encode("sky"), umt5.encode("sky"))
    shards[1].unlink()
    with pytest.raises(ValueError, match="cannot be read") as error:
        load_prompt_encoder(copy, length=LENGTH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no tokenizer", "no tokenizer/tokenizer.json: the text encoder is incomplete"),
        ("no words", "no tokenizer/tokenizer.json: the text encoder is incomplete"),
        ("damaged words", "is no tokenizer"),
        ("no config", "no text_encoder/config.json: the text encoder is incomplete"),
        ("a t5", "holds a t5, not a umt5"),
        ("few words", "has 37 tokens, but the text encoder beside it knows 33"),
        ("empty", "cannot be read: .*no file named"),
        ("truncated", "cannot be read"),
        ("missing", "missing_keys: encoder.final_layer_norm.weight"),
        ("unexpected", "unexpected_keys: decoder.x"),
        ("shape", "mismatched_keys: encoder.final_layer_norm.weight$"),
        ("nan", "not finite: encoder.final_layer_norm.weight"),
    ],
)
def test_a_bad_folder_is_told_in_one_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str, told: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config, weights = (
        copy / "text_encoder" / name for name in ("config.json", "model.safetensors")
    )
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    name = "encoder.final_layer_norm.weight"
    match fault:
        case "no tokenizer":
            shutil.rmtree(copy / "tokenizer")
        case "no words":
            (copy / "tokenizer" / "tokenizer.json").unlink()
        case "damaged words":
            (copy / "tokenizer" / "tokenizer.json").write_text("{")
        case "no config":
            config.unlink()
        case "a t5":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t5"}))
        case "few words":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 33}))
            tensors["shared.weight"] = tensors["shared.weight"][:33].clone()
        case "missing":
            del tensors[name]
        case "unexpected":
            tensors["decoder.x"] = torch.ones(3)
        case "shape":
            tensors[name] = torch.ones(3)
        case "nan":
            tensors[name][1] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif fault == "empty":
        weights.unlink()
    capfd.readouterr()
    with pytest.raises(ValueError, match=told) as error:
        load_prompt_encoder(copy, length=LENGTH)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)
    assert capfd.readouterr() == ("", "")  # transformers' own report would be many lines
