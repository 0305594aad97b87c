"""Both attention modes against a dense forward in plain algebra; decoupled: one pass per mask."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ec2face_core.backbone import TextEmbedding, encode_text, pack, unpack
from ec2face_core.config import Config, ConfigError, LoraConfig
from ec2face_core.inference.inputs import flux_timesteps
from ec2face_core.io.lora_file import LoraRecord, load_mask_lora, read_mask_lora, save_mask_lora
from ec2face_core.mask_branch import (
    add_mask_lora,
    guided_velocity,
    install_mask_branch,
    is_decoupled,
    mask_latents_of,
    precompute_mask_kv,
    predict_velocity,
)
from ec2face_core.pipeline import EC2FacePipeline
from ec2face_core.trainer import Trainer
from ec2face_lab.world.networks import tiny_backbone

B, T, N, M = 3, 7, 16, 4  # samples; text, noise and mask tokens
CORPUS = ["she has wavy hair.", "a man with a hat and glasses."]
MODES = ("joint", "decoupled")


def lora(attention: str, **changes) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 8.0, "attention": attention} | changes)


@pytest.fixture(scope="module")
def tiny():
    return tiny_backbone(CORPUS)


@pytest.fixture(scope="module", params=MODES)
def both(request, tiny) -> nn.Module:
    """Adapted transformers of both modes, with the same weights; not to be changed."""
    return adapted(tiny, request.param)


@pytest.fixture(scope="module")
def transformer(tiny) -> nn.Module:
    """Decoupled; not to be changed."""
    return adapted(tiny, "decoupled")


def adapted(tiny, attention: str, seed: int = 0, **changes) -> nn.Module:
    """A copy of the base with a mask LoRA that does something."""
    transformer = copy.deepcopy(tiny.transformer)
    torch.manual_seed(seed)
    for p in add_mask_lora(transformer, lora(attention, **changes)):
        nn.init.normal_(p, std=0.2)
    return transformer


def new_batch(seed: int = 5) -> dict:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "z_t": draw(B, 8, 8, 8),
        "t": torch.rand(B, generator=g),
        "text": TextEmbedding(draw(B, T, 96), draw(B, 64)),
        "mask_latents": draw(B, 8, 4, 4),
    }


@pytest.fixture
def batch() -> dict:
    return new_batch()


def gradients(transformer: nn.Module, v: Tensor) -> list[Tensor]:
    """Of a fixed function of the velocity, for every LoRA parameter."""
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    return torch.autograd.grad((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum(), parameters)


def assert_close(left, right, atol: float = 2e-5) -> None:
    torch.testing.assert_close(left, right, atol=atol, rtol=1e-4)


def assert_gradients_close(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() and b.norm() > 0


# ----------------------------------------------------------------------- the dense reference


class Dense:
    """FLUX over all tokens at once, from the weights alone: every token has its own modulation and
    its own weights, every pair of tokens its own weight in an explicit softmax."""

    def __init__(self, transformer: nn.Module):
        self.net = transformer

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """W x + b, and for mask tokens, the last of their stream, + (alpha / r) B A x."""
        base = getattr(layer, "base_layer", layer)
        y = F.linear(x, base.weight, base.bias)
        if base is layer:
            return y
        gate = torch.zeros(x.shape[1], 1)
        gate[-M:] = 8.0 / 4
        return y + gate * (x @ layer.lora_A["mask"].weight.T @ layer.lora_B["mask"].weight.T)

    def embedding(self, t: Tensor, guidance: float, pooled: Tensor) -> Tensor:
        def mlp(module: nn.Module, x: Tensor) -> Tensor:
            return module.linear_2(F.silu(module.linear_1(x)))

        def sinusoid(x: Tensor) -> Tensor:
            angles = 1000 * x[:, None] * 10000 ** (-torch.arange(128) / 128)
            return torch.cat([angles.cos(), angles.sin()], dim=-1)

        e = self.net.time_text_embed
        timed = mlp(e.timestep_embedder, sinusoid(t))
        guided = mlp(e.guidance_embedder, sinusoid(torch.full_like(t, guidance)))
        return timed + guided + mlp(e.text_embedder, pooled)

    def heads(self, x: Tensor, norm: nn.Module, angle: Tensor) -> Tensor:
        """Queries or keys `b heads tokens 32`: RMS norm, then turned by their places."""
        x = x.unflatten(-1, (4, 32)).transpose(1, 2)
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(3)

    def __call__(self, z_t, t, text, mask_latents, visible, strength=1.0, guidance=1.0) -> Tensor:
        """visible: `(b, tokens, tokens)` bool, query x key. Mask tokens that do not see the text
        are modulated with t = 0, guidance 1 and a pooled zero, others with the sample's own."""
        net, (b, _, h, w) = self.net, z_t.shape
        image = torch.cat([pack(z_t), pack(mask_latents)], dim=1)
        x, c = self.linear(net.x_embedder, image), net.context_embedder(text.tokens)
        own = self.embedding(t, guidance, text.pooled)
        fixed = self.embedding(torch.zeros(b), 1.0, torch.zeros_like(text.pooled))
        masks = own if visible[:, -1, 0].any() else fixed
        e = F.silu(torch.stack([*[own] * (T + N), *[masks] * M], dim=1))  # b tokens d

        def grid(first: int, side: int) -> list[tuple[int, int, int]]:
            return [(first, row, column) for row in range(side) for column in range(side)]

        places = torch.tensor([(0, 0, 0)] * T + grid(0, 4) + grid(1, 2)).double()
        turns = [10000 ** (-torch.arange(0, d, 2).double() / d) for d in (8, 12, 12)]
        angle = torch.cat([places[:, [i]] * turn for i, turn in enumerate(turns)], dim=1)
        bias = torch.zeros(b, 1, T + N + M, T + N + M).masked_fill(~visible[:, None], -math.inf)
        bias[:, :, :-M, -M:] += math.log(strength)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = (q @ k.transpose(-1, -2) / 32**0.5 + bias).exp()
            weights = weights / weights.sum(-1, keepdim=True)
            return (weights @ v.unflatten(-1, (4, 32)).transpose(1, 2)).transpose(1, 2).flatten(2)

        def modulated(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale) + shift

        def gelu(y: Tensor) -> Tensor:
            return F.gelu(y, approximate="tanh")

        for block in net.transformer_blocks:
            a = block.attn
            mc = block.norm1_context.linear(e[:, :T]).chunk(6, dim=-1)
            mx = block.norm1.linear(e[:, T:]).chunk(6, dim=-1)
            nc, nx = modulated(c, *mc[:2]), modulated(x, *mx[:2])
            q, k = (
                torch.cat([self.heads(qc, norm_c, angle[:T]), self.heads(qx, norm, angle[T:])], 2)
                for qc, norm_c, qx, norm in (
                    (a.add_q_proj(nc), a.norm_added_q, self.linear(a.to_q, nx), a.norm_q),
                    (a.add_k_proj(nc), a.norm_added_k, self.linear(a.to_k, nx), a.norm_k),
                )
            )
            out = attend(q, k, torch.cat([a.add_v_proj(nc), self.linear(a.to_v, nx)], 1))
            c = c + mc[2] * a.to_add_out(out[:, :T])
            x = x + mx[2] * self.linear(a.to_out[0], out[:, T:])
            fc, fx = block.ff_context.net, block.ff.net
            c = c + mc[5] * fc[2](gelu(fc[0].proj(modulated(c, *mc[3:5]))))
            x = x + mx[5] * self.linear(fx[2], gelu(fx[0].proj(modulated(x, *mx[3:5]))))
        y = torch.cat([c, x], dim=1)
        for block in net.single_transformer_blocks:
            a, (shift, scale, gate) = block.attn, block.norm.linear(e).chunk(3, dim=-1)
            ny = modulated(y, shift, scale)
            q = self.heads(self.linear(a.to_q, ny), a.norm_q, angle)
            k = self.heads(self.linear(a.to_k, ny), a.norm_k, angle)
            out = attend(q, k, self.linear(a.to_v, ny))
            both = torch.cat([out, gelu(self.linear(block.proj_mlp, ny))], dim=-1)
            y = y + gate * self.linear(block.proj_out, both)
        scale, shift = net.norm_out.linear(F.silu(own))[:, None].chunk(2, dim=-1)
        return unpack(net.proj_out(modulated(y[:, T:-M], shift, scale)), h, w)


def visibility(attention: str, keep: Tensor | None) -> Tensor:
    """Query x key over [text, noise, mask]."""
    visible = torch.ones(B, T + N + M, T + N + M, dtype=torch.bool)
    if keep is not None:
        visible[~keep, :, -M:] = False
    if attention == "decoupled":
        visible[:, -M:, :-M], visible[:, -M:, -M:] = False, True
    return visible


@pytest.mark.parametrize(
    "keep, strength, guidance",
    [
        (None, 1.0, 1.0),
        (None, 2.5, 3.5),
        ([True, False, True], 1.0, 1.0),
        ([False, True, True], 0.3, 2.0),
    ],
)
def test_equals_a_dense_forward_with_its_gradient(both, batch, keep, strength, guidance):
    """Velocity, gradient by the noisy latent and by every LoRA parameter."""
    keep = None if keep is None else torch.tensor(keep)
    batch["z_t"].requires_grad_()
    of = {"keep_mask": keep, "mask_strength": strength, "guidance": guidance}
    v = predict_velocity(both, **batch, **of)
    visible = visibility(both.mask_branch.config.attention, keep)
    expected = Dense(both)(**batch, visible=visible, strength=strength, guidance=guidance)
    assert_close(v, expected)
    by_z = [
        torch.autograd.grad(y.square().sum(), batch["z_t"], retain_graph=True)
        for y in (v, expected)
    ]
    assert_gradients_close(*by_z)
    assert_gradients_close(gradients(both, v), gradients(both, expected))


# -------------------------------------------------------------------------------- both modes


def test_strength_one_is_off_and_zero_is_no_mask(both, batch, monkeypatch):
    v = predict_velocity(both, **batch)
    assert torch.equal(predict_velocity(both, **batch, mask_strength=1.0), v)
    none = predict_velocity(both, **{**batch, "mask_latents": None})
    assert torch.equal(predict_velocity(both, **batch, mask_strength=0), none)
    almost = predict_velocity(both, **batch, mask_strength=1e-9)
    assert_close(almost, none)
    assert (v - none).abs().max() > 1e-2
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="mask_strength must be"):
            predict_velocity(both, **batch, mask_strength=wrong)
    seen = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention",
        lambda *a, **k: (seen.append(k.get("attn_mask")), attention(*a, **k))[1],
    )  # fmt: skip
    predict_velocity(both, **batch, mask_strength=1.0, keep_mask=torch.ones(B, dtype=torch.bool))
    assert seen and not any(mask is not None for mask in seen)


def test_without_mask_tokens_it_is_the_base_model(tiny, both, batch):
    batch["mask_latents"] = None
    assert torch.equal(predict_velocity(both, **batch), predict_velocity(tiny.transformer, **batch))


def test_gradient_checkpointing_changes_no_bit(tiny, batch):
    for attention in MODES:
        net = adapted(tiny, attention)
        keep = torch.tensor([True, False, True])
        plain = gradients(net, predict_velocity(net, **batch, keep_mask=keep))
        net.enable_gradient_checkpointing()
        v = predict_velocity(net, **batch, keep_mask=keep)
        for a, b in zip(plain, gradients(net, v), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_blocks_compile_without_a_graph_break(tiny, batch):
    for attention in MODES:
        torch._dynamo.reset()
        net = adapted(tiny, attention)
        expected = [predict_velocity(net, **batch), predict_velocity(net, **batch, mask_strength=2)]
        by_lora = gradients(net, expected[0])
        net.compile_repeated_blocks(fullgraph=True, backend="eager")
        v = predict_velocity(net, **batch)
        assert_close(v, expected[0])
        assert_close(predict_velocity(net, **batch, mask_strength=2), expected[1])
        assert_gradients_close(gradients(net, v), by_lora)
    torch._dynamo.reset()


def test_ddp_takes_it_as_it_is(transformer, batch, tmp_path):
    net, dist = copy.deepcopy(transformer), torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ddp", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        for _ in range(2):  # the second step is where DDP complains of unused parameters
            v = predict_velocity(wrapped, **batch)
            v.square().mean().backward()
        assert torch.equal(v, predict_velocity(transformer, **batch))
        # the mask branch by itself is a second call of the wrapper before one backward
        net.zero_grad()
        memory = precompute_mask_kv(wrapped, batch["mask_latents"])
        v = predict_velocity(wrapped, **{**batch, "mask_latents": memory})
        v.square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in net.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()


def test_the_file_decides_the_mode(tiny, batch, tmp_path):
    """One transformer, adapters of both modes in turn; also where offloading came first."""
    from accelerate import cpu_offload_with_hook
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    expected = {}
    for attention in MODES:
        net = adapted(tiny, attention)
        save_mask_lora(net, tmp_path / attention, lora(attention), text_length=T)
        assert read_mask_lora(tmp_path / attention) == LoraRecord(lora(attention), T)
        expected[attention] = predict_velocity(net, **batch)
    assert (expected["joint"] - expected["decoupled"]).abs().max() > 1e-2
    offloaded = copy.deepcopy(tiny.transformer)
    cpu_offload_with_hook(offloaded, execution_device=torch.device("cpu"))
    for net in (copy.deepcopy(tiny.transformer), offloaded):
        for attention in ("decoupled", "joint", "decoupled"):
            load_mask_lora(net, tmp_path / attention)
            assert is_decoupled(net) == (attention == "decoupled")
            assert_close(predict_velocity(net, **batch), expected[attention], atol=1e-5)
            assert_close(predict_velocity(copy.deepcopy(net), **batch), expected[attention], 1e-5)
            stock = {type(p) is FluxAttnProcessor for p in net.attn_processors.values()}
            assert stock == {attention == "joint"}


def test_a_plain_load_is_told_to_name_the_mode(tiny, transformer, batch, tmp_path):
    """Without it the adapter would silently run in joint attention, on all tokens."""
    from diffusers import FluxPipeline

    save_mask_lora(transformer, tmp_path, lora("decoupled"), text_length=T)
    net = copy.deepcopy(tiny.transformer)
    pipe = FluxPipeline(**{**tiny.components(), "transformer": net})
    pipe.load_lora_weights(str(tmp_path), adapter_name="mask")
    with pytest.raises(ValueError, match="settings of the `mask` LoRA are unknown"):
        install_mask_branch(net)
    install_mask_branch(net, read_mask_lora(tmp_path).lora)
    expected = predict_velocity(transformer, **batch)
    assert_close(predict_velocity(net, **batch), expected, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot be fused"):
        pipe.fuse_lora()


# ----------------------------------------------------------------------------- the mask's memory


@pytest.mark.parametrize("keep", [None, [True, False, True]])
@pytest.mark.parametrize("strength", [1.0, 1.7])
def test_one_pass_over_the_mask_serves_all_texts_times_seeds(transformer, keep, strength):
    keep = None if keep is None else torch.tensor(keep)
    masks = new_batch()["mask_latents"]
    with torch.no_grad():
        memory = precompute_mask_kv(transformer, masks)
        assert memory.tokens == M and len(memory.pairs) == 6
        for seed, rows in ((1, [0, 1, 2]), (2, [2, 2, 0]), (3, [1, 1, 1])):
            batch = new_batch(seed)
            of = {"keep_mask": keep, "mask_strength": strength, "guidance": float(seed)}
            rows = torch.tensor(rows)
            expected = predict_velocity(transformer, **{**batch, "mask_latents": masks[rows]}, **of)
            batch["mask_latents"] = memory[rows]
            assert_close(predict_velocity(transformer, **batch, **of), expected, atol=1e-5)
            batch["mask_latents"] = memory[rows.flip(0)][torch.tensor([2, 1, 0])]
            assert_close(predict_velocity(transformer, **batch, **of), expected, atol=1e-5)


def test_the_lora_is_computed_once_and_on_mask_tokens_only(transformer, batch):
    net, lengths = copy.deepcopy(transformer), []
    for name, layer in net.named_modules():
        if name.endswith("lora_A.mask"):
            layer.register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    memory = precompute_mask_kv(net, batch["mask_latents"])
    assert lengths == [M] * (1 + 2 * 5 + 4 * 5 - 3)
    for _ in range(3):
        predict_velocity(net, **{**batch, "mask_latents": memory})
    assert len(lengths) == 1 + 2 * 5 + 4 * 5 - 3


def test_draws_that_share_a_mask_share_its_gradient(transformer, batch):
    """The memory is differentiable: K noise draws through one mask pass, exactly."""
    draws = [new_batch(seed) | {"mask_latents": batch["mask_latents"]} for seed in (1, 2, 3)]
    apart = [gradients(transformer, predict_velocity(transformer, **draw)) for draw in draws]
    memory = precompute_mask_kv(transformer, batch["mask_latents"])
    vs = [predict_velocity(transformer, **{**draw, "mask_latents": memory}) for draw in draws]
    weights = torch.linspace(-1, 1, vs[0].numel()).view_as(vs[0])
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    shared = torch.autograd.grad(sum((v * weights).sum() for v in vs), parameters)
    assert_gradients_close(shared, [sum(g) for g in zip(*apart, strict=True)])


def test_a_memory_is_for_decoupled_attention_only(tiny, transformer, batch):
    joint = adapted(tiny, "joint")
    with pytest.raises(ValueError, match=r"only with lora\.attention 'decoupled'"):
        precompute_mask_kv(joint, batch["mask_latents"])
    batch["mask_latents"] = precompute_mask_kv(transformer, batch["mask_latents"])
    with pytest.raises(ValueError, match="has joint attention"):
        predict_velocity(joint, **batch)


def test_half_precision_and_a_base_without_guidance(tiny, batch):
    net = copy.deepcopy(tiny.transformer).to(torch.bfloat16)
    add_mask_lora(net, lora("decoupled"))
    with torch.autocast("cpu", torch.bfloat16):
        memory = precompute_mask_kv(net, batch["mask_latents"])
    for masks in (batch["mask_latents"], memory):
        v = predict_velocity(net, **{**batch, "mask_latents": masks})
        assert v.dtype == torch.float32 and v.isfinite().all()

    from diffusers import FluxTransformer2DModel

    plain = FluxTransformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=96, pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    add_mask_lora(plain, lora("decoupled", mask_position="aligned"))
    assert predict_velocity(plain, **batch, guidance=3.5).shape == batch["z_t"].shape


# ------------------------------------------------------------------------- pipeline and trainer


@pytest.fixture(scope="module")
def label_map() -> Tensor:
    blocks = torch.arange(64).reshape(8, 8) % 19
    return blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)


def pipeline(tiny, transformer: nn.Module) -> EC2FacePipeline:
    parts = {**tiny.components(), "transformer": transformer}
    pipe = EC2FacePipeline(**parts, text_length=24, image_size=32, guidance=1.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_the_pipeline_remembers_masks_and_samples_as_without(tiny, transformer, label_map):
    """Two masks and none, two texts, guidances, strength: a loop that runs the mask each time."""
    net, passes = copy.deepcopy(transformer), []
    net.x_embedder.lora_A["mask"].register_forward_hook(lambda *_: passes.append(1))
    pipe, steps = pipeline(tiny, net), 3
    prompts, masks = [CORPUS[0], CORPUS[1], ""], [label_map, None, label_map.T]
    noise = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    images = pipe(
        prompts, masks, num_inference_steps=steps, text_guidance=2.0, mask_guidance=1.5,
        mask_strength=1.3, latents=noise, output_type="pt",
    ).images  # fmt: skip
    assert len(passes) == 1

    maps = torch.stack([label_map, torch.zeros(32, 32).long(), label_map.T])
    text, null = encode_text(pipe, prompts, 24), encode_text(pipe, [""] * 3, 24)
    condition = (text, null, mask_latents_of(tiny.vae, maps), torch.tensor([True, False, True]))
    z = noise
    for time in flux_timesteps(pipe.scheduler, steps, 16, "cpu"):
        t = (time / 1000).expand(3)
        v = guided_velocity(transformer, z, t, *condition, 1.0, 2.0, 1.5, mask_strength=1.3)
        z = pipe.scheduler.step(v, time, z, return_dict=False)[0]
    from ec2face_core.backbone import decode_latents

    assert_close(images, (decode_latents(tiny.vae, z) / 2 + 0.5).clamp(0, 1), atol=1e-4)


def test_the_pipeline_s_strength(tiny, both, label_map):
    pipe = pipeline(tiny, both)

    def draw(*args, **kwargs) -> Tensor:
        g = torch.Generator().manual_seed(1)
        return pipe(*args, generator=g, num_inference_steps=2, output_type="pt", **kwargs).images

    text = draw(CORPUS[0])
    assert torch.equal(draw(CORPUS[0], label_map, mask_strength=0), text)
    weak, full = (draw(CORPUS[0], label_map, mask_strength=s) for s in (0.01, 1.0))
    assert (weak - text).norm() < (full - text).norm() / 3
    with pytest.raises(ValueError, match="mask_strength must be"):
        draw(CORPUS[0], label_map, mask_strength=-0.5)


def test_stock_kontext_pipeline_draws_the_same_face(tiny, both, label_map):
    """Neither mode needs our pipeline: the mask tokens are found by their position ids."""
    from diffusers import FluxKontextPipeline

    from ec2face_core.attributes import palette_image

    expected = pipeline(tiny, both)(
        CORPUS[0], label_map, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    kontext = FluxKontextPipeline(**{**tiny.components(), "transformer": both})
    kontext.set_progress_bar_config(disable=True)
    images = kontext(
        image=palette_image(label_map[None]) / 2 + 0.5, prompt=CORPUS[0], height=32, width=32,
        max_area=32 * 32, _auto_resize=False, guidance_scale=1.0, max_sequence_length=24,
        num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    assert_close(images, expected, atol=1e-5)


def test_the_trainer_trains_it_and_the_pipeline_obeys_the_file(tiny_config: Config, tmp_path):
    config = tiny_config.replace(
        lora={"attention": "decoupled"}, trainer={"steps": 2, "gradient_checkpointing": True}
    )
    final = Trainer(config, "none", tmp_path / "run").fit()
    assert read_mask_lora(final).lora.attention == "decoupled"
    pipe = EC2FacePipeline.from_config(config.replace(lora={"attention": "joint"}), variant=None)
    pipe.load_mask_lora(final)
    assert is_decoupled(pipe.transformer)
    pipe.save_pretrained(tmp_path / "pipe")
    assert is_decoupled(EC2FacePipeline.from_pretrained(tmp_path / "pipe").transformer)
    with pytest.raises(ConfigError, match=r"lora\.attention decoupled -> joint"):
        Trainer(
            config.replace(lora={"attention": "joint"}, trainer={"steps": 3}),
            "none",
            tmp_path / "run",
        ).fit()
