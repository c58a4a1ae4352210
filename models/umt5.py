"""UMT5, the text encoder of the Wan2.1 family, through transformers: prompt in, padded rows out."""

import html
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from worldsim.models.files import CONFIG, read_config
from worldsim.models.weights import check_fit, first_line

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
KIND, TIED, WORDS = "umt5", "encoder.embed_tokens.weight", "tokenizer.json"


class PromptEncoder(nn.Module):
    """A UMT5 encoder and its tokenizer.

    Args:
        tokenizer: of transformers.
        model: a `UMT5EncoderModel`.
        length: rows of every encoded prompt; padding is attended, so it is part of the result.

    Attributes:
        text_dim: width of a row.
    """

    def __init__(self, tokenizer: Any, model: Any, length: int = 512) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.model = model
        self.length = length
        self.text_dim: int = model.config.d_model

    @torch.inference_mode()
    def encode(self, prompt: str) -> Tensor:
        """Rows of a prompt, ``[1, length, text_dim]``: zeros after its last token.

        Warns of a prompt that is too long, and cuts it.
        """
        text = cleaned(prompt)
        # Not verbose: its own warning is of another limit.
        if (tokens := len(self.tokenizer(text, verbose=False).input_ids)) > self.length:
            warnings.warn(
                f"the prompt has {tokens} tokens; what comes after {self.length} is cut off",
                stacklevel=3,
            )
        read = self.tokenizer(
            text, padding="max_length", max_length=self.length, truncation=True,
            add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        rows = self.model(read.input_ids, read.attention_mask).last_hidden_state
        return rows.masked_fill(read.attention_mask[..., None] == 0, 0)

    def kept_in_float32(self, dtype: torch.dtype) -> tuple[str, ...]:
        """Modules that are too large for a dtype: transformers leaves them out in float16 alone."""
        names = getattr(self.model, "_keep_in_fp32_modules", None) or ()
        return tuple(names) if dtype == torch.float16 else ()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both beside each other, as `load_prompt_encoder` and diffusers read them."""
        self.model.save_pretrained(Path(folder) / TEXT_ENCODER)
        self.tokenizer.save_pretrained(Path(folder) / TOKENIZER)


def cleaned(prompt: str) -> str:
    """As Wan's own pipelines clean it: broken Unicode mended, HTML entities resolved, also doubled
    ones, and white space collapsed."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def load_prompt_encoder(
    folder: Path, dtype: torch.dtype = torch.float32, length: int = 512
) -> PromptEncoder:
    """Both out of a diffusers folder; nothing is fetched.

    Raises:
        ValueError: a part is missing, damaged, or of another model.
    """
    for name, file in ((TEXT_ENCODER, CONFIG), (TOKENIZER, WORDS)):
        if not (folder / name / file).is_file():
            raise ValueError(f"{folder} has no {name}/{file}: the text encoder is incomplete")
    model = _model(folder / TEXT_ENCODER, dtype)
    tokenizer = _tokenizer(folder / TOKENIZER)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{folder / TOKENIZER} has {len(tokenizer)} tokens, but the text encoder beside it "
            f"knows {model.config.vocab_size}: they do not belong together"
        )
    return PromptEncoder(tokenizer, model, length)


def _tokenizer(folder: Path) -> Any:
    # Not AutoTokenizer: since transformers 5 it takes the class that Wan's folders name, which
    # builds a T5 around the vocabulary: no bytes for unknown characters, and <unk> is always 2.
    # This one is what the file says, in every version.
    from transformers import PreTrainedTokenizerFast

    try:
        with _quiet():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder} is no tokenizer: {first_line(error)}") from None
    if tokenizer.pad_token is None:
        raise ValueError(f"{folder} names no pad_token, and prompts are padded")
    return tokenizer


def _model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import UMT5EncoderModel

    # transformers reads weights of any kind into any model that has room for them.
    if (held := read_config(folder / CONFIG).get("model_type")) != KIND:
        raise ValueError(f"{folder} holds a {held}, not a {KIND}")
    kind: Any = UMT5EncoderModel  # its types know nothing of a second result
    try:
        with _quiet():
            model, report = kind.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:
        raise ValueError(f"{folder} cannot be read: {first_line(error)}") from None
    # What is missing was filled with random numbers. The embedding may be there once only, and
    # transformers 5.0 to 5.2 then leave its second name random, where Wan's config says "untied".
    model.set_input_embeddings(model.get_input_embeddings())
    wrong = {fault: sorted(map(_name, found)) for fault, found in report.items()}
    wrong["missing_keys"] = [name for name in wrong["missing_keys"] if name != TIED]
    told = [f"{fault}: {', '.join(names[:4])}" for fault, names in wrong.items() if names]
    if told:
        raise ValueError(f"{folder} does not fit UMT5EncoderModel: {'; '.join(told)}")
    check_fit(model, model.state_dict(), folder)  # finite
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' tables of what we tell in one line, and its progress bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _name(key: str | tuple[Any, ...]) -> str:
    return key if isinstance(key, str) else str(key[0])  # or with its two shapes
