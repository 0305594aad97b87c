"""Random calls of the public functions and random settings: right, or refused with a sentence.

A refusal comes from a line of ours (not from the depths of a library), is a TypeError or
ValueError, and is one line. An answer has the shape that is promised and is finite where its inputs
are.
"""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import ec2face_core
from ec2face_core import attributes, flow, losses, metrics
from ec2face_core.config import Config, ConfigError, LossConfig, load_config

OURS = str(Path(ec2face_core.__file__).parent)
MODERATE = 1e4  # inputs up to here have to give finite results

SHAPES = (
    (), (0,), (1,), (2,), (3,), (19,), (25,), (2, 1), (2, 4), (1, 4), (2, 19), (1, 8, 8), (2, 8, 8),
    (2, 8, 4), (2, 4, 8), (3, 8, 8), (2, 4, 8, 8), (1, 4, 8, 8), (2, 1, 8, 8), (2, 19, 8, 8),
    (2, 3, 8, 8), (2, 0, 8, 8),
)  # fmt: skip
KINDS = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
FILLS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "unit": lambda shape, g: torch.rand(shape, generator=g, dtype=torch.float64),
    "normal": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64),
    "labels": lambda shape, g: torch.randint(0, 19, shape, generator=g).double(),
    "zero": lambda shape, _: torch.zeros(shape, dtype=torch.float64),
    "one": lambda shape, _: torch.ones(shape, dtype=torch.float64),
    "minus": lambda shape, _: -torch.ones(shape, dtype=torch.float64),
    "byte": lambda shape, _: torch.full(shape, 255.0, dtype=torch.float64),
    "nan": lambda shape, _: torch.full(shape, math.nan, dtype=torch.float64),
    "inf": lambda shape, _: torch.full(shape, math.inf, dtype=torch.float64),
    "huge": lambda shape, _: torch.full(shape, 1e30, dtype=torch.float64),
}


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], fill: str, kind: torch.dtype) -> Any:
    """Mostly a tensor as it should be; else one thing about it is other, or it is no tensor."""
    wrong = draw(st.sampled_from(("", "", "", "shape", "fill", "kind", "all", "none")))
    if wrong == "none":
        return draw(st.sampled_from((None, 3, 0.5, "text", [1.0], True)))
    if wrong in ("shape", "all"):
        shape = draw(st.sampled_from(SHAPES))
    if wrong in ("fill", "all"):
        fill = draw(st.sampled_from(tuple(FILLS)))
    if wrong in ("kind", "all"):
        kind = draw(st.sampled_from(KINDS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return FILLS[fill](shape, generator).to(kind)


def real(*shape: int, fill: str = "normal") -> st.SearchStrategy:
    return tensors(shape, fill, torch.float32)


def ids(*shape: int) -> st.SearchStrategy:
    return tensors(shape, "labels", torch.int64)


def counts(*shape: int) -> st.SearchStrategy:
    return tensors(shape, "labels", torch.int64)


def numbers(right: float) -> st.SearchStrategy:
    nonsense = (math.nan, math.inf, -math.inf, -1, 1e30, 1000, 0, None, "1", True, 1j, [1])
    return st.one_of(st.just(right), st.sampled_from(nonsense))


X = real(2, 4, 8, 8)
T = real(2, fill="unit")
EACH = real(2, fill="unit")
KEEP = st.one_of(st.none(), tensors((2,), "one", torch.bool))
LOSS = st.just(LossConfig())

CALLS: dict[str, tuple[Callable[..., Any], tuple[st.SearchStrategy, ...]]] = {
    "interpolate": (flow.interpolate, (X, X, T)),
    "target_velocity": (flow.target_velocity, (X, X)),
    "reverse_estimate": (flow.reverse_estimate, (X, X, T)),
    "flow_matching_loss": (
        losses.flow_matching_loss, (X, X, st.one_of(st.none(), real(2, 8, 8, fill="unit")))
    ),
    "class_weights": (losses.class_weights, (counts(19),)),
    "long_tail_weights": (losses.long_tail_weights, (ids(2, 8, 8), counts(19))),
    "latent_weights": (losses.latent_weights, (ids(2, 8, 8), counts(19), numbers(4), LOSS)),
    "text_consistency_loss": (losses.text_consistency_loss, (real(2, 4), real(2, 4))),
    "mask_consistency_loss": (
        losses.mask_consistency_loss,
        (real(2, 19, 8, 8, fill="unit"), ids(2, 8, 8), numbers(0.5), numbers(1e-6)),
    ),
    "beta": (losses.beta, (T, numbers(10.0), numbers(0.4))),
    "total_loss": (losses.total_loss, (EACH, EACH, EACH, T, LOSS, KEEP, KEEP)),
    "drop_conditions": (losses.drop_conditions, (numbers(4), numbers(0.1))),
    "palette_image": (attributes.palette_image, (ids(2, 8, 8),)),
    "flip_labels": (attributes.flip_labels, (ids(2, 8, 8),)),
    "one_hot": (attributes.one_hot, (ids(2, 8, 8),)),
    "pixel_counts": (attributes.pixel_counts, (ids(2, 8, 8), st.one_of(st.none(), KEEP))),
    "mask_counts": (metrics.mask_counts, (ids(2, 8, 8), ids(2, 8, 8))),
    "mask_accuracy": (metrics.mask_accuracy, (ids(2, 8, 8), ids(2, 8, 8))),
    "accuracy_from_counts": (metrics.accuracy_from_counts, (counts(2, 19), counts(2, 19))),
    "psnr": (metrics.psnr, (real(2, 3, 8, 8), real(2, 3, 8, 8))),
}  # fmt: skip

MAY_BE_NAN = ("mask_accuracy", "accuracy_from_counts")  # of a class that does not occur


def judge(name: str, function: Callable[..., Any], arguments: tuple) -> str:
    """`right` or `refused`; anything else fails."""
    try:
        result = function(*arguments)
    except (TypeError, ValueError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert last.filename.startswith(OURS), f"{name}: nameless {error!r} at {last}"
        assert str(error) and "\n" not in str(error)
        return "refused"
    for x in arguments:
        if isinstance(x, Tensor) and not bool((x.double().abs() <= MODERATE).all()):
            return "right"  # NaN for NaN
    parts = [result] if isinstance(result, Tensor) else []
    if isinstance(result, tuple):
        parts = list(result)
    elif dataclasses.is_dataclass(result) and name not in MAY_BE_NAN:
        parts = [getattr(result, f.name) for f in dataclasses.fields(result)]
    for part in parts:
        assert bool(part.isfinite().all()), f"{name}: not finite from finite arguments"
    if name.endswith("_loss") and isinstance(result, Tensor):
        assert result.shape == arguments[0].shape[:1], f"{name}: {tuple(result.shape)}"
    if name in ("interpolate", "target_velocity", "reverse_estimate"):
        assert result.shape == arguments[0].shape
    return "right"


def randomly(examples: int, *strategies: st.SearchStrategy) -> Callable[[Callable], Callable]:
    """Calls the function with so many random arguments, the same in every run."""
    options = settings(
        max_examples=examples, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda function: seed(20261126)(options(given(*strategies)(function)))


def fuzz_functions(examples: int) -> dict[str, int]:
    """Random calls of all of `CALLS`; how many were right and how many were refused."""
    seen = {"right": 0, "refused": 0}

    @randomly(examples, st.sampled_from(sorted(CALLS)), st.data())
    def call(name: str, data: st.DataObject) -> None:
        function, strategies = CALLS[name]
        arguments = tuple(data.draw(strategy) for strategy in strategies)
        seen[judge(name, function, arguments)] += 1

    call()
    return seen


# ----------------------------------------------------------------------------------------- settings


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        result |= inner
    return result


SETTINGS = flat(dataclasses.asdict(Config()))

VALUES = st.one_of(
    st.sampled_from(
        (
            math.nan, math.inf, -math.inf, -1, 0, 1, 2, -1e-9, 1e-9, 1e308, 10**12, 10**400, 0.5,
            True, False, None, "", "x", "1", "1e-4", "1_000", "٣.٥", "nan", "../..", "a\0b", [],
            [1], {}, {"x": 1}, {"": 1}, (), b"x", 1j, "mask", "cpu", "none", "bf16", "float16",
        )
    ),
    st.integers(), st.floats(), st.text(max_size=8), st.booleans(),
)  # fmt: skip


def fuzz_settings(examples: int) -> dict[str, int]:
    """Random values of random settings: refused, or a configuration that is kept exactly.

    A third of the values are the setting's own default. The others differ from one environment to
    the next, for hypothesis draws constants of the modules that are loaded, too; few are right.
    """
    seen = {"right": 0, "refused": 0}
    keys = st.sampled_from(sorted(SETTINGS))

    @randomly(examples, keys, st.sampled_from((True, False, False)), VALUES)
    def configure(key: str, is_default: bool, value: Any) -> None:
        value = SETTINGS[key] if is_default else value
        try:
            config = load_config({}, **{key: value})
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) < 500, str(error)[:500]
            seen["refused"] += 1
            return
        kept = flat(dataclasses.asdict(config))
        assert type(kept[key]) is type(SETTINGS[key]), f"{key}: {value!r} became {kept[key]!r}"
        assert not isinstance(kept[key], float) or math.isfinite(kept[key])
        assert load_config(dataclasses.asdict(config)) == config
        assert len(config.digest()) == 12
        seen["right"] += 1

    configure()
    return seen


def test_a_few_random_calls_and_settings():
    assert min(fuzz_functions(60).values()) > 5
    assert min(fuzz_settings(100).values()) > 20


@pytest.mark.slow
def test_two_thousand_random_calls_and_settings():
    called = fuzz_functions(1200)
    configured = fuzz_settings(800)
    assert sum(called.values()) >= 1000 and min(called.values()) > 100
    assert sum(configured.values()) >= 700 and min(configured.values()) > 150
