"""UMT5, the text encoder of the Wan2.1 family, through transformers: prompt in, padded rows out."""

import html
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"


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
        if (tokens := len(self.tokenizer(text).input_ids)) > self.length:
            warnings.warn(
                f"the prompt has {tokens} tokens; what comes after {self.length} is cut off",
                stacklevel=3,
            )
        read = self.tokenizer(
            text, padding="max_length", max_length=self.length, truncation=True,
            add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        rows = self.model(read.input_ids, read.attention_mask).last_hidden_state
        return rows * read.attention_mask[..., None].to(rows.dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both beside each other, as `load_prompt_encoder` and diffusers read them."""
        self.model.save_pretrained(Path(folder) / TEXT_ENCODER)
        self.tokenizer.save_pretrained(Path(folder) / TOKENIZER)


def cleaned(prompt: str) -> str:
    """As Wan's own pipelines clean it: HTML entities resolved, also doubled ones, and white space
    collapsed; broken Unicode is mended where ftfy is installed."""
    try:
        import ftfy
    except ImportError:
        mended = prompt
    else:
        mended = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(mended)).split())


def load_prompt_encoder(
    folder: Path, dtype: torch.dtype = torch.float32, length: int = 512
) -> PromptEncoder:
    """Both out of a diffusers folder; nothing is fetched.

    Raises:
        ValueError: a part is missing, damaged, or of another model.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours are enough, and errors are one line
    for name in (TEXT_ENCODER, TOKENIZER):
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no {name}: the text encoder is incomplete")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder / TOKENIZER} is no tokenizer: {_first_line(error)}") from None
    read: Any = UMT5EncoderModel.from_pretrained  # its type does not know what it returns here
    try:
        model, report = read(
            folder / TEXT_ENCODER, dtype=dtype, local_files_only=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:
        raise ValueError(f"{folder / TEXT_ENCODER} cannot be read: {_first_line(error)}") from None
    # transformers fills what is missing with random numbers; the tied embedding is no loss.
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        told = "; ".join(f"{kind}: {', '.join(names[:4])}" for kind, names in wrong.items())
        raise ValueError(f"{folder / TEXT_ENCODER} does not fit UMT5EncoderModel: {told}")
    return PromptEncoder(tokenizer, model.eval().requires_grad_(False), length)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
