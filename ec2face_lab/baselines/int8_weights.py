"""Weights on disk: one byte each, and shared ones in a file of their own.

    data/mini/baselines/{tedigan, uac, ...}/weights.safetensors
    data/mini/baselines/shared/{style, text_unet}.safetensors

Matrices and kernels are kept as 8-bit integers, so that all systems together stay small. Systems
on shared weights are trained with the weights as they are read back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ec2face_core.io.sums import DamagedError, check_sums, list_sums
from ec2face_core.runs import write_tensors

SMALLEST = 1024  # elements of a tensor that is kept in 8 bits

SCALE = "/scale"  # suffix of the names of scales


def shared_weights(path: Path, net: nn.Module, train: Callable[[], None]) -> None:
    """Fill and freeze a network from a file, or train it first where there is none.

    Args:
        path: of the file.
        net: the network.
        train: trains `net` in place.
    """
    if not path.is_file():
        train()
        write_weights(path, net)
    read_weights(path, net)
    net.requires_grad_(False).eval()


def shared_file(folder: Path, stage: str) -> Path:
    """Shared weights of a system with this folder: `shared/<stage>.safetensors` beside it."""
    return folder.parent / "shared" / f"{stage}.safetensors"


def write_weights(path: Path, net: nn.Module) -> None:
    """Matrices and kernels as 8-bit integers with a scale for each output, the rest as float16.

    The error of a weight is at most half a step, 1/254 of the largest one of its output.
    """
    tensors = {}
    for key, value in net.state_dict().items():
        if value.ndim > 1 and value.numel() >= SMALLEST:
            flat = value.detach().float().flatten(1)
            scale = (flat.abs().amax(1) / 127).clamp(min=1e-12)
            tensors[f"{key}{SCALE}"] = scale
            value = (flat / scale[:, None]).round().to(torch.int8).view(value.shape)
        tensors[key] = value.half() if value.is_floating_point() else value
    write_tensors(path, tensors)
    list_sums(path)


def read_weights(path: Path, net: nn.Module) -> None:
    """Fill `net` with what `write_weights` wrote.

    Raises:
        DamagedError: the file is damaged, or does not fit the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_sums(path)
    try:
        _fill(net, load_file(path))
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedError(f"{path} cannot be read ({reason}): copy or train it again") from error


def _fill(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    for key in [k for k in tensors if k.endswith(SCALE)]:
        scale = tensors.pop(key)
        name = key.removesuffix(SCALE)
        tensors[name] = tensors[name] * scale.view(-1, *[1] * (tensors[name].ndim - 1))
    net.load_state_dict(tensors)
