"""Train the miniature's foundation model from nothing: the counterpart of FLUX.1-dev.

    python -m ec2face_lab.world.pretrain vae        autoencoder                    -> runs/foundation
    python -m ec2face_lab.world.pretrain latents    a pool of encoded faces        -> runs/foundation
    python -m ec2face_lab.world.pretrain flux       transformer and text encoders  -> data/mini/flux

With `--data ROOT --out DIR` the same on photographs of faces; then everything lies in DIR.

The transformer is pretrained on captions and on *generic* dense conditions of procedural scenes
(depth, normals, albedo, edges, low resolution, regions in random colours), given as extra tokens
in the very layout of the mask branch. So it reads condition tokens before any LoRA exists, as
FLUX.1-dev can; what the fixed colours of a semantic mask mean is left for the LoRA to learn. Every
stage can be killed and run again. `make foundation` runs all, with the critics of `critics.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ec2face_core.attributes import pixel_counts
from ec2face_core.backbone import Backbone, TextEmbedding, encode_images, save_backbone
from ec2face_core.config import ROOT, load_profile, resolve
from ec2face_core.fast.blocks import blocks_of
from ec2face_core.flow import interpolate, velocity
from ec2face_core.losses import class_weights
from ec2face_core.mask_branch import predict_velocity
from ec2face_core.runs import provenance
from ec2face_core.train import leave_group

from .networks import tiny_backbone
from .sources import World, add_world_arguments, chosen_world, dense_condition, sentence

SEED, TEXT_LENGTH = 5_001, 32

VOCABULARY = 10**7  # number of the first face whose captions make the vocabularies

# The backward pass of the CPU's flash kernel is slower than plain matrix products at 160 tokens.
FASTEST_SDPA = SDPBackend.EFFICIENT_ATTENTION if torch.cuda.is_available() else SDPBackend.MATH


def work_folder(out: Path) -> Path:
    """Where checkpoints and the pool of a bundle lie."""
    return ROOT / "runs" / "foundation" if out == resolve("data/mini") else out / "training"


def untrained(world: World) -> Backbone:
    """The miniature's FLUX with the vocabularies of a world and random weights."""
    return tiny_backbone(world.corpus(SEED, VOCABULARY), SEED)


# ------------------------------------------------------------------------------- autoencoder


def train_vae(world: World, work: Path, samples: int, batch: int = 16) -> None:
    """L1 + L2 + edges, weighted towards small parts, and a small KL; 30 % dense conditions."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    torch.manual_seed(SEED)
    vae = untrained(world).vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=1e-4, fused=True)
    steps = samples // batch
    schedule = _one_cycle(optimizer, steps)
    state, begin = _resume(work / "vae.pt", vae, optimizer, schedule)
    held_out = world.held_out_scenes(SEED, 128).image
    # Eyes, lips and jewellery are few pixels: weights do here what a perceptual loss does at scale.
    counts = pixel_counts(world.held_out_scenes(SEED, 256).label_map).sum(0)
    detail = class_weights(counts).pow(0.35).clamp(max=8).float()
    detail = detail / (detail * counts / counts.sum()).sum()
    # a low resolution is no harder to encode than the face itself
    kinds = [kind for kind in world.condition_shares if kind != "low resolution"]
    clock = _Clock(steps, batch, begin, state)
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)
        faces, _ = world.scenes(SEED, step * batch, batch)
        x = faces.image
        kind = kinds[step % len(kinds)]
        n = batch * 3 // 10
        x = torch.cat([x[n:], dense_condition(kind, faces, generator)[:n]])
        w = detail[torch.cat([faces.label_map[n:], faces.label_map[:n]])][:, None]
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encoder(x)
        posterior = DiagonalGaussianDistribution(moments.float())
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decoder(posterior.sample()).float()
        edges = (w[..., :-1, :-1] * _gradient(y - x)).mean()
        z = posterior.mean
        spread = (z.mean((0, 2, 3)) ** 2 + (z.std((0, 2, 3)) - 1) ** 2).mean()
        loss = (w * (y - x).abs()).mean() + 2 * (w * (y - x) ** 2).mean() + 0.5 * edges
        loss = loss + 1e-6 * posterior.kl().mean() + 0.01 * spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if clock.due(step):
            with torch.no_grad():
                z = vae.encode(held_out).latent_dist.mode()
                error = (vae.decode(z).sample.clamp(-1, 1) - held_out).div(2).pow(2)
            psnr = -10 * error.mean((1, 2, 3)).log10().mean().item()
            clock.log(step, loss=loss.item(), psnr=psnr, latent_std=z.std().item())
            _save(work / "vae.pt", vae, optimizer, schedule, step + 1, clock.seconds())
    with torch.no_grad():
        z = vae.encode(held_out).latent_dist.mode()
    done = {"shift": z.mean().item(), "scale": 1 / z.std().item(), "psnr": psnr, "samples": samples,
            "seconds": round(clock.seconds())}  # fmt: skip
    _save(work / "vae.pt", vae, optimizer, schedule, steps, clock.seconds())
    (work / "vae.json").write_text(json.dumps(done, indent=2))
    print(done, flush=True)


def _gradient(x: Tensor) -> Tensor:
    """Absolute differences to the lower and to the right neighbour, added, `b c h-1 w-1`."""
    down, right = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
    return down.abs() + right.abs()


def _trained_vae(backbone: Backbone, work: Path) -> None:
    """Put the trained autoencoder into a tiny backbone, latents brought to mean 0 and std 1."""
    backbone.vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["model"])
    numbers = json.loads((work / "vae.json").read_text())
    backbone.vae.register_to_config(shift_factor=numbers["shift"], scaling_factor=numbers["scale"])
    backbone.vae.requires_grad_(False).eval()


# ------------------------------------------------------------------------------- latent pool


def encode_pool(
    world: World, work: Path, faces: int, part: int, parts: int, batch: int = 64
) -> None:
    """Encode faces and two dense conditions each; part `part` of `parts`, for parallel runs."""
    backbone = untrained(world)
    _trained_vae(backbone, work)
    rows, z_image, z_condition = [], [], []
    shares = torch.tensor(list(world.condition_shares.values()))
    first, last = faces * part // parts // batch, faces * (part + 1) // parts // batch
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        drawn, told = world.scenes(SEED, 10**6 + number * batch, batch)
        with torch.no_grad():
            z_image.append(encode_images(backbone.vae, drawn.image).half())
            pair = []
            for _ in range(2):
                kinds = torch.multinomial(shares, batch, True, generator=generator)
                pictures = torch.empty_like(drawn.image)
                for k, kind in enumerate(world.condition_shares):
                    chosen = kinds == k
                    if chosen.any():
                        pictures[chosen] = dense_condition(kind, drawn, generator)[chosen]
                pair.append(encode_images(backbone.vae, pictures).half())
            z_condition.append(torch.stack(pair, 1))
        rows += told
        if number % 50 == 0:
            print(f"pool part {part}: {number - first}/{last - first} batches", flush=True)
    pool = {"image": torch.cat(z_image), "condition": torch.cat(z_condition), "rows": rows}
    torch.save(pool, work / f"pool{part}.pt")


# -------------------------------------------------------------------------------- transformer


class TextToVelocity(nn.Module):
    """Transformer and text encoders trained together: DDP needs one module."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.transformer, self.clip = backbone.transformer, backbone.text_encoder
        self.t5 = backbone.text_encoder_2

    def forward(
        self, z_t: Tensor, t: Tensor, ids: tuple[Tensor, Tensor], z_condition, keep
    ) -> Tensor:
        text = TextEmbedding(self.t5(ids[1])[0], self.clip(ids[0]).pooler_output)
        return predict_velocity(self.transformer, z_t, t, text, z_condition, keep)


def local_attention_init(transformer: nn.Module) -> None:
    """Let two heads of every block begin at the token's own place: one in the condition, one here.

    A constant part of q and k along rotary pairs makes the attention logit a sum of
    cos(frequency * distance), largest at distance 0 in rows and columns. Turning the first head's
    q by one radian on the frequency-1 pair of the first axis moves its peak to the token whose
    first id is larger by one: the condition token. A small transformer else spends most of its
    training on finding this.
    """
    head, (first, rows, _) = (
        transformer.config.attention_head_dim,
        transformer.config.axes_dims_rope,
    )
    place = [start + i for start in (first, first + rows) for i in (0, 2)]  # two frequencies each
    pairs = [0, 1, *(d + i for d in place for i in (0, 1))]
    with torch.no_grad():
        for block in blocks_of(transformer):
            for h, turn in enumerate((1.0, 0.0)):
                for linear, angle in ((block.attn.to_q, turn), (block.attn.to_k, 0.0)):
                    bias = linear.bias[h * head : (h + 1) * head]
                    bias[0], bias[1] = 3.5 * math.cos(angle), 3.5 * math.sin(angle)
                    bias[place] = 3.0
            for norm in (block.attn.norm_q, block.attn.norm_k):
                norm.weight[pairs] = 2.0


def train_flux(world: World, out: Path, samples: int, batch: int, rate: float) -> None:
    """Flow matching with captions (10 % dropped) and condition tokens (15 % dropped).

    The loss is reported on the last 256 faces of the pool: new faces of a procedural world, other
    passes over the same faces of a folder.
    """
    from accelerate import Accelerator

    work = work_folder(out)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16")
    backbone = untrained(world)
    _trained_vae(backbone, work)
    local_attention_init(backbone.transformer)
    model = TextToVelocity(backbone)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True
    )
    ranks = accelerator.num_processes
    steps = samples // (batch * ranks)
    schedule = _one_cycle(optimizer, steps)
    path = work / "flux.pt"
    state, begin = _resume(path, model, optimizer, schedule)
    average = state.get("average", average)
    pools = [torch.load(work / f"pool{i}.pt") for i in range(len(list(work.glob("pool*.pt"))))]
    z_image = torch.cat([p["image"] for p in pools])
    z_condition = torch.cat([p["condition"] for p in pools])
    rows = [row for p in pools for row in p["rows"]]
    held = min(256, len(rows) // 4)  # the last faces of the pool are held out
    wrapped = accelerator.prepare_model(model)
    clock = _Clock(steps, batch * ranks, begin, state)

    def token_ids(
        indices: list[int], seeds: list[int], drop: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        texts = []
        for j, (i, s) in enumerate(zip(indices, seeds, strict=True)):
            dropped = drop is not None and bool(drop[j])
            texts.append("" if dropped else sentence(rows[i], s))
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip = backbone.tokenizer(texts, max_length=backbone.tokenizer.model_max_length, **options)
        t5 = backbone.tokenizer_2(texts, max_length=TEXT_LENGTH, **options)
        device = accelerator.device
        return clip.input_ids.to(device), t5.input_ids.to(device)

    def held_out_loss() -> dict[str, float]:
        """Flow loss at eight fixed times, with and without the condition tokens."""
        generator = torch.Generator().manual_seed(0)
        index = list(range(len(rows) - held, len(rows)))
        x0 = z_image[index].float()
        noise = torch.randn(x0.shape, generator=generator)
        t = (torch.arange(held) % 8 + 0.5) / 8
        ids = token_ids(index, index, None)
        losses = {}
        with torch.no_grad(), accelerator.autocast():
            for name, z in (("condition", z_condition[index, 0].float()), ("text", None)):
                v = model(interpolate(x0, noise, t), t, ids, z, None)
                losses[name] = F.mse_loss(v.float(), velocity(x0, noise)).item()
        return losses

    torch.manual_seed(SEED)
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step * ranks + accelerator.process_index)
        index = torch.randint(len(rows) - held, (batch,), generator=generator)
        x0 = z_image[index].float()
        z_c = z_condition[index, torch.randint(2, (batch,), generator=generator)].float()
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(1.2 * torch.randn(batch, generator=generator))
        keep = torch.rand(batch, generator=generator) >= 0.1
        drop_text = torch.rand(batch, generator=generator) < 0.1
        if step % 10 == 0:  # captions alone, without condition tokens in the sequence
            z_c, keep = None, None
        ids = token_ids(index.tolist(), [step * 64 + j for j in range(batch)], drop_text)
        with accelerator.autocast(), sdpa_kernel(FASTEST_SDPA):
            v = wrapped(interpolate(x0, noise, t), t, ids, z_c, keep)
        loss = F.mse_loss(v.float(), velocity(x0, noise))
        optimizer.zero_grad()
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if value.dtype.is_floating_point:
                    average[key].lerp_(value, 1 - decay)
        if accelerator.is_main_process and clock.due(step):
            clock.log(step, loss=loss.item(), **held_out_loss())
            _save(path, model, optimizer, schedule, step + 1, clock.seconds(), average=average)
    if accelerator.is_main_process:
        model.load_state_dict(average)
        quality = held_out_loss()
        folder = out / "flux"
        save_backbone(backbone, folder)
        record = provenance(
            load_profile("mini"),
            seconds=clock.seconds(),
            samples=steps * batch * ranks,
            faces=world.name,
            held_out_flow_loss=quality,
            autoencoder=json.loads((work / "vae.json").read_text()),
        )
        (folder / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
        print(quality, flush=True)
    leave_group()


# ------------------------------------------------------------------------------ shared pieces


def _one_cycle(optimizer: torch.optim.Optimizer, steps: int):
    """Linear warm-up over 3 % of the steps, then a cosine to 2 % of the rate."""
    warm = max(1, steps * 3 // 100)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class _Clock:
    """Says when to log (every two minutes), and how long the training took over all its runs."""

    def __init__(self, steps: int, batch: int, begin: int, state: dict):
        self.steps, self.batch, self.begin = steps, batch, begin
        self.before, self.start = state.get("seconds", 0.0), time.time()
        self.last = self.start

    def seconds(self) -> float:
        return self.before + time.time() - self.start

    def due(self, step: int) -> bool:
        return step + 1 == self.steps or time.time() - self.last > 120

    def log(self, step: int, **values: float) -> None:
        self.last = time.time()
        rate = (step + 1 - self.begin) * self.batch / (self.last - self.start)
        numbers = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        print(f"step {step + 1}/{self.steps}  {numbers}  {rate:.0f} samples/s", flush=True)


def _save(path: Path, model, optimizer, schedule, step: int, seconds: float, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state = {k: v.state_dict() for k, v in parts.items()}
    torch.save({**state, "step": step, "seconds": seconds, **more}, f"{path}.new")
    os.replace(f"{path}.new", path)


def _resume(path: Path, model, optimizer, schedule) -> tuple[dict, int]:
    if not path.exists():
        return {}, 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    print(f"resumed {path.name} at step {state['step']}", flush=True)
    return state, state["step"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=("vae", "latents", "flux"))
    add_world_arguments(parser)
    parser.add_argument(
        "--samples", type=int, default=0, help="training samples, or faces of the pool"
    )
    parser.add_argument("--part", type=int, default=0, help="latents: this part of the pool")
    parser.add_argument("--parts", type=int, default=1, help="latents: parts in all")
    parser.add_argument("--batch", type=int, default=16, help="samples a process and step")
    parser.add_argument("--rate", type=float, default=1e-3, help="flux: peak learning rate")
    options = parser.parse_args()
    world, out = chosen_world(parser, options)
    work = work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    if options.stage == "vae":
        train_vae(world, work, options.samples or 60_000, options.batch)
    elif options.stage == "latents":
        encode_pool(world, work, options.samples or 24_576, options.part, options.parts)
    else:
        train_flux(world, out, options.samples or 200_000, options.batch, options.rate)


if __name__ == "__main__":
    main()
