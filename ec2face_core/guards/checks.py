"""Checks of arguments: shapes, types and ranges, each refused with a sentence that names it.

Shapes and types are compared everywhere. Values are compared at once on the CPU. On a GPU reading
them would make the host wait, so there the comparison is queued and ends the process when it fails;
tensors without values (`meta`) have none to compare.
"""

from __future__ import annotations

import argparse
import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import UserError


class NotFiniteError(UserError, FloatingPointError):
    """A loss, a gradient or a picture that is not finite; the message names the remedy."""


def check_tensor(x: Any, name: str) -> None:
    """Refuse what is not a tensor.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def check_labels(
    label_map: Tensor, classes: int, name: str = "label map", least: int = 2
) -> Tensor:
    """Class ids in [0, classes) of any integer type, as int64.

    Args:
        label_map: the ids.
        classes: how many there are.
        name: of the label map, for the message.
        least: dimensions that it has at least.

    Raises:
        TypeError: not integers (booleans and floats are no ids).
        ValueError: no pixel, too few dimensions, or an id out of range.
    """
    check_tensor(label_map, name)
    if label_map.is_floating_point() or label_map.is_complex() or label_map.dtype == torch.bool:
        raise TypeError(f"{name} is {label_map.dtype}; give class ids as integers")
    if label_map.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(label_map.shape)} has no pixel")
    if label_map.ndim < least:
        raise ValueError(f"{name} of shape {tuple(label_map.shape)}: expected `h w` or `b h w`")
    ids = label_map.long()
    if ids.device.type == "cpu":
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= classes:
            raise ValueError(f"{name}: ids must be 0-{classes - 1}, found {low}-{high}")
    else:
        _assert_on_device(((ids >= 0) & (ids < classes)).all())
    return ids


def check_floats(x: Tensor, name: str) -> None:
    """Refuse what is not a tensor of real numbers, or has none.

    Raises:
        TypeError: not a tensor, or of integers, booleans or complex numbers.
        ValueError: it is empty.
    """
    check_tensor(x, name)
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; give real numbers, for example float32")
    if x.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(x.shape)} is empty")


def check_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors of different shapes, which would broadcast; keywords name them.

    Raises:
        TypeError: one is no tensor.
        ValueError: the shapes differ.
    """
    for name, x in tensors.items():
        check_tensor(x, name)
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")


def check_broadcasts(x: Tensor, like: Tensor, name: str) -> None:
    """Refuse what does not broadcast to the shape of `like`.

    Raises:
        ValueError: the shapes do not fit.
    """
    pairs = zip(reversed(x.shape), reversed(like.shape), strict=False)
    if x.ndim > like.ndim or any(a not in (1, b) for a, b in pairs):
        raise ValueError(f"{name} {tuple(x.shape)} does not fit {tuple(like.shape)}")


def check_per_sample(x: Tensor, b: int, name: str) -> None:
    """Refuse anything but one value for each of b samples.

    Raises:
        TypeError: not a tensor.
        ValueError: the shape is not `(b,)`.
    """
    check_tensor(x, name)
    if tuple(x.shape) != (b,):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({b},): one for each sample")


def check_times(t: Tensor, b: int) -> None:
    """Refuse times that are not `(b,)` real numbers in [0, 1].

    Raises:
        TypeError: integers, as the timesteps 0-1000 of a scheduler.
        ValueError: another shape, or a time outside [0, 1].
    """
    check_floats(t, "t")
    check_per_sample(t, b, "t")
    check_range(t, 0.0, 1.0, "t")


def check_range(x: Tensor, low: float, high: float, name: str, allow_nan: bool = False) -> None:
    """Refuse values outside [low, high].

    Args:
        x: any shape.
        low: smallest value.
        high: largest value.
        name: of x, for the message.
        allow_nan: let NaN pass, so that a diverged computation is reported as such elsewhere.

    Raises:
        ValueError: a value is out of range.
    """
    inside = ((x >= low) & (x <= high)).all()
    if allow_nan:
        inside = ~((x < low) | (x > high)).any()
    if x.device.type != "cpu":
        _assert_on_device(inside)
    elif not inside:
        found = f"{x.min():.4g} to {x.max():.4g}"
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], found {found}")


def check_number(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, whole: bool = False
) -> None:
    """Refuse what is not a finite number in [low, high].

    Args:
        value: the argument.
        name: of the argument, for the message.
        low: smallest value.
        high: largest value.
        whole: integers only.

    Raises:
        TypeError: not a number, or not a whole one.
        ValueError: not finite, or out of range.
    """
    kind = numbers.Integral if whole else numbers.Real  # NumPy's numbers belong to these, too
    if isinstance(value, bool) or not isinstance(value, kind):
        expected = "a whole number" if whole else "a number"
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    try:
        real = float(value)
    except OverflowError:  # an integer of hundreds of digits
        real = math.inf
    if not math.isfinite(real) or not low <= real <= high:
        bounds = f"at least {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be finite and {bounds}, got {reprlib.repr(value)}")


def check_texts(texts: Any, name: str = "prompt") -> list[str]:
    """One text or several, as a list.

    Raises:
        TypeError: something that is not text.
        ValueError: an empty list.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence):
        raise TypeError(f"{name}: expected a text or a list of texts, got {type(texts).__name__}")
    if wrong := [x for x in texts if not isinstance(x, str)]:
        raise TypeError(f"{name}: expected texts, got {wrong[0]!r}")
    if not texts:
        raise ValueError(f'{name} is an empty list: give "" for no text')
    return list(texts)


def number(low: float, high: float = math.inf, whole: bool = True) -> Callable[[str], Any]:
    """The `type` of a command line's argument: a number in [low, high].

    Args:
        low: smallest value.
        high: largest value.
        whole: integers only.
    """

    def parse(text: str) -> int | float:
        try:
            value = int(text) if whole else float(text)
            check_number(value, "it", low, high, whole)
        except ValueError as error:
            kind = "a whole number" if whole else "a number"
            most = "" if math.isinf(high) else f" and at most {high:g}"
            message = f"expected {kind} of at least {low:g}{most}, got {text!r}"
            raise argparse.ArgumentTypeError(message) from error
        return value

    return parse


def _assert_on_device(condition: Tensor) -> None:
    if condition.device.type == "cuda":
        torch._assert_async(condition)
