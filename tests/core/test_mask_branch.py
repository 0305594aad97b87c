"""Eq. 4: base weights for text and noise tokens, base + LoRA for mask tokens and for them only."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from ec2face_core.attributes import palette_image
from ec2face_core.backbone import TextEmbedding, encode_images, pack
from ec2face_core.config import LoraConfig
from ec2face_core.io.lora_file import save_mask_lora
from ec2face_core.mask_branch import (
    add_mask_lora,
    install_mask_branch,
    mask_latents_of,
    predict_velocity,
)
from ec2face_lab.world.networks import tiny_backbone

B, T, N = 3, 7, 16  # samples, text tokens, tokens of an 8 x 8 latent


@pytest.fixture(scope="module")
def tiny():
    return tiny_backbone(["a face", "a person with a hat"])


@pytest.fixture
def base(tiny) -> nn.Module:
    return copy.deepcopy(tiny.transformer)


@pytest.fixture
def adapted(base) -> nn.Module:
    return perturbed(base)


def perturbed(base: nn.Module, config: LoraConfig | None = None, seed: int = 0) -> nn.Module:
    """A copy with a mask LoRA that does something."""
    transformer = copy.deepcopy(base)
    torch.manual_seed(seed)
    for p in add_mask_lora(transformer, config or LoraConfig(rank=4, alpha=8.0)):
        nn.init.normal_(p, std=0.2)
    return transformer


@pytest.fixture
def batch() -> dict:
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "z_t": draw(B, 8, 8, 8),
        "t": torch.tensor([0.1, 0.5, 0.9]),
        "text": TextEmbedding(draw(B, T, 96), draw(B, 64)),
        "mask_latents": draw(B, 8, 8, 8),
    }


def without_mask(batch: dict) -> dict:
    return {**batch, "mask_latents": None}


def stock(transformer: nn.Module, batch: dict, **ids) -> torch.Tensor:
    """The stock forward on FluxKontextPipeline's own layout."""
    from diffusers import FluxKontextPipeline

    noise_ids = FluxKontextPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    mask_ids = noise_ids.clone()
    mask_ids[:, 0] = 1
    return transformer(
        hidden_states=torch.cat([pack(batch["z_t"]), pack(batch["mask_latents"])], 1),
        encoder_hidden_states=batch["text"].tokens,
        pooled_projections=batch["text"].pooled,
        timestep=batch["t"],
        img_ids=torch.cat([noise_ids, mask_ids]),
        txt_ids=torch.zeros(T, 3),
        guidance=torch.ones(B),
        return_dict=False,
    )[0][:, :N]


def test_layout_is_kontexts_with_and_without_adapter(base, adapted, batch):
    """Through stock pipelines the mask tokens are found by their position ids."""
    for transformer in (base, adapted):
        v = predict_velocity(transformer, **batch)
        assert v.shape == batch["z_t"].shape
        torch.testing.assert_close(pack(v), stock(transformer, batch), rtol=0, atol=0)


def test_without_mask_tokens_the_lora_changes_no_bit(base, adapted, batch):
    expected = predict_velocity(base, **without_mask(batch))
    assert torch.equal(predict_velocity(adapted, **without_mask(batch)), expected)
    predict_velocity(adapted, **batch)  # the next call has forgotten this one's mask tokens
    assert torch.equal(predict_velocity(adapted, **without_mask(batch)), expected)


def test_a_fresh_lora_is_the_base_model_and_a_trained_one_is_not(base, adapted, batch):
    fresh = copy.deepcopy(base)
    add_mask_lora(fresh, LoraConfig())
    expected = predict_velocity(base, **batch)
    assert torch.equal(predict_velocity(fresh, **batch), expected)
    assert (predict_velocity(adapted, **batch) - expected).abs().max() > 1e-3


def test_equals_a_dense_reference(base, adapted, batch):
    """LoRA computed on every token and multiplied by a 0/1 gate, written independently."""
    reference = copy.deepcopy(base)
    masked = torch.zeros(T + 2 * N)
    masked[-N:] = 1
    for name, layer in adapted.named_modules():
        if not (hasattr(layer, "lora_A") and "mask" in layer.lora_A):
            continue
        delta = 8.0 / 4 * layer.lora_B["mask"].weight @ layer.lora_A["mask"].weight

        def add(module, args, out, delta=delta):
            return out + args[0] @ delta.T * masked[-out.shape[1] :, None]

        reference.get_submodule(name).register_forward_hook(add)
    torch.testing.assert_close(
        predict_velocity(adapted, **batch), predict_velocity(reference, **batch), atol=2e-5, rtol=0
    )


def test_lora_is_computed_on_mask_tokens_only(adapted, batch):
    lengths = []
    for name, layer in adapted.named_modules():
        if name.endswith("lora_A.mask"):
            layer.register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    predict_velocity(adapted, **batch)
    assert lengths == [N] * len(lengths) and len(lengths) == 1 + 2 * 5 + 4 * 5 - 3
    lengths.clear()
    predict_velocity(adapted, **without_mask(batch))
    assert lengths == []
    small = {**batch, "mask_latents": batch["mask_latents"][..., ::2, ::2]}
    predict_velocity(adapted, **small)
    assert set(lengths) == {N // 4}


def test_a_dropped_mask_is_no_mask(adapted, batch):
    with_mask = predict_velocity(adapted, **batch)
    without = predict_velocity(adapted, **without_mask(batch))
    v = predict_velocity(adapted, **batch, keep_mask=torch.tensor([True, False, True]))
    torch.testing.assert_close(v[1], without[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(v[[0, 2]], with_mask[[0, 2]], atol=1e-5, rtol=0)
    assert (v[1] - with_mask[1]).abs().max() > 1e-3


def test_all_kept_builds_no_attention_mask(adapted, batch, monkeypatch):
    seen = []
    block = type(adapted.transformer_blocks[0])
    forward = block.forward

    def spy(self, *args, **kwargs):
        seen.append(kwargs["joint_attention_kwargs"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", spy)
    predict_velocity(adapted, **batch, keep_mask=torch.ones(B, dtype=torch.bool))
    assert not any(seen)


def test_gradient_reaches_every_lora_parameter_and_nothing_else(adapted, batch):
    z_t = batch["z_t"].requires_grad_()
    predict_velocity(adapted, **batch).square().sum().backward()
    for name, p in adapted.named_parameters():
        assert p.requires_grad == ("lora" in name)
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, name
    assert z_t.grad is not None
    # all masks dropped: gradients are zero but there, so that DDP does not wait for them
    adapted.zero_grad()
    drop = torch.zeros(B, dtype=torch.bool)
    predict_velocity(adapted, **batch, keep_mask=drop).square().sum().backward()
    grads = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().max() == 0 for g in grads)


def test_gradient_checkpointing_changes_nothing(adapted, batch):
    def gradients() -> list[torch.Tensor]:
        adapted.zero_grad()
        keep = torch.tensor([True, False, True])
        predict_velocity(adapted, **batch, keep_mask=keep).square().sum().backward()
        return [p.grad.clone() for p in adapted.parameters() if p.requires_grad]

    plain = gradients()
    adapted.enable_gradient_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_two_transformers_do_not_share_anything(base, batch):
    one, two = perturbed(base, seed=1), perturbed(base, seed=2)
    expected = predict_velocity(one, **batch)
    predict_velocity(two, **without_mask(batch))
    assert one.mask_branch is not two.mask_branch
    assert torch.equal(predict_velocity(one, **batch), expected)
    assert install_mask_branch(one) is one.mask_branch  # idempotent
    assert len(one._forward_pre_hooks) == 1
    twin = copy.deepcopy(one)  # a copy has its own branch, too
    predict_velocity(two, **without_mask(batch))
    assert twin.mask_branch is not one.mask_branch
    assert torch.equal(predict_velocity(twin, **batch), expected)


def test_load_lora_weights_in_a_stock_pipeline(tiny, base, adapted, batch, tmp_path):
    from diffusers import FluxKontextPipeline

    config = LoraConfig(rank=4, alpha=8.0)
    save_mask_lora(adapted, tmp_path, config, text_length=T)
    pipeline = FluxKontextPipeline(**{**tiny.components(), "transformer": base})
    pipeline.load_lora_weights(str(tmp_path), adapter_name="mask")
    everywhere = stock(base, batch)
    install_mask_branch(base, config)
    expected = pack(predict_velocity(adapted, **batch))
    assert torch.equal(stock(base, batch), expected)
    assert (everywhere - expected).abs().max() > 1e-3  # why install_mask_branch is needed
    install_mask_branch(base, dataclasses.replace(config, tokens="all"))
    assert torch.equal(stock(base, batch), everywhere)  # the ablation is peft's plain LoRA
    install_mask_branch(base, config)
    with pytest.raises(RuntimeError, match="cannot be fused"):
        pipeline.fuse_lora()


def test_mask_position(base, batch):
    config = LoraConfig(rank=4, alpha=8.0, mask_position="aligned")
    aligned = perturbed(base, config)  # the checkpoint's own position is obeyed
    offset = perturbed(base)
    v = predict_velocity(aligned, **batch)
    assert not torch.allclose(v, predict_velocity(offset, **batch))
    install_mask_branch(offset, config)
    assert torch.equal(predict_velocity(offset, **batch), v)


def test_half_precision_base_with_float_lora(base, batch):
    transformer = perturbed(base.to(torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in transformer.parameters() if p.requires_grad)
    v = predict_velocity(transformer, **batch)
    assert v.dtype == torch.float32 and v.isfinite().all()


def test_ddp_takes_it_as_it_is(adapted, batch, tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(adapted)
        expected = predict_velocity(adapted, **batch)
        for _ in range(2):  # the second step is where DDP complains of unused parameters
            v = predict_velocity(wrapped, **batch)
            v.square().mean().backward()
        assert torch.equal(v, expected)
    finally:
        dist.destroy_process_group()


def test_guidance_only_where_the_transformer_has_it(batch):
    from diffusers import FluxTransformer2DModel

    plain = FluxTransformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=96, pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    assert predict_velocity(plain, **batch, guidance=3.5).shape == batch["z_t"].shape


def test_guidance_and_time_matter(base, batch):
    v = predict_velocity(base, **batch)
    assert not torch.equal(v, predict_velocity(base, **batch, guidance=3.5))
    assert not torch.equal(v, predict_velocity(base, **{**batch, "t": 1 - batch["t"]}))


def test_mask_latents_are_the_palette_image(tiny):
    label_map = torch.randint(0, 19, (2, 16, 16))
    with torch.no_grad():
        z = mask_latents_of(tiny.vae, label_map)
        torch.testing.assert_close(z, encode_images(tiny.vae, palette_image(label_map)))


def test_errors(base):
    with pytest.raises(ValueError, match="no `mask` LoRA"):
        install_mask_branch(base)
