"""Exponential moving average of the LoRA (`trainer.ema`): then it is what is saved and drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedLora:
    """The average of parameters over optimiser steps; with decay 0 the parameters themselves.

    Args:
        parameters: of the LoRA.
        decay: weight of the past, in [0, 1]; smaller at the beginning, (1 + n) / (10 + n).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after the n-th optimiser step."""
        if self.values:
            decay = min(self.decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(self.values, self.parameters, None)

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What a checkpoint holds: `<parameter>/ema`."""
        return {f"{name}/ema": v for name, v in zip(names, self.values, strict=bool(self.values))}

    def restore(self, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """Take out of a checkpoint's tensors what `tensors` put there."""
        for name, value in zip(names, self.values, strict=bool(self.values)):
            value.copy_(tensors.pop(f"{name}/ema"))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the parameters are the average."""
        kept = [p.detach().clone() for p in self.parameters] if self.values else []
        self._set(self.values)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=bool(values)):
            p.copy_(value)
