"""What diffusers offers against short memory works with the mask branch: quantised base, tiling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ec2face_core.backbone import TextEmbedding, decode_latents
from ec2face_core.config import LoraConfig
from ec2face_core.io.lora_file import load_mask_lora, save_mask_lora
from ec2face_core.mask_branch import add_mask_lora, predict_velocity
from ec2face_lab.world.networks import tiny_backbone


@pytest.fixture(scope="module")
def tiny():
    return tiny_backbone(["a face", "a person with a hat"])


@pytest.fixture
def batch() -> dict:
    g = torch.Generator().manual_seed(5)
    z_t, z_mask = torch.randn(2, 2, 8, 8, 8, generator=g)
    text = TextEmbedding(torch.randn(2, 7, 96, generator=g), torch.randn(2, 64, generator=g))
    return {"z_t": z_t, "t": torch.tensor([0.2, 0.8]), "text": text, "mask_latents": z_mask}


def quantised(transformer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The blocks' linear layers in 4 bits by bitsandbytes, and the same numbers in float32.

    What `from_pretrained(quantization_config=...)` makes, which itself asks for a GPU.
    """
    bnb = pytest.importorskip("bitsandbytes")
    small, same = copy.deepcopy(transformer), copy.deepcopy(transformer)
    linear = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks" in name
    ]
    for name in linear:
        old, parent = small.get_submodule(name), small.get_submodule(name.rpartition(".")[0])
        bias = old.bias is not None
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias, torch.float32, quant_type="nf4"
        )
        new.load_state_dict(old.state_dict())
        new = new.to("cpu").requires_grad_(False)
        setattr(parent, name.rpartition(".")[2], new)
        weight = bnb.functional.dequantize_4bit(new.weight.data, new.weight.quant_state)
        same.get_submodule(name).weight.data.copy_(weight)
    small.is_loaded_in_4bit = True
    return small, same


@pytest.mark.parametrize("attention", ["joint", "decoupled"])
@torch.no_grad()
def test_a_quantised_base_obeys_the_mask_branch(tiny, batch, tmp_path, attention):
    config = LoraConfig(rank=4, alpha=8.0, attention=attention)
    adapted = copy.deepcopy(tiny.transformer)
    torch.manual_seed(0)
    for p in add_mask_lora(adapted, config):
        nn.init.normal_(p, std=0.2)
    save_mask_lora(adapted, tmp_path, config, 7)

    small, same = quantised(tiny.transformer)
    plain = predict_velocity(small, **{**batch, "mask_latents": None})
    for transformer in (small, same):
        load_mask_lora(transformer, tmp_path)
    v = predict_velocity(small, **batch)
    torch.testing.assert_close(v, predict_velocity(same, **batch), rtol=1e-4, atol=1e-4)
    assert (v - plain).abs().mean() > 1e-2
    # text and noise tokens meet the base alone
    assert torch.equal(predict_velocity(small, **{**batch, "mask_latents": None}), plain)


@torch.no_grad()
def test_decoding_in_tiles_changes_little(tiny):
    vae = copy.deepcopy(tiny.vae)
    z = torch.randn(
        1, vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0)
    )
    whole = decode_latents(vae, z)
    factor = whole.shape[-1] // 16
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 12, 12 * factor
    tiles = decode_latents(vae, z)
    assert tiles.shape == whole.shape and not torch.equal(tiles, whole)
    assert (tiles - whole).abs().mean() < 0.5 * whole.std()
