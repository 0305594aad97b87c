"""Steps whose kernels a GPU replays: small networks wait for the host, not for the GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: they allocate, choose algorithms, make optimiser states

Function = Callable[..., dict[str, Tensor]]


@dataclass
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Replayed:
    """A function of tensors, captured as a CUDA graph; on the CPU it is only called.

    The function may update weights, if its optimiser is made with `optimiser_options`. It must not
    read values on the host, nor draw random numbers. If the capture fails, that is printed, and the
    function is called as it is.

    Args:
        function: (`key` if there is one, tensors by name) -> tensors by name.
        device: of the tensors.
    """

    def __init__(self, function: Function, device: torch.device) -> None:
        self.function = function
        self.on_gpu = device.type == "cuda"
        self._calls: dict[Hashable, int] = {}
        self._captures: dict[Hashable, _Capture] = {}

    def __call__(self, key: Hashable = None, **tensors: Tensor) -> dict[str, Tensor]:
        """The function's values; tensors of one key have the same shapes in every call."""
        if not self.on_gpu:
            return self._call(key, tensors)
        calls = self._calls.get(key, 0)
        self._calls[key] = calls + 1
        if calls < WARM_UP:
            return self._beside(key, tensors)
        if key not in self._captures:
            try:
                self._captures[key] = self._capture(key, tensors)
            except RuntimeError as error:
                print(f"no CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                self.on_gpu = False
                return self._call(key, tensors)
        capture = self._captures[key]
        for name, tensor in tensors.items():
            capture.inputs[name].copy_(tensor)
        capture.graph.replay()
        return {name: value.clone() for name, value in capture.outputs.items()}

    def _call(self, key: Hashable, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.function(**tensors) if key is None else self.function(key, **tensors)

    def _beside(self, key: Hashable, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A call on a stream of its own, as captures want it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            values = self._call(key, tensors)
        torch.cuda.current_stream().wait_stream(stream)
        return values

    def _capture(self, key: Hashable, tensors: dict[str, Tensor]) -> _Capture:
        """Record the kernels; nothing is computed yet."""
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            outputs = {k: v.detach() for k, v in self._call(key, inputs).items()}
        return _Capture(graph, inputs, outputs)


def optimiser_options(device: torch.device, lr: float) -> dict[str, object]:
    """Keywords of an optimiser of torch whose step can be replayed: the rate is on the GPU."""
    if device.type == "cuda":
        return {"lr": torch.tensor(lr, device=device), "fused": True, "capturable": True}
    return {"lr": lr, "fused": True}
