"""A base in bfloat16 computes without autocast, and inputs are read beside the computation."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from helpers import step_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from ec2face_core.fast import precision
from ec2face_core.latents import LatentCache
from ec2face_core.trainer import Trainer


class Copies(TorchDispatchMode):
    """Counts the bytes that casts write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten._to_copy.default:
            self.written["bytes"] += result.numel() * result.itemsize
        return result


@pytest.fixture
def bf16(tiny_config, tmp_path):
    """The tiny trainer's configuration with a base that is loaded in bfloat16."""
    return tiny_config.replace(
        backbone={"dtype": "bfloat16"},
        data={"cache": str(tmp_path / "latents")},
        trainer={"mixed_precision": "bf16", "batch_size": 4, "drop_probability": 0.0},
    )


def lora_gradients(config, folder):
    """Gradients of one step from the same LoRA weights, in float64, and the bytes of its casts."""
    trainer = Trainer(config, "both", folder)
    trainer.setup()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trainer.parameters:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    with Copies() as copies:
        gradients, means = step_gradients(trainer, trainer.stream.sample(range(4)))
    assert {x.dtype for x in (*trainer.parameters, *gradients)} == {torch.float32}
    assert all(value.isfinite() for value in means.values())
    return torch.cat([g.flatten().double() for g in gradients]), copies.written["bytes"]


def test_a_bf16_base_has_the_gradient_of_autocast_with_fewer_casts(bf16, tmp_path, monkeypatch):
    exact, _ = lora_gradients(
        bf16.replace(trainer={"mixed_precision": "no"}, backbone={"dtype": "float32"}),
        tmp_path / "exact",
    )
    native, few = lora_gradients(bf16, tmp_path / "native")
    for module in ("ec2face_core.fast.precision", "ec2face_core.trainer"):
        monkeypatch.setattr(f"{module}.computes_natively", lambda config: False)
    wrapped, many = lora_gradients(bf16, tmp_path / "wrapped")

    def cosine(other):
        return float(torch.nn.functional.cosine_similarity(exact, other, dim=0))

    assert cosine(native) > 0.98 and cosine(wrapped) > 0.98
    assert few < many  # on a GPU the difference is larger: its autocast has norms in float32


def test_float32_bases_keep_their_autocast(tiny_config):
    assert not precision.computes_natively(tiny_config)
    assert precision.accelerated(tiny_config) is tiny_config.trainer
    exact = tiny_config.replace(trainer={"mixed_precision": "no"}, backbone={"dtype": "bfloat16"})
    assert not precision.computes_natively(exact)


def test_the_next_micro_batch_is_read_on_another_thread(tiny_config, tmp_path, monkeypatch):
    config = tiny_config.replace(trainer={"steps": 2, "accumulation": 2, "drop_probability": 0.5})
    trainer = Trainer(config, "none", tmp_path / "run")
    trainer.setup()
    read = LatentCache._read
    threads = []

    def spy(cache, ids, caption_indices):
        threads.append(threading.current_thread() is threading.main_thread())
        return read(cache, ids, caption_indices)

    monkeypatch.setattr(LatentCache, "_read", spy)
    trainer.update()
    trainer.update()
    assert sorted(threads) == [False, False, False, True]  # nothing after the last micro-batch
    one, two = trainer.stream.sample(range(2)), trainer.stream.sample(range(2, 4))
    trainer.cache.read_ahead(one.ids, one.caption_indices)
    other = trainer.cache.batch(two.ids, two.caption_indices)
    assert (other["id"], other["z"].shape[0]) == (two.ids, 2)
    ahead = trainer.cache.batch(one.ids, one.caption_indices)
    assert torch.equal(ahead["z"], read(trainer.cache, one.ids, one.caption_indices)["z"])
