"""On a GPU: precision, kept keys and values, dropped masks, compiled blocks, waits, resuming.

Skipped without CUDA. With EC2FACE_GPU_TESTS=cpu, what means something on a CPU runs there.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os

import pytest
import torch
from helpers import step_gradients
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from ec2face_core.config import Config, TrainerConfig
from ec2face_core.fast.blocks import attention_kernel, prepare_blocks
from ec2face_core.mask_branch import precompute_mask_kv, predict_velocity
from ec2face_core.trainer import Trainer

CUDA = torch.cuda.is_available()
ON_CPU = os.environ.get("EC2FACE_GPU_TESTS") == "cpu"
DEVICE = torch.device("cuda" if CUDA and not ON_CPU else "cpu")
SAMPLES = 4
# 1000 t is exact in bfloat16, to which FLUX casts it: 700 would become 696, another time
TIMES = (0.0625, 0.125, 0.25, 0.5)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or ON_CPU), reason="needs CUDA"),
]
only_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="is about CUDA itself")


def set_up(config: Config, run_dir) -> Trainer:
    """A trainer whose LoRA is not zero."""
    trainer = Trainer(config, "both", run_dir, device="cpu" if DEVICE.type == "cpu" else None)
    trainer.setup()
    generator = torch.Generator().manual_seed(0)
    for p in trainer.parameters:
        p.data += (0.05 * torch.randn(p.shape, generator=generator)).to(p.device)
    return trainer


@pytest.fixture(scope="module", autouse=True)
def exact_convolutions():
    """Convolutions of float32 in float32: by default cuDNN rounds their factors to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module", params=["joint", "decoupled"])
def trainers(request, tiny_config, tmp_path_factory):
    """In float32 and in bfloat16, with the losses of the pixels strong enough to matter."""
    made = {}
    for precision in ("no", "bf16"):
        config = tiny_config.replace(
            lora={"attention": request.param},
            loss={"alpha_text": 50.0, "alpha_mask": 50.0},
            trainer={"mixed_precision": precision, "batch_size": SAMPLES},
        )
        made[precision] = set_up(config, tmp_path_factory.mktemp("run") / precision)
    return made


@pytest.fixture
def trainer(trainers):
    """The one in float32."""
    return trainers["no"]


@pytest.fixture
def samples(trainer):
    """Random samples that keep both conditions."""
    return whole_samples(trainer)


def whole_samples(trainer):
    """Of a trainer, with both conditions and fixed times."""
    drawn = trainer.stream.sample(range(SAMPLES))
    every = torch.ones(SAMPLES, dtype=torch.bool)
    t = torch.tensor(TIMES)
    return dataclasses.replace(drawn, t=t, keep_text=every, keep_mask=every)


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """||found - expected|| / ||expected||, in float64 on the CPU."""
    a, b = (
        torch.cat([x.detach().cpu().double().flatten() for x in xs]) for xs in (found, expected)
    )
    return float((a - b).norm() / b.norm())


def velocity(trainer, samples, transformer=None, kept: bool = False) -> torch.Tensor:
    """Of the trainer's model, or of another one in float32."""
    transformer = transformer or trainer.model
    device = next(transformer.parameters()).device
    x = trainer._prepare(samples)
    mask = x.z_m.to(device)
    if kept:
        mask = precompute_mask_kv(transformer, mask)
    text = x.text.send(device)
    keep = x.keep_mask_tokens
    return predict_velocity(transformer, x.z.to(device), x.t.to(device), text, mask, keep)


def gradients(trainer, samples, transformer) -> list[torch.Tensor]:
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    return list(
        torch.autograd.grad(velocity(trainer, samples, transformer).square().sum(), parameters)
    )


# ------------------------------------------------------------------------------------ the numbers


@only_cuda
def test_the_gpu_computes_what_the_cpu_does(trainer, samples):
    there = copy.deepcopy(trainer.transformer).cpu()
    found = velocity(trainer, samples)
    assert found.is_cuda
    assert relative_error([found], [velocity(trainer, samples, there)]) < 1e-4
    expected = gradients(trainer, samples, there)
    assert relative_error(gradients(trainer, samples, trainer.transformer), expected) < 1e-3


def test_bfloat16_is_near_float32(trainers, samples):
    """The velocity, and the LoRA's gradient of the whole step with its pixel losses."""
    v, v_half = (velocity(t, samples) for t in trainers.values())
    assert 0 < relative_error([v_half], [v]) < 2e-2
    (gradient, means), (gradient_half, means_half) = (
        step_gradients(t, samples) for t in trainers.values()
    )
    assert relative_error(gradient_half, gradient) < 1e-1
    for name, mean in means.items():
        torch.testing.assert_close(means_half[name], mean, rtol=5e-2, atol=1e-3)


@pytest.mark.parametrize(("precision", "error"), [("no", 1e-5), ("bf16", 2e-2)])
def test_kept_keys_and_values_change_nothing(trainers, samples, precision, error):
    trainer = trainers[precision]
    if trainer.config.lora.attention == "joint":
        with pytest.raises(ValueError, match="mask tokens can be run once only"):
            velocity(trainer, samples, kept=True)
        return
    dropped = dataclasses.replace(samples, keep_mask=torch.arange(SAMPLES) % 2 == 0)
    with torch.no_grad():
        for given in (samples, dropped):
            expected = velocity(trainer, given)
            assert relative_error([velocity(trainer, given, kept=True)], [expected]) < error


@pytest.mark.parametrize(("precision", "error"), [("no", 1e-4), ("bf16", 1e-1)])
@pytest.mark.parametrize("keep", [(1, 1, 1, 1), (1, 0, 1, 0)])
def test_a_micro_batch_is_the_mean_of_its_samples(trainers, samples, keep, precision, error):
    """With every mask no kernel gets an attention mask, with dropped ones all samples get one."""
    trainer = trainers[precision]
    samples = dataclasses.replace(samples, keep_mask=torch.tensor(keep, dtype=torch.bool))
    w = trainer.long_tail_weights(range(SAMPLES))

    def row(i: int):
        fields = dataclasses.asdict(samples)
        return type(samples)(**{k: v if v is None else v[i : i + 1] for k, v in fields.items()})

    together, _ = step_gradients(trainer, samples, w)
    alone = [step_gradients(trainer, row(i), w[i : i + 1])[0] for i in range(SAMPLES)]
    mean = [torch.stack(parts).mean(0) for parts in zip(*alone, strict=True)]
    assert relative_error(together, mean) < error


def test_a_batch_without_masks_teaches_the_mask_branch_nothing(trainers, samples):
    dropped = dataclasses.replace(samples, keep_mask=torch.zeros(SAMPLES, dtype=torch.bool))
    for trainer in trainers.values():
        gradient, _ = step_gradients(trainer, dropped)
        assert not any(g.any() for g in gradient)


@only_cuda
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16_takes_a_fused_kernel(trainer, masked):
    kernel = attention_kernel(trainer.transformer, 64, "bf16", DEVICE, masked)
    assert kernel in ("flash_attention", "efficient_attention", "cudnn_attention")


# --------------------------------------------------------------------------------------- the waits


@only_cuda
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": {"scope": "sample", "importance_sampling": 2.0}, "trainer": {"accumulation": 2}},
        {"lora": {"attention": "decoupled"}, "trainer": {"noise_repeats": 2}},
    ],
    ids=["joint", "importance", "decoupled"],
)
def test_a_step_never_waits_for_the_gpu(tiny_config, tmp_path, changes):
    """All losses on, conditions dropped often; the steps before fill what is made once."""
    shared = {"mixed_precision": "bf16", "batch_size": SAMPLES, "drop_probability": 0.4}
    config = tiny_config.replace(trainer=shared).replace(**changes)
    trainer = set_up(config, tmp_path)
    for _ in range(4):
        trainer.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            trainer.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.steps_done == 8
    assert all(values.isfinite().all() for _, values in trainer.log._unlogged)


# ------------------------------------------------------------------------------------ the training


def test_a_resumed_training_ends_as_an_uninterrupted_one(tiny_config, tmp_path):
    """With the one attention kernel whose backward adds in a fixed order."""
    device = "cpu" if DEVICE.type == "cpu" else None
    begun = tiny_config.replace(trainer={"steps": 2})
    with sdpa_kernel(SDPBackend.MATH):
        straight = Trainer(tiny_config, "none", tmp_path / "straight", device)
        straight.fit()
        Trainer(begun, "none", tmp_path / "resumed", device).fit()
        resumed = Trainer(tiny_config, "none", tmp_path / "resumed", device)
        resumed.fit()
    state = resumed.optimizer.state_dict()["state"]
    assert {v.device.type for values in state.values() for v in values.values()} == {DEVICE.type}
    loras = [
        load_file(t.run_dir / "final" / "pytorch_lora_weights.safetensors")
        for t in (resumed, straight)
    ]
    assert loras[0].keys() == loras[1].keys()
    assert any(value.abs().max() > 0 for name, value in loras[1].items() if "lora_B" in name)
    for name, value in loras[1].items():
        torch.testing.assert_close(loras[0][name], value, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------- compilation (the longest, so last)


@pytest.mark.parametrize("attention", ["joint", "decoupled"])
def test_compiled_blocks_agree_with_eager_ones(tiny_config, tmp_path, monkeypatch, attention):
    changes = {"lora": {"attention": attention}, "trainer": {"mixed_precision": "no"}}
    trainer = set_up(tiny_config.replace(**changes), tmp_path)
    samples = whole_samples(trainer)
    if DEVICE.type == "cpu":  # inductor takes minutes there
        eager = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", eager)
    torch._dynamo.reset()
    compiled = copy.deepcopy(trainer.transformer)
    config = TrainerConfig(compile=True, gradient_checkpointing=True, recompute_every=2)
    prepare_blocks(compiled, config)
    v = velocity(trainer, samples)
    assert relative_error([velocity(trainer, samples, compiled)], [v]) < 1e-4
    expected = gradients(trainer, samples, trainer.transformer)
    assert relative_error(gradients(trainer, samples, compiled), expected) < 1e-3
    torch._dynamo.reset()
