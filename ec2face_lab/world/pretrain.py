"""The miniature's foundation, the counterpart of FLUX.1-dev: its autoencoder.

The stages of a foundation, each of which resumes when it is run again, and runs where its faces are
rendered, on the CPU or on a GPU (`python -m ec2face_lab pretrain`):

    vae        autoencoder (here)                                   -> runs/foundation/<bundle>
    captions   token ids of the captions of a pool (`pool`)         -> runs/foundation/<bundle>
    latents    the pool: encoded faces and conditions (`pool`)      -> runs/foundation/<bundle>
    flux       transformer and text encoders (`pretrain_flux`)      -> runs/foundation/<bundle>
    distill    guidance, into the guidance embedding (likewise)     -> data/<bundle>/flux

Under torchrun, ranks share the work of vae, latents, flux and distill (`ranks`).

With `--data ROOT --out DIR` the stages train on photographs of faces, and everything lies in DIR.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import pixel_counts
from ec2face_core.backbone import Backbone
from ec2face_core.io.paths import ROOT, resolve
from ec2face_core.losses import class_weights
from ec2face_core.metrics import psnr
from ec2face_core.perception import FaceParser
from ec2face_core.runs import path_digest, read_metrics, whole_file, write_json

from .graphs import Replayed, optimiser_options
from .networks import SECOND, Plan, tiny_backbone
from .ranks import rank_of, share_of
from .sources import DataSource, dense_condition
from .training import descend, set_learning_rates, train

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SEED = 5_001

WARMUP = 0.03  # of the steps

VOCABULARY = 10**7  # number of the first face whose captions make the vocabularies

CROPS = 0.5  # share of the autoencoder's training that sees parts of pictures, where it is cut

USES = 4  # steps on the CPU that cut other parts from the same faces

PARSED = 0.2  # weight of the guiding parser's cross-entropy in the autoencoder's loss

NOISE = 0.4  # largest standard deviation that is added to the autoencoder's latents

LOG_VARIANCE = -6.0  # of the latents' noise when the training of the autoencoder begins

PLANS = {plan.side: plan for plan in (Plan(), SECOND)}


def work_folder(out: Path) -> Path:
    """Folder of the checkpoints and of the latent pool of a bundle."""
    ours = out.parent == resolve("data")
    return ROOT / "runs" / "foundation" / out.name if ours else out / "training"


def untrained(source: DataSource) -> Backbone:
    """The miniature's FLUX with the vocabularies of a data source and random weights."""
    return tiny_backbone(source.corpus(SEED, VOCABULARY), SEED, PLANS[source.size])


def autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast on the device."""
    return torch.autocast(device.type, torch.bfloat16)


class FaceBlocks:
    """Scenes for training steps, rendered in blocks: a GPU renders many faces as fast as one.

    Args:
        source: the faces.
        batch: faces of a step, of this rank.
        uses: so many steps in a row get the same faces.
    """

    def __init__(self, source: DataSource, batch: int, uses: int = 1) -> None:
        self.source = source
        self.batch = batch
        self.uses = uses
        self.steps = 1 if source.device.type == "cpu" else max(1, 512 // batch)
        self._number = -1
        self._block: tuple[Tensor, ...] = ()

    def __call__(self, number: int, kind: str, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Image, dense condition and label map of a step's faces.

        Args:
            number: of the step.
            kind: of the condition; the same for all steps of a block.
            generator: of the condition's colours.
        """
        number //= self.uses
        block = number // self.steps
        if block != self._number:
            count = self.batch * self.steps
            rank, ranks = rank_of()
            shown, _ = self.source.scenes(SEED, (block * ranks + rank) * count, count)
            condition = dense_condition(kind, shown, generator)
            self._block = (shown.image, condition, shown.label_map)
            self._number = block
        first = number % self.steps * self.batch
        return tuple(x[first : first + self.batch] for x in self._block)


def _cut(pictures: Tensor, side: int, places: Tensor) -> Tensor:
    """A square part of each picture; places: its first row and column, `b 2` in [0, 1)."""
    height, width = pictures.shape[-2:]
    rows = (places[:, 0] * (height - side + 1)).long().tolist()
    columns = (places[:, 1] * (width - side + 1)).long().tolist()
    parts = zip(pictures, rows, columns, strict=True)
    return torch.stack([x[..., i : i + side, j : j + side] for x, i, j in parts])


def train_vae(
    source: DataSource,
    work: Path,
    samples: int,
    batch: int = 16,
    seconds: float = 0.0,
    crop: int = 0,
    parser: Path | None = None,
    lr: float = 2e-3,
    start: Path | None = None,
) -> None:
    """Train the autoencoder; writes `work/vae.pt` and its scale, `work/vae.json`.

    The loss is L1 + L2 + edges, weighted towards small parts, L1 of the picture at an eighth of its
    side, without which colours of large areas come late, and a small KL term; 30 % of the pictures
    are dense conditions. The guiding parser is its perceptual loss: it must find the true classes
    in decoded faces, with the same weights. Latents at half the resolution must decode to the
    picture at half the resolution, which makes them easier to generate (scale equivariance, arXiv
    2502.14831). So does noise on the latents, up to `NOISE` (arXiv 2507.15856): what the decoder
    needs must be loud in them, and a transformer's errors do less harm.

    Args:
        source: the faces.
        work: folder of checkpoints and results.
        samples: pictures to train on.
        batch: pictures of a step.
        seconds: limit in place of `samples`, see `training.train`; 0: none.
        crop: side in pixels of the square that each step sees of a picture, a multiple of 16: more
            steps in the same time. After `CROPS` of the training, steps see half as many, but whole
            pictures. 0: all steps see whole pictures.
        parser: file of the guiding parser, which reads whole pictures; None: no perceptual loss.
        lr: peak learning rate.
        start: folder of a FLUX whose autoencoder is trained further; None: random weights.

    Raises:
        FileNotFoundError: the parser does not exist.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    device = source.device
    share = share_of(batch)
    guide = FaceParser(parser, source.size, device) if parser else None
    vae = _new_vae(source, start).train().to(device)
    channels = vae.config.latent_channels
    optimizer = torch.optim.AdamW(
        vae.parameters(), weight_decay=1e-4, **optimiser_options(device, lr)
    )
    held_out = source.held_out_scenes(SEED, 64).image
    detail = _weights_of_parts(source)
    # a low resolution is no harder to encode than the face itself
    kinds = [kind for kind in source.condition_shares if kind != "low resolution"]
    n = share * 3 // 10
    blocks = FaceBlocks(source, share, USES if crop and device.type == "cpu" else 1)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)

    def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        set_learning_rates(optimizer, progress, WARMUP)
        kind = kinds[number // blocks.uses // blocks.steps % len(kinds)]
        image, condition, label_map = blocks(number, kind, generator)
        x = torch.cat([image[n:], condition[:n]])
        labels = torch.cat([label_map[n:], label_map[:n]])
        is_face = torch.arange(share, device=device) < share - n
        if crop and progress < CROPS:
            places = torch.rand(share, 2, generator=generator, device=device)
            x, labels = _cut(x, crop, places), _cut(labels, crop, places)
        elif crop:
            rows = torch.randperm(share, generator=generator, device=device)[: share // 2]
            x, labels, is_face = x[rows], labels[rows], is_face[rows]
        side = x.shape[-1] // scale
        noise = torch.randn(len(x), channels, side, side, generator=generator, device=device)
        added = NOISE * torch.rand(len(x), 1, 1, 1, generator=generator, device=device) ** 2
        return learn(x.shape[-1], x=x, labels=labels, is_face=is_face, noise=noise, added=added)

    def update(
        side: int, x: Tensor, labels: Tensor, is_face: Tensor, noise: Tensor, added: Tensor
    ) -> dict[str, Tensor]:
        w = detail[labels][:, None]
        posterior = DiagonalGaussianDistribution(_in_bf16(vae.encoder, x))
        z = posterior.mean + (posterior.var + added**2).sqrt() * noise
        y = _in_bf16(vae.decoder, z)
        half = _in_bf16(vae.decoder, F.avg_pool2d(z[: len(z) // 2], 2))
        mode = posterior.mean
        spread = (mode.mean((0, 2, 3)) ** 2 + (mode.std((0, 2, 3)) - 1) ** 2).mean()
        loss = _difference(y, x, w)
        loss = loss + 0.25 * F.l1_loss(half, F.avg_pool2d(x[: len(x) // 2], 2))
        loss = loss + 1e-7 * posterior.kl().mean() + 0.01 * spread
        values = {"loss": loss}
        if guide and side == source.size:
            entropy = F.cross_entropy(guide.logits(y), labels, reduction="none")
            values["parsed"] = (is_face[:, None, None] * w[:, 0] * entropy).mean()
            loss = loss + PARSED * values["parsed"]
        descend(optimizer, loss, clip=1.0)
        return values

    learn = Replayed(update, device)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        z = vae.encode(held_out).latent_dist.mode()
        values = psnr(vae.decode(z).sample.clamp(-1, 1), held_out)
        return {"shift": z.mean().item(), "scale": 1 / z.std().item(), "psnr": values.mean().item()}

    spent = train(
        work / "vae",
        step,
        {"vae": vae, "optimizer": optimizer},
        SEED,
        steps=0 if seconds else samples // batch,
        seconds=seconds,
        evaluate=evaluate,
        device=device,
    )
    if rank_of()[0]:
        return
    with whole_file(work / "vae.pt") as part:
        torch.save({key: value.cpu() for key, value in vae.state_dict().items()}, part)
    seen = batch * steps_done(work / "vae")
    result: dict[str, object] = {
        **evaluate(),
        "samples": seen,
        "batch": batch,
        "learning_rate": lr,
        "seconds": round(spent),
        "device": device_name(device),
        "began_with": _beginning(start),
        "guide": path_digest(parser) if parser else None,
    }
    write_json(work / "vae.json", result)
    print(result, flush=True)


def _beginning(start: Path | None) -> dict[str, Any] | None:
    """The autoencoder that a training began with, and how that one was made."""
    if start is None:
        return None
    return {"digest": path_digest(start / "vae"), **parameters_of(start).get("autoencoder", {})}


def parameters_of(folder: Path) -> dict[str, Any]:
    """How a FLUX folder was made, as its provenance says; empty where it has none."""
    record = folder / "provenance.json"
    return json.loads(record.read_text()).get("parameters", {}) if record.is_file() else {}


@torch.no_grad()
def _new_vae(source: DataSource, start: Path | None) -> AutoencoderKL:
    """The autoencoder of a FLUX folder, or one of random weights.

    The latter's latents begin with little noise: at 1, as it would begin, they say little for long.
    """
    from diffusers import AutoencoderKL

    vae = untrained(source).vae
    if start:
        vae.load_state_dict(AutoencoderKL.from_pretrained(start, subfolder="vae").state_dict())
        return vae
    channels = vae.config.latent_channels
    vae.encoder.conv_out.weight[channels:] *= 0.1
    vae.encoder.conv_out.bias[channels:] = LOG_VARIANCE
    return vae


def _weights_of_parts(source: DataSource) -> Tensor:
    """Weight of each class's pixels `(19,)`, mean 1 over pixels: small parts weigh more."""
    counts = pixel_counts(source.held_out_scenes(SEED, 256).label_map.cpu()).sum(0)
    detail = class_weights(counts).pow(0.5).clamp(max=12).float()
    return (detail / (detail * counts / counts.sum()).sum()).to(source.device)


def _difference(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """L1 + L2 + edges with weights `b 1 h w`, and L1 at an eighth of the side."""
    edges = (w[..., :-1, :-1] * _gradient(y - x)).mean()
    fine = (w * (y - x).abs()).mean() + 2 * (w * (y - x) ** 2).mean() + 0.5 * edges
    return fine + 4 * F.l1_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))


def _in_bf16(net: nn.Module, x: Tensor) -> Tensor:
    """A network's forward pass in bf16; its weights and their gradients stay in float32.

    On a GPU that holds for normalisations, too, which autocast would leave in float32.
    """
    if x.device.type == "cpu":
        with autocast(x.device):
            return net(x).float()
    weights = {name: p.to(torch.bfloat16) for name, p in net.named_parameters()}
    return torch.func.functional_call(net, weights, (x.to(torch.bfloat16),)).float()


def _gradient(x: Tensor) -> Tensor:
    """Sum of the absolute differences to the lower and the right neighbour, `b c h-1 w-1`."""
    down = x[..., 1:, :-1] - x[..., :-1, :-1]
    right = x[..., :-1, 1:] - x[..., :-1, :-1]
    return down.abs() + right.abs()


def steps_done(folder: Path) -> int:
    """Optimiser steps that a training's log records."""
    return int(read_metrics(folder)[-1]["step"])


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def with_trained_vae(source: DataSource, work: Path) -> Backbone:
    """An untrained backbone with the trained autoencoder, whose latents have mean 0 and std 1."""
    backbone = untrained(source)
    backbone.vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True))
    numbers = json.loads((work / "vae.json").read_text())
    backbone.vae.register_to_config(shift_factor=numbers["shift"], scaling_factor=numbers["scale"])
    backbone.vae.requires_grad_(False).eval()
    return backbone
