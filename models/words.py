"""A prompt as plain words: each known word is one learned row for the text cross-attention.

It stands where UMT5 stands for the large models: prompt in, ``[T, text_dim]`` rows out, padded to
the length that the world sets (padding is attended, so the length is part of the result).
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

PADDING = 0


class TextEncoder(Protocol):
    """Anything that turns a prompt into rows ``[1, length, text_dim]``, padded: padding is
    attended, so the length is part of the result."""

    length: int
    text_dim: int

    def encode(self, prompt: str) -> Tensor: ...


@dataclass(frozen=True)
class Reading:
    """What was understood of a prompt: row numbers, and the words nobody knows."""

    rows: tuple[int, ...]
    unknown: tuple[str, ...]


class WordEncoder(ModelMixin, ConfigMixin):
    """Learned embeddings of a small vocabulary.

    Args:
        words: canonical words; word i has row 1 + i (row 0 is padding).
        synonyms: further accepted words → the canonical word that they mean.
        ignored: words that mean nothing here and are passed over in silence.
        text_dim: width of a row.
        length: rows of every encoded prompt.
    """

    @register_to_config
    def __init__(
        self,
        words: Sequence[str],
        synonyms: Mapping[str, str] | None = None,
        ignored: Sequence[str] = (),
        text_dim: int = 64,
        length: int = 16,
    ) -> None:
        super().__init__()
        self.words = tuple(words)
        meant = {word: word for word in words} | dict(synonyms or {})
        if strays := sorted(set(meant.values()) - set(words)):
            raise ValueError(f"synonyms of words that do not exist: {', '.join(strays)}")
        self._row = {word: 1 + self.words.index(canon) for word, canon in meant.items()}
        self._ignored = frozenset(ignored)
        self.length = length
        self.text_dim = text_dim
        self.embedding = nn.Embedding(1 + len(self.words), text_dim)

    def read(self, prompt: str) -> Reading:
        """The rows of a prompt's known words, each once, in order of first mention.

        Raises:
            ValueError: if the prompt has words, but none that is known.
        """
        rows: list[int] = []
        unknown: list[str] = []
        for word in re.findall(r"[^\W_]+", prompt.lower()):
            if word in self._row:
                if self._row[word] not in rows:
                    rows.append(self._row[word])
            elif word not in self._ignored and word not in unknown:
                unknown.append(word)
        if unknown and not rows:
            raise ValueError(
                f"prompt {prompt!r} has no word that this world knows; it knows {self.known()}"
            )
        return Reading(tuple(rows[: self.length]), tuple(unknown))

    def known(self) -> str:
        """The canonical words, for people."""
        return ", ".join(self.words)

    def ids(self, prompt: str) -> Tensor:
        """Padded row numbers, int64 ``[length]``."""
        rows = self.read(prompt).rows
        return torch.tensor(rows + (PADDING,) * (self.length - len(rows)))

    def encode(self, prompt: str) -> Tensor:
        """Rows of a prompt, ``[1, length, text_dim]``; warns of words that nobody knows.

        Raises:
            ValueError: if the prompt has words, but none that is known.
        """
        if unknown := self.read(prompt).unknown:
            warnings.warn(
                f"passed over {', '.join(unknown)}; this world knows {self.known()}", stacklevel=3
            )
        return self(self.ids(prompt)[None].to(self.embedding.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        """Row numbers ``[..., T]`` → rows ``[..., T, text_dim]``."""
        return self.embedding(ids)
