"""Recomputation, compilation and attention kernels: the same gradients, at the stated price."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ec2face_core.backbone import TextEmbedding, load_backbone
from ec2face_core.config import TrainerConfig
from ec2face_core.fast.blocks import attention_kernel, prepare_blocks
from ec2face_core.mask_branch import add_mask_lora, predict_velocity


@pytest.fixture(scope="module")
def adapted(tiny_config):
    """The miniature's transformer (2 double and 4 single blocks), its LoRA not zero."""
    transformer = load_backbone(tiny_config.backbone, ("transformer",)).transformer
    generator = torch.Generator().manual_seed(0)
    for p in add_mask_lora(transformer, tiny_config.lora):
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return transformer


def velocity_of(transformer: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    z, z_mask = torch.randn(2, 2, 8, 8, 8, generator=generator)
    tokens, pooled = (torch.randn(2, *n, generator=generator) for n in ((6, 96), (64,)))
    text, t = TextEmbedding(tokens, pooled), torch.tensor([0.2, 0.7])
    return predict_velocity(transformer, z, t, text, z_mask)


def gradient_of(transformer: torch.nn.Module) -> torch.Tensor:
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(velocity_of(transformer).square().sum(), parameters)
    return torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize(("every", "again"), [(1, 6), (2, 3), (4, 1)])
def test_only_every_nth_block_is_computed_again_and_gradients_stay(adapted, every, again):
    expected, transformer, calls = gradient_of(adapted), copy.deepcopy(adapted), []
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    prepare_blocks(transformer, TrainerConfig(gradient_checkpointing=True, recompute_every=every))
    gradient = gradient_of(transformer)
    twice = [i for i in range(6) if calls.count(i) == 2]
    assert twice == list(range(6))[every - 1 :: every] and len(twice) == again
    assert len(calls) == 6 + again
    assert torch.equal(gradient, expected)


def test_nothing_is_recomputed_by_default(adapted):
    transformer = copy.deepcopy(adapted)
    prepare_blocks(transformer, TrainerConfig(recompute_every=2))
    assert not transformer.gradient_checkpointing


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients(adapted, monkeypatch):
    """In one graph each (`fullgraph`): the mask branch breaks none. No inductor: it takes long."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    transformer = copy.deepcopy(adapted)
    config = TrainerConfig(compile=True, gradient_checkpointing=True, recompute_every=2)
    names = [n for n, _ in transformer.named_parameters()]
    prepare_blocks(transformer, config)
    assert [n for n, _ in transformer.named_parameters()] == names  # checkpoints stay valid
    compiled = [m for m in transformer.modules() if m._compiled_call_impl is not None]
    assert len(compiled) == 6
    torch.testing.assert_close(gradient_of(transformer), gradient_of(adapted), rtol=1e-4, atol=1e-4)


class Seen(TorchDispatchMode):
    """Notes the attention operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "attention" in str(function):
            self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_the_kernel_that_is_named_is_the_one_that_runs(adapted):
    device = torch.device("cpu")
    with Seen() as seen:
        velocity_of(adapted)
    (ran,) = {name for name in seen.names if "scaled_dot" in name}
    kernel = attention_kernel(adapted, 38, "no", device)
    assert kernel == "flash_attention" and f"_{kernel}" in ran
    with sdpa_kernel(SDPBackend.MATH), Seen() as seen:
        velocity_of(adapted)
        assert attention_kernel(adapted, 38, "bf16", device, masked=True) == "math"
    assert not any("flash" in name for name in seen.names)


def test_the_defaults_are_the_papers():
    changed = {"compile", "shard", "low_discrepancy_t", "gradient_checkpointing"}
    assert not any(dataclasses.asdict(TrainerConfig())[name] for name in changed)
