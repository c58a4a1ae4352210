"""Muon for matrices, AdamW for the rest, one learning-rate schedule, and averaged weights."""

from typing import Any

import torch
from torch import Tensor, nn

from worldsim.maze.recipe import Fit

# Inputs, outputs and embeddings are no maps between hidden spaces: AdamW suits them better.
NOT_HIDDEN = (
    "patch_embedding", "proj_out", "linear_1", "embedding", "scale_shift_table",
    "encoder.0.", "decoder.0.", "critic.", "ray_embedder",
)  # fmt: skip


class Optimiser:
    """Steps both optimisers; its state dict is complete, so that training resumes exactly."""

    def __init__(self, module: nn.Module, fit: Fit) -> None:
        self.fit = fit
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        hidden = [p for name, p in named if p.ndim >= 2 and not _first_or_last(name)]
        chosen = {id(p) for p in hidden}
        # torch's Muon takes matrices only: a convolution is one over its flattened kernel.
        self._matrices = [(p, nn.Parameter(p.data.flatten(1))) for p in hidden]
        self._muon = torch.optim.Muon(
            [matrix for _, matrix in self._matrices],
            lr=fit.muon, weight_decay=0.0, adjust_lr_fn="original",
        )  # fmt: skip
        rest = [p for _, p in named if id(p) not in chosen]
        self._adam = torch.optim.AdamW(rest, lr=fit.adam, betas=(0.9, 0.98), weight_decay=0.0)
        self._all = [p for _, p in named]

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at ``step``."""
        rising = min(1.0, (step + 1) / self.fit.warmup)
        falling = min(1.0, 2 * (self.fit.steps - step) / self.fit.steps)
        return rising * falling

    def step(self, step: int) -> None:
        torch.nn.utils.clip_grad_norm_(self._all, 1.0)
        for p, matrix in self._matrices:
            matrix.grad = None if p.grad is None else p.grad.flatten(1)
        for optimiser, peak in ((self._muon, self.fit.muon), (self._adam, self.fit.adam)):
            for group in optimiser.param_groups:
                group["lr"] = peak * self.rate(step)
            optimiser.step()
        for p in self._all:
            p.grad = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])


class Average:
    """Exponential moving average of a module's parameters; short runs warm up quickly."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {
            n: p.detach().clone() for n, p in module.named_parameters()
        }

    def update(self, module: nn.Module, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.values[name] for name in parameters], list(parameters.values()), 1 - keep
            )

    def copy_to(self, module: nn.Module) -> None:
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(self.values[name])


def _first_or_last(name: str) -> bool:
    return any(part in name for part in NOT_HIDDEN)
