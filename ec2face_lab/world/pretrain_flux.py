"""The miniature's transformer and text encoders, and the distillation of its guidance.

The transformer is pretrained on captions and on *generic* dense conditions of procedural scenes
(depth, normals, albedo, edges, low resolution, regions in random colours), given as extra tokens
in the layout of the mask branch. So it reads condition tokens before any LoRA exists, as
FLUX.1-dev can; the LoRA has to learn what the fixed colours of a semantic mask mean. Then its
classifier-free guidance is distilled into the guidance embedding, as FLUX.1-dev's is.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from ec2face_core.backbone import Backbone, TextEmbedding, load_backbone
from ec2face_core.config import BackboneConfig, load_profile
from ec2face_core.fast.blocks import blocks_of
from ec2face_core.flow import interpolate, target_velocity
from ec2face_core.mask_branch import predict_velocity
from ec2face_core.runs import path_digest, provenance, write_json

from .graphs import Replayed, optimiser_options
from .networks import save_backbone
from .pool import Pool
from .pretrain import (
    SEED,
    WARMUP,
    autocast,
    device_name,
    parameters_of,
    steps_done,
    with_trained_vae,
)
from .ranks import rank_of, share_of
from .sources import DataSource
from .training import Bf16Twin, blend, descend, set_learning_rates, train

Precision = Callable[[torch.device], AbstractContextManager]

WORTH_COMPILING = 20_000  # samples of a training

GUIDANCE = (1.0, 6.0)  # range of the guidance that is distilled


def attention(device: torch.device) -> AbstractContextManager:
    """The fastest attention that is right.

    The CPU's flash kernel has a slow backward pass for 160 tokens; cuDNN's backward pass ended with
    an illegal memory access for heads of 32 channels (torch 2.11, H100).
    """
    gpu = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(SDPBackend.MATH if device.type == "cpu" else gpu)


def _exact_times(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Times and guidance in float32: a bf16 transformer would round 700 to 696."""
    return (*module.exact, *inputs[2:])


class TextToVelocity(nn.Module):
    """Transformer and text encoders as one module."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.transformer = backbone.transformer
        self.clip = backbone.text_encoder
        self.t5 = backbone.text_encoder_2
        self.transformer.time_text_embed.register_forward_pre_hook(_exact_times)

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        ids: Tensor,
        z_condition: Tensor,
        alone: int = 0,
        guidance: float | Tensor = 1.0,
    ) -> Tensor:
        """Velocity `b c h w`.

        Args:
            z_t: noisy latents `b c h w`.
            t: times `(b,)`.
            ids: token ids of CLIP and of T5, `b 2 n`.
            z_condition: latents of the conditions `b c h w`.
            alone: so many samples have no condition tokens, the first ones.
            guidance: of the guidance embedding.
        """
        clip_ids, t5_ids = ids.unbind(1)
        text = TextEmbedding(self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output)
        if not isinstance(guidance, Tensor):  # made on the device: a CUDA graph copies nothing
            guidance = torch.full((len(z_t),), guidance, device=z_t.device)
        velocities = []
        for rows, z_c in ((slice(alone), None), (slice(alone, None), z_condition[alone:])):
            if len(z_t[rows]):
                g = guidance[rows]
                self.transformer.time_text_embed.exact = (1000 * t[rows], 1000 * g)
                velocities.append(
                    predict_velocity(self.transformer, z_t[rows], t[rows], text[rows], z_c, None, g)
                )
        return torch.cat(velocities)


def local_attention_init(transformer: nn.Module) -> None:
    """Let two heads of every block begin at the token's own place: one in the condition, one here.

    A constant part of q and k along rotary pairs makes the attention logit a sum of
    cos(frequency * distance), largest at distance 0 in rows and columns. Turning the first head's
    q by one radian on the frequency-1 pair of the first axis moves its peak to the token whose
    first id is larger by one: the condition token. A small transformer otherwise spends most of
    its training on finding this.
    """
    head = transformer.config.attention_head_dim
    first, rows, _ = transformer.config.axes_dims_rope
    place = [start + i for start in (first, first + rows) for i in (0, 2)]  # two frequencies each
    pairs = [0, 1, *(d + i for d in place for i in (0, 1))]
    with torch.no_grad():
        for block in blocks_of(transformer):
            for h, turn in enumerate((1.0, 0.0)):
                for linear, angle in ((block.attn.to_q, turn), (block.attn.to_k, 0.0)):
                    bias = linear.bias[h * head : (h + 1) * head]
                    bias[0] = 3.5 * math.cos(angle)
                    bias[1] = 3.5 * math.sin(angle)
                    bias[place] = 3.0
            for norm in (block.attn.norm_q, block.attn.norm_k):
                norm.weight[pairs] = 2.0


def _fastest(
    model: TextToVelocity, device: torch.device, samples: int
) -> tuple[Callable[..., Tensor], Callable[[Optimizer, Tensor, float], None], Precision]:
    """Forward pass, optimiser step and precision that suit the device.

    Returns:
        net: with the arguments of `model`.
        learn: (optimiser, loss, clip) makes one step.
        precision: device -> context of the forward pass.
    """
    if device.type == "cuda":
        twin = Bf16Twin(model)
        return twin, twin.descend, lambda _: nullcontext()
    _compile(model, samples)
    return model, descend, autocast


def _compile(model: TextToVelocity, samples: int) -> None:
    """Fuse what lies between the CPU's products: 1.6 times as fast (two cores, torch 2.15).

    A short training would end before it is compiled, which takes minutes.
    """
    if samples >= WORTH_COMPILING and any(map(shutil.which, ("g++", "clang++"))):
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


def _alone(number: int, batch: int) -> int:
    """Samples without condition tokens: all in three of ten steps, for one pass is fastest."""
    return batch if number % 10 in {0, 3, 6} else 0


def sample_times(batch: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Times `(b,)`: logistic-normal, as FLUX is trained, a little wider."""
    return torch.sigmoid(1.2 * torch.randn(batch, generator=generator, device=device))


def train_flux(
    source: DataSource,
    work: Path,
    samples: int,
    batch: int,
    lr: float,
    seconds: float = 0.0,
    start: Path | None = None,
) -> None:
    """Flow matching with captions (10 % dropped) and condition tokens (30 % dropped).

    The loss is reported on the last 256 faces of the pool: new faces of a procedural source, other
    passes over the same faces of a folder.

    Args:
        source: the faces.
        work: folder of the autoencoder and of the pool; writes `work/base`.
        samples: samples to train on.
        batch: samples of a step.
        lr: peak learning rate.
        seconds: limit in place of `samples`, see `training.train`; 0: none.
        start: folder of a FLUX whose transformer and text encoders the training begins with; None:
            random weights.
    """
    device = source.device
    share = share_of(batch)
    backbone = with_trained_vae(source, work)
    if start:
        _copy_weights(backbone, start)
    else:
        local_attention_init(backbone.transformer)
    model = TextToVelocity(backbone).train().to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=0.01, betas=(0.9, 0.99), **optimiser_options(device, lr)
    )
    pool = Pool(work, device)
    net, learn, precision = _fastest(model, device, samples)

    def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        set_learning_rates(optimizer, progress, WARMUP)
        x0, z_c, ids = pool.sample(share, 0.1, generator)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        t = sample_times(share, generator, device)
        values = update(_alone(number, share), x0=x0, z_c=z_c, ids=ids, noise=noise, t=t)
        blend(average, model, max(0.002, 9 / (number + 11)))
        return values

    def descend_once(
        alone: int, x0: Tensor, z_c: Tensor, ids: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        with precision(device), attention(device):
            v = net(interpolate(x0, noise, t), t, ids, z_c, alone)
        loss = F.mse_loss(v.float(), target_velocity(x0, noise))
        learn(optimizer, loss, 1.0)
        return {"loss": loss}

    update = Replayed(descend_once, device)
    evaluate = functools.partial(_flow_losses, average, pool)
    spent = train(
        work / "flux",
        step,
        {"model": model, "average": average, "optimizer": optimizer},
        SEED,
        steps=0 if seconds else samples // batch,
        seconds=seconds,
        evaluate=evaluate,
        device=device,
    )
    if rank_of()[0]:
        return
    quality = evaluate()
    _save(backbone, average, work / "base")
    record = {
        "seconds": spent,
        "samples": batch * steps_done(work / "flux"),
        "faces": source.name,
        "batch": batch,
        "learning_rate": lr,
        "device": device_name(device),
        "held_out_flow_loss": quality,
        "began_with": None,
        "autoencoder": json.loads((work / "vae.json").read_text()),
    }
    if start:
        before = parameters_of(start)
        before.pop("autoencoder", None)
        record["began_with"] = {"digest": path_digest(start), **before}
    write_json(work / "base.json", record)
    print(quality, flush=True)


def _copy_weights(backbone: Backbone, folder: Path) -> None:
    """Give a backbone the transformer and the text encoders of a FLUX folder."""
    known = load_backbone(BackboneConfig(path=str(folder), dtype="float32"))
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(backbone, name).load_state_dict(getattr(known, name).state_dict())


@torch.no_grad()
def _flow_losses(model: TextToVelocity, pool: Pool) -> dict[str, float]:
    """Flow loss on held-out faces at eight fixed times, with and without the condition tokens."""
    x0, z_c, ids = pool.held_out()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x0.shape, generator=generator).to(pool.device)
    t = ((torch.arange(len(x0)) % 8 + 0.5) / 8).to(pool.device)
    losses = {}
    with autocast(pool.device), attention(pool.device):
        for name, alone in (("condition", 0), ("text", len(x0))):
            v = model(interpolate(x0, noise, t), t, ids, z_c, alone)
            losses[name] = F.mse_loss(v.float(), target_velocity(x0, noise)).item()
    return losses


def _save(backbone: Backbone, model: TextToVelocity, folder: Path) -> None:
    """Write the backbone with the weights of `model`."""
    backbone.transformer.load_state_dict(model.transformer.state_dict())
    backbone.text_encoder.load_state_dict(model.clip.state_dict())
    backbone.text_encoder_2.load_state_dict(model.t5.state_dict())
    save_backbone(backbone.to("cpu"), folder)


# ------------------------------------------------------------------------------- distillation


def distill_guidance(
    source: DataSource,
    out: Path,
    work: Path,
    samples: int,
    batch: int,
    lr: float,
    seconds: float = 0.0,
) -> None:
    """Distil classifier-free guidance into the guidance embedding (arXiv 2210.03142, stage one).

    The teacher is the trained base: v(null text) + g (v(text) - v(null text)). One pass of the
    student with guidance g learns to predict it, with and without condition tokens; a quarter of
    the samples has g = 1, with which LoRAs are trained.

    Args:
        source: the faces; only its device and name are used.
        out: folder of the bundle; writes `out/flux`.
        work: folder of the pool and of `work/base`.
        samples: samples to train on.
        batch: samples of a step.
        lr: peak learning rate.
        seconds: limit in place of `samples`, see `training.train`; 0: none.
    """
    device = source.device
    share = share_of(batch)
    backbone = load_backbone(BackboneConfig(path=str(work / "base"), dtype="float32"))
    model = TextToVelocity(backbone).to(device)
    teacher = copy.deepcopy(model)
    average = copy.deepcopy(model)
    model.transformer.requires_grad_(True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, weight_decay=0.0, betas=(0.9, 0.99), **optimiser_options(device, lr)
    )
    pool = Pool(work, device)
    net, learn, precision = _fastest(model, device, samples)
    if device.type == "cuda":
        teacher.to(torch.bfloat16)
    else:
        _compile(teacher, samples)

    def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        set_learning_rates(optimizer, progress, WARMUP)
        options: dict[str, Any] = {"generator": generator, "device": device}
        x0, z_c, ids = pool.sample(share, 0.05, generator)
        null = pool.null.long().expand_as(ids)
        noise = torch.randn(x0.shape, **options)
        t = sample_times(share, generator, device)
        low, high = GUIDANCE
        g = low + (high - low) * torch.rand(share, **options)
        g = torch.where(torch.rand(share, **options) < 0.25, low, g)
        values = update(
            _alone(number, share), x0=x0, z_c=z_c, ids=ids, null=null, noise=noise, t=t, g=g
        )
        blend(average, model, max(0.005, 9 / (number + 11)))
        return values

    def descend_once(
        alone: int, x0: Tensor, z_c: Tensor, ids: Tensor, null: Tensor, noise: Tensor, t: Tensor,
        g: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        z_t = interpolate(x0, noise, t)
        with precision(device), attention(device):
            with torch.no_grad():
                v_text = teacher(z_t, t, ids, z_c, alone).float()
                v_null = teacher(z_t, t, null, z_c, alone).float()
            v = net(z_t, t, ids, z_c, alone, g)
        target = v_null + g.view(-1, 1, 1, 1) * (v_text - v_null)
        loss = F.mse_loss(v.float(), target)
        learn(optimizer, loss, 1.0)
        return {"loss": loss}

    update = Replayed(descend_once, device)
    spent = train(
        work / "distill",
        step,
        {"model": model, "average": average, "optimizer": optimizer},
        SEED + 1,
        steps=0 if seconds else samples // batch,
        seconds=seconds,
        device=device,
    )
    if rank_of()[0]:
        return
    quality = _flow_losses(average, pool)
    backbone.transformer.load_state_dict(average.transformer.state_dict())
    save_backbone(backbone.to("cpu"), out / "flux")
    base = json.loads((work / "base.json").read_text())
    record = provenance(
        load_profile("mini128"),
        **{
            **base,
            "seconds": base["seconds"] + spent,
            "distillation": {
                "seconds": spent,
                "samples": batch * steps_done(work / "distill"),
                "guidance": GUIDANCE,
                "held_out_flow_loss": quality,
            },
        },
    )
    write_json(out / "flux" / "provenance.json", record)
    print(quality, flush=True)
