"""Train the miniature's foundation model from nothing: the counterpart of FLUX.1-dev.

    vae        autoencoder                      -> runs/foundation
    latents    a pool of encoded faces          -> runs/foundation
    flux       transformer and text encoders    -> data/mini/flux

With `--data ROOT --out DIR` the stages train on photographs of faces, and everything lies in DIR.

The transformer is pretrained on captions and on *generic* dense conditions of procedural scenes
(depth, normals, albedo, edges, low resolution, regions in random colours), given as extra tokens
in the layout of the mask branch. So it reads condition tokens before any LoRA exists, as
FLUX.1-dev can; the LoRA has to learn what the fixed colours of a semantic mask mean. Every stage
resumes when it is run again. `make foundation` runs all of them, and `pretrain_perception`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ec2face_core.attributes import pixel_counts
from ec2face_core.backbone import Backbone, TextEmbedding, encode_images, save_backbone
from ec2face_core.config import ROOT, load_profile, resolve
from ec2face_core.fast.blocks import blocks_of
from ec2face_core.flow import interpolate, target_velocity
from ec2face_core.losses import class_weights
from ec2face_core.mask_branch import predict_velocity
from ec2face_core.metrics import psnr
from ec2face_core.runs import provenance, whole_file, write_json
from ec2face_core.train import leave_group

from .networks import tiny_backbone
from .sources import DataSource, Description, caption_of, dense_condition
from .training import descend, moving_average, set_learning_rates, train

SEED = 5_001

TEXT_LENGTH = 32

WARMUP = 0.03  # of the steps

VOCABULARY = 10**7  # number of the first face whose captions make the vocabularies

POOL = 10**6  # number of the first face of the latent pool

# The backward pass of the CPU's flash kernel is slower than plain matrix products at 160 tokens.
FASTEST_SDPA = SDPBackend.EFFICIENT_ATTENTION if torch.cuda.is_available() else SDPBackend.MATH


def work_folder(out: Path) -> Path:
    """Folder of the checkpoints and of the latent pool of a bundle."""
    return ROOT / "runs" / "foundation" if out == resolve("data/mini") else out / "training"


def untrained(source: DataSource) -> Backbone:
    """The miniature's FLUX with the vocabularies of a data source and random weights."""
    return tiny_backbone(source.corpus(SEED, VOCABULARY), SEED)


# ------------------------------------------------------------------------------- autoencoder


def train_vae(source: DataSource, work: Path, samples: int, batch: int = 16) -> None:
    """Train the autoencoder; writes `work/vae.pt` and its scale, `work/vae.json`.

    The loss is L1 + L2 + edges, weighted towards small parts, and a small KL term; 30 % of the
    pictures are dense conditions.

    Args:
        source: the faces.
        work: folder of checkpoints and results.
        samples: pictures to train on.
        batch: pictures of a step.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    vae = untrained(source).vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=1e-4, fused=True)
    held_out = source.held_out_scenes(SEED, 128).image
    # Weights of small parts (eyes, lips, jewellery) replace the perceptual loss of a large model.
    counts = pixel_counts(source.held_out_scenes(SEED, 256).label_map).sum(0)
    detail = class_weights(counts).pow(0.35).clamp(max=8).float()
    detail = detail / (detail * counts / counts.sum()).sum()
    # a low resolution is no harder to encode than the face itself
    kinds = [kind for kind in source.condition_shares if kind != "low resolution"]
    n = batch * 3 // 10

    def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        set_learning_rates(optimizer, progress, WARMUP)
        faces, _ = source.scenes(SEED, number * batch, batch)
        condition = dense_condition(kinds[number % len(kinds)], faces, generator)
        x = torch.cat([faces.image[n:], condition[:n]])
        w = detail[torch.cat([faces.label_map[n:], faces.label_map[:n]])][:, None]
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encoder(x)
        posterior = DiagonalGaussianDistribution(moments.float())
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decoder(posterior.sample(generator)).float()
        edges = (w[..., :-1, :-1] * _gradient(y - x)).mean()
        z = posterior.mean
        spread = (z.mean((0, 2, 3)) ** 2 + (z.std((0, 2, 3)) - 1) ** 2).mean()
        loss = (w * (y - x).abs()).mean() + 2 * (w * (y - x) ** 2).mean() + 0.5 * edges
        loss = loss + 1e-6 * posterior.kl().mean() + 0.01 * spread
        descend(optimizer, loss, clip=1.0)
        return {"loss": loss}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        z = vae.encode(held_out).latent_dist.mode()
        values = psnr(vae.decode(z).sample.clamp(-1, 1), held_out)
        return {"shift": z.mean().item(), "scale": 1 / z.std().item(), "psnr": values.mean().item()}

    state = {"vae": vae, "optimizer": optimizer}
    seconds = train(work / "vae", step, state, SEED, steps=samples // batch, evaluate=evaluate)
    with whole_file(work / "vae.pt") as part:
        torch.save(vae.state_dict(), part)
    result = {**evaluate(), "samples": samples, "seconds": round(seconds)}
    write_json(work / "vae.json", result)
    print(result, flush=True)


def _gradient(x: Tensor) -> Tensor:
    """Sum of the absolute differences to the lower and the right neighbour, `b c h-1 w-1`."""
    down = x[..., 1:, :-1] - x[..., :-1, :-1]
    right = x[..., :-1, 1:] - x[..., :-1, :-1]
    return down.abs() + right.abs()


def _with_trained_vae(source: DataSource, work: Path) -> Backbone:
    """An untrained backbone with the trained autoencoder, whose latents have mean 0 and std 1."""
    backbone = untrained(source)
    backbone.vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    numbers = json.loads((work / "vae.json").read_text())
    backbone.vae.register_to_config(shift_factor=numbers["shift"], scaling_factor=numbers["scale"])
    backbone.vae.requires_grad_(False).eval()
    return backbone


# ------------------------------------------------------------------------------- latent pool


@torch.no_grad()
def encode_pool(
    source: DataSource, work: Path, faces: int, part: int, parts: int, batch: int = 64
) -> None:
    """Encode faces and two dense conditions of each; writes `work/pool<part>.pt`.

    Args:
        source: the faces.
        work: folder of the trained autoencoder and of the pool.
        faces: size of the whole pool.
        part: number of this part, from 0, for several processes.
        parts: number of parts.
        batch: faces encoded at once.
    """
    from tqdm.auto import trange

    vae = _with_trained_vae(source, work).vae
    descriptions = []
    z_image = []
    z_condition = []
    shares = torch.tensor(list(source.condition_shares.values()))
    first = faces * part // parts // batch
    last = faces * (part + 1) // parts // batch
    for number in trange(first, last, desc=f"pool, part {part}", mininterval=1):
        generator = torch.Generator().manual_seed(number)
        shown, described = source.scenes(SEED, POOL + number * batch, batch)
        z_image.append(encode_images(vae, shown.image).half())
        pair = []
        for _ in range(2):
            kinds = torch.multinomial(shares, batch, True, generator=generator)
            pictures = torch.empty_like(shown.image)
            for k, kind in enumerate(source.condition_shares):
                chosen = kinds == k
                if chosen.any():
                    pictures[chosen] = dense_condition(kind, shown, generator)[chosen]
            pair.append(encode_images(vae, pictures).half())
        z_condition.append(torch.stack(pair, 1))
        descriptions += described
    pool = {"image": torch.cat(z_image), "condition": torch.cat(z_condition), "rows": descriptions}
    torch.save(pool, work / f"pool{part}.pt")


def read_pool(work: Path) -> tuple[Tensor, Tensor, list[Description]]:
    """All parts of a pool: latents `n c h w` and of conditions `n 2 c h w`, and descriptions."""
    pools = [torch.load(path) for path in sorted(work.glob("pool*.pt"))]
    z_image = torch.cat([pool["image"] for pool in pools])
    z_condition = torch.cat([pool["condition"] for pool in pools])
    return z_image, z_condition, [row for pool in pools for row in pool["rows"]]


# -------------------------------------------------------------------------------- transformer


class TextToVelocity(nn.Module):
    """Transformer and text encoders as one module, which DDP needs."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.transformer = backbone.transformer
        self.clip = backbone.text_encoder
        self.t5 = backbone.text_encoder_2

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        ids: tuple[Tensor, Tensor],
        z_condition: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        """Velocity `b c h w`; ids: tokens of CLIP and of T5, the rest as in `predict_velocity`."""
        text = TextEmbedding(self.t5(ids[1])[0], self.clip(ids[0]).pooler_output)
        return predict_velocity(self.transformer, z_t, t, text, z_condition, keep)


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


def token_ids(
    backbone: Backbone, texts: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids of the two text encoders (CLIP, T5), each `b n`."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    length = backbone.tokenizer.model_max_length
    clip = backbone.tokenizer(texts, max_length=length, **options)
    t5 = backbone.tokenizer_2(texts, max_length=TEXT_LENGTH, **options)
    return clip.input_ids.to(device), t5.input_ids.to(device)


def train_flux(source: DataSource, out: Path, samples: int, batch: int, lr: float) -> None:
    """Flow matching with captions (10 % dropped) and condition tokens (15 % dropped).

    The loss is reported on the last 256 faces of the pool: new faces of a procedural source, other
    passes over the same faces of a folder.

    Args:
        source: the faces.
        out: folder of the bundle; writes `out/flux`.
        samples: samples to train on, over all processes.
        batch: samples of a process and step.
        lr: peak learning rate.
    """
    from accelerate import Accelerator

    work = work_folder(out)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    backbone = _with_trained_vae(source, work)
    local_attention_init(backbone.transformer)
    model = TextToVelocity(backbone)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    ranks = accelerator.num_processes
    steps = samples // (batch * ranks)
    z_image, z_condition, rows = read_pool(work)
    held = min(256, len(rows) // 4)  # the last faces of the pool are held out
    wrapped = accelerator.prepare_model(model)
    average = moving_average(model, lambda updates: min(0.999, (updates + 1) / (updates + 10)))
    ids_of = functools.partial(token_ids, backbone, device=accelerator.device)

    def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        set_learning_rates(optimizer, progress, WARMUP)
        index = torch.randint(len(rows) - held, (batch,), generator=generator)
        x0 = z_image[index].float()
        z_c = z_condition[index, torch.randint(2, (batch,), generator=generator)].float()
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(1.2 * torch.randn(batch, generator=generator))
        keep = torch.rand(batch, generator=generator) >= 0.1
        dropped = torch.rand(batch, generator=generator) < 0.1
        if number % 10 == 0:  # captions alone, without condition tokens in the sequence
            z_c = None
            keep = None
        texts = [
            "" if drop else caption_of(rows[i], number * 64 + j)
            for j, (i, drop) in enumerate(zip(index.tolist(), dropped.tolist(), strict=True))
        ]
        with accelerator.autocast(), sdpa_kernel(FASTEST_SDPA):
            v = wrapped(interpolate(x0, noise, t), t, ids_of(texts), z_c, keep)
        loss = F.mse_loss(v.float(), target_velocity(x0, noise))
        optimizer.zero_grad()
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        return {"loss": loss}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """Flow loss at eight fixed times, with and without the condition tokens."""
        generator = torch.Generator().manual_seed(0)
        index = list(range(len(rows) - held, len(rows)))
        x0 = z_image[index].float()
        noise = torch.randn(x0.shape, generator=generator)
        t = (torch.arange(held) % 8 + 0.5) / 8
        ids = ids_of([caption_of(rows[i], i) for i in index])
        losses = {}
        with accelerator.autocast():
            for name, z in (("condition", z_condition[index, 0].float()), ("text", None)):
                v = model(interpolate(x0, noise, t), t, ids, z, None)
                losses[name] = F.mse_loss(v.float(), target_velocity(x0, noise)).item()
        return losses

    seconds = train(
        work / "flux",
        step,
        {"model": model, "average": average, "optimizer": optimizer},
        SEED + accelerator.process_index,
        steps=steps,
        evaluate=evaluate,
        is_main=accelerator.is_main_process,
    )
    if accelerator.is_main_process:
        model.load_state_dict(average.module.state_dict())
        quality = evaluate()
        folder = out / "flux"
        save_backbone(backbone, folder)
        record = provenance(
            load_profile("mini"),
            seconds=seconds,
            samples=steps * batch * ranks,
            faces=source.name,
            held_out_flow_loss=quality,
            autoencoder=json.loads((work / "vae.json").read_text()),
        )
        write_json(folder / "provenance.json", record)
        print(quality, flush=True)
    leave_group()
