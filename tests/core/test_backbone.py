"""The backbone: packing as in FluxPipeline, latents, text, loading, the LoRA's size and file."""

from __future__ import annotations

import json

import pytest
import torch

from ec2face_core.backbone import (
    Backbone,
    decode_latents,
    encode_images,
    encode_text,
    load_backbone,
    pack,
    position_ids,
    unpack,
)
from ec2face_core.config import BackboneConfig, LoraConfig
from ec2face_core.io.lora_file import (
    LORA_FILE,
    LoraRecord,
    load_mask_lora,
    read_mask_lora,
    save_mask_lora,
)
from ec2face_core.io.sums import DamagedError
from ec2face_core.mask_branch import add_mask_lora, predict_velocity
from ec2face_lab.world.networks import save_backbone, tiny_backbone

CORPUS = [
    f"The {who} has {hair} hair and wears {what}."
    for who in ("man", "woman", "person")
    for hair in ("black", "blond", "wavy brown")
    for what in ("earrings", "a hat", "glasses", "a necklace")
]


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_backbone(CORPUS, seed=1)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "flux"
    save_backbone(tiny, path, dtype=torch.float16)
    return path


def test_a_saved_backbone_does_not_say_where_its_parts_were_read(folder, tmp_path):
    again = load_backbone(BackboneConfig(path=str(folder), dtype="float32"))
    save_backbone(again, tmp_path / "flux")
    settings = list((tmp_path / "flux").rglob("*.json"))
    assert len(settings) > 5
    assert not [file for file in settings if str(folder.parent) in file.read_text()]
    load_backbone(BackboneConfig(path=str(tmp_path / "flux")))  # its hashes are right


def test_tokens_are_flux_pipelines():
    from diffusers import FluxPipeline

    z = torch.randn(2, 8, 6, 10)
    torch.testing.assert_close(pack(z), FluxPipeline._pack_latents(z, 2, 8, 6, 10), rtol=0, atol=0)
    assert torch.equal(unpack(pack(z), 6, 10), z)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(position_ids(6, 10), ids)
    first, *rest = position_ids(6, 10, first=1).T
    assert (first == 1).all() and torch.equal(torch.stack(rest), ids.T[1:])
    assert position_ids(6, 10) is position_ids(6, 10)  # cached


def test_latents_are_scaled_modes_and_decode_inverts_the_scale(tiny):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    shift, scale = tiny.vae.config.shift_factor, tiny.vae.config.scaling_factor
    with torch.no_grad():
        z = encode_images(tiny.vae, images)
        mode = tiny.vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(z / scale + shift, mode)
        torch.testing.assert_close(decode_latents(tiny.vae, z), tiny.vae.decode(mode).sample)
    assert z.shape == (2, 8, 16, 16) and z.dtype == torch.float32
    leaf = z.requires_grad_()
    decode_latents(tiny.vae, leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_text_is_flux_pipelines(tiny):
    from diffusers import FluxPipeline

    prompts = [CORPUS[0], "", "Ünknown ✓ words!"]
    pipeline = FluxPipeline(**tiny.components())
    with torch.no_grad():
        tokens, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", max_sequence_length=24)
    text = encode_text(tiny, prompts, 24)
    assert torch.equal(text.tokens, tokens) and torch.equal(text.pooled, pooled)
    assert text.tokens.shape == (3, 24, 96) and text.pooled.shape == (3, 64)
    alone = encode_text(tiny, prompts[:1], 24)
    torch.testing.assert_close(alone.tokens, text.tokens[:1])

    mixed = text.where(torch.tensor([True, False, False]), encode_text(tiny, [""], 24))
    assert torch.equal(mixed.tokens[0], text.tokens[0])
    torch.testing.assert_close(mixed.tokens[2], text.tokens[1])
    assert len(text[1:]) == 2 and torch.equal(text[[2]].pooled, text.pooled[2:])


def test_save_and_load_a_folder(tiny, folder):
    loaded = load_backbone(BackboneConfig(path=str(folder), dtype="float32"))
    for before, after in zip(tiny.modules(), loaded.modules(), strict=True):
        assert not after.training and not any(p.requires_grad for p in after.parameters())
        assert after.dtype == torch.float32
        for a, b in zip(before.parameters(), after.parameters(), strict=True):
            assert torch.equal(a.half().float(), b)
    assert tiny.transformer.dtype == torch.float32  # saving did not touch it
    assert loaded.tokenizer(CORPUS[0]).input_ids == tiny.tokenizer(CORPUS[0]).input_ids
    assert loaded.tokenizer_2(CORPUS[0]).input_ids == tiny.tokenizer_2(CORPUS[0]).input_ids
    assert loaded.scheduler.config.use_dynamic_shifting

    part = load_backbone(BackboneConfig(path=str(folder), dtype="bfloat16"), parts=("vae",))
    assert part.vae.dtype == torch.bfloat16 and part.transformer is None
    assert part.tokenizer is None and part.scheduler is None


def test_missing_and_damaged_weights_name_the_setting(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"backbone\.path.*no such folder.*make foundation"):
        load_backbone(BackboneConfig(path="data/no/such"))
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DamagedError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
        load_backbone(BackboneConfig(path=str(broken)), parts=("vae",))
    (broken / "SHA256SUMS").unlink()  # nobody listed what the weights were
    with pytest.raises(FileNotFoundError, match=r"backbone\.path.*prepare --dry-run"):
        load_backbone(BackboneConfig(path=str(broken)), parts=("vae",))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match=r"backbone\.path.*safetensors"):
        load_backbone(BackboneConfig(path=str(broken)), parts=("vae",))  # not the pickle


def test_lora_of_flux_dev_is_below_a_thousandth():
    """Exact count on the meta device, against the sum of r * (in + out) done by hand."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    base = sum(p.numel() for p in transformer.parameters())
    trained = sum(p.numel() for p in add_mask_lora(transformer, LoraConfig()))
    d, r = 3072, 4
    double = 4 * (d + d) + (4 * d + d)  # q k v out, feed-forward out
    single = 3 * (d + d) + (d + 4 * d) + (5 * d + d)  # q k v, proj_mlp, proj_out
    dead = (d + d) + (d + 4 * d) + (5 * d + d)
    assert base == 11_901_408_320
    assert r * ((64 + d) + 19 * double + 38 * single) == 10_985_728
    assert trained == 10_985_728 - r * dead == 10_825_984
    assert trained / base < 0.001


def test_lora_file_round_trip(tiny, tmp_path):
    import copy

    config = LoraConfig(rank=3, alpha=6.0, mask_position="aligned")
    transformer = copy.deepcopy(tiny.transformer)
    for p in add_mask_lora(transformer, config):
        torch.nn.init.normal_(p, std=0.2)
    save_mask_lora(transformer, tmp_path, config, text_length=24)
    beside = {"SHA256SUMS", "adapter_config.json", "README.md"}
    assert {p.name for p in tmp_path.iterdir()} == {LORA_FILE, *beside}
    assert read_mask_lora(tmp_path) == LoraRecord(config, 24)

    z, z_mask = torch.randn(2, 1, 8, 16, 16)
    text = encode_text(tiny, [CORPUS[0]], 24)
    with torch.no_grad():
        expected = predict_velocity(transformer, z, torch.tensor([0.5]), text, z_mask)
        fresh = copy.deepcopy(tiny.transformer)
        assert load_mask_lora(fresh, tmp_path) == config
        assert torch.equal(predict_velocity(fresh, z, torch.tensor([0.5]), text, z_mask), expected)
        other = copy.deepcopy(tiny.transformer)  # an adapter that is there is replaced
        add_mask_lora(other, LoraConfig(rank=5))
        assert load_mask_lora(other, tmp_path) == config
        assert torch.equal(predict_velocity(other, z, torch.tensor([0.5]), text, z_mask), expected)


def test_lora_file_errors(tiny, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"ec2face_core\.train"):
        read_mask_lora(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": json.dumps("pt")})
    with pytest.raises(ValueError, match="not a mask LoRA of this project"):
        load_mask_lora(tiny.transformer, tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        read_mask_lora(tmp_path)
