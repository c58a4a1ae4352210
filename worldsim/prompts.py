"""What a world keeps of the prompts that it has read, for all of its sessions."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from torch import Tensor

KEPT = 2**29  # bytes; a prompt of a 1.3B model is 94 MB, of a 14B one 419 MB

TextRows = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # of each layer, keys and values


class Prompts:
    """Cross-attention K/V by the words that they are of: the last ones asked for, within so many
    bytes, but always the newest. Streams of one world may ask on threads of their own: each prompt
    is read once."""

    def __init__(self, most: int = KEPT) -> None:
        self.most = most
        self._rows: OrderedDict[str, TextRows] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, self._rows.values()))

    def read(self, prompt: str, encode: Callable[[], TextRows]) -> TextRows:
        """What is kept of a prompt, or what ``encode`` makes of it."""
        with self._lock:
            if prompt not in self._rows:
                self._rows[prompt] = encode()
                while len(self._rows) > 1 and self.nbytes > self.most:
                    self._rows.popitem(last=False)
            self._rows.move_to_end(prompt)
            return self._rows[prompt]

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()


def _nbytes(rows: TextRows) -> int:
    return sum(tensor.nbytes for part in rows for tensor in part)
