"""Latent diffusion in miniature: what CoDiffusion, ControlNeXt and UaC stand on.

U-Nets and schedulers are diffusers' own classes. `TextUnetSystem` makes the text-to-image U-Net
that CoDiffusion takes as its text diffuser and ControlNeXt as its frozen base, once for both.

Chosen here:
- Latents are the miniature VAE's (8 x 16 x 16, mean 0, std 1); all latents are encoded
  once. Captions enter as the guiding CLIP's word features, in place of a text encoder of their own.
- Attention begins at half the latent's side, as in LDM; it doubles the time at the full side.
- Every latent U-Net predicts v instead of the noise: at t = T, where samples begin, an error of
  predicted noise is 80 times as large in x_0. Mixing predictions is the same for both, as long as
  weights add up to 1: v, as x_0, is affine in the noise.
- Steps of sampling are equally long and end at 0, as the scheduler's step supposes: where they do
  not divide T (28 do not) the first one begins a little below T.
- Times of a batch are stratified over [0, T): the same expectation, less noise.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ec2face_core.backbone import decode_latents, encode_images, load_backbone
from ec2face_core.config import Config

from .reading import word_features
from .system import Faces, System, train_stage

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel


CHANNELS = (40, 72)  # of a uni-modal U-Net: 1.3 M parameters

BATCH, RATE, WARM_UP = 32, 1.5e-3, 100

HEAVIEST = 5.0  # weight of an error of x_0

TEXT_DROP = 0.1  # captions replaced by "", for classifier-free guidance


class LatentSystem(System):
    """A system that diffuses the miniature VAE's latents.

    Attributes:
        shape: of a latent, `(c, h, w)`.
        words: width of a word feature.
    """

    parts = ("vae",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.vae = load_backbone(config.backbone, ("vae",)).vae.requires_grad_(False).eval()
        side = config.data.size >> (len(self.vae.config.block_out_channels) - 1)
        self.shape = (self.vae.config.latent_channels, side, side)
        self.words = self.clip.model.ln_final.normalized_shape[0]
        self.scheduler = ldm_scheduler()
        self.build(config.seed)

    @abstractmethod
    def build(self, seed: int) -> None:
        """Fill `networks` with random weights, a function of the seed."""

    @torch.no_grad()
    def paint(
        self, predict: Callable, generators: Sequence[torch.Generator], eta: float = 0.0
    ) -> Tensor:
        """Sample latents with `predict(z_t, t) -> v` and decode: images [0, 1] `b 3 h w`."""
        steps = self.config.sampling.steps
        z = ddim_sample(predict, self.scheduler, self.shape, generators, steps, eta)
        return (decode_latents(self.vae, z) / 2 + 0.5).clamp(0, 1)


class LatentFaces:
    """Every training face as a latent, with its label map and captions."""

    def __init__(self, faces: Faces, vae: nn.Module) -> None:
        self.faces = faces
        self.z = encode_all(lambda x: encode_images(vae, x), self.faces)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Random faces: latents `b c h w`, label maps `b h w` int64, a caption each."""
        rows, texts = self.faces.draw(size, generator)
        return self.z[rows], self.faces.label_maps[rows].long(), texts


@torch.no_grad()
def encode_all(encode: Callable[[Tensor], Tensor], faces: Faces) -> Tensor:
    """`encode` of every picture (`b 3 h w` in [-1, 1]), in batches."""
    return torch.cat([encode(part.float() / 127.5 - 1) for part in faces.images.split(64)])


def text_unet(
    shape: Sequence[int],
    context: int,
    channels: Sequence[int] = CHANNELS,
    out_channels: int | None = None,
) -> UNet2DConditionModel:
    """A U-Net on latents of this shape that attends to tokens `b n context` from half the side."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=out_channels or shape[0],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        cross_attention_dim=context,
        attention_head_dim=2,  # diffusers reads it as the number of heads
        norm_num_groups=8,
    )


def ldm_scheduler() -> DDIMScheduler:
    """LDM's `linear` schedule, which diffusers calls `scaled_linear`, with CoDiffusion's ends."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        prediction_type="v_prediction",
        clip_sample=False,
    )


# ----------------------------------------------------------------------------------- training


def optimise(
    name: str,
    loss: Callable[[torch.Generator], Tensor],
    trained: Mapping[str, nn.Module],
    run_dir: Path,
    seconds: float,
    seed: int,
    rates: Mapping[str, float] | None = None,
    max_steps: int = 0,
) -> None:
    """One stage of training: AdamW, warm-up, cosine to 0 by the time spent, bfloat16 autocast.

    Args:
        loss: generator of a step -> scalar.
        trained: modules to train and to keep in checkpoints, by name.
        rates: the highest learning rate of a module, where it is not `RATE`.
    """
    rates = dict(rates or {})
    groups = [
        {"params": list(module.parameters()), "lr": rates.get(key, RATE)}
        for key, module in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    highest = [group["lr"] for group in groups]
    weights = [p for group in groups for p in group["params"]]

    def step(number: int, fraction: float, generator: torch.Generator) -> dict[str, Any]:
        rate = min(1.0, (number + 1) / WARM_UP) * (1 + math.cos(math.pi * fraction)) / 2
        for group, top in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = top * rate
        # the backward pass of the CPU's flash kernel is slower than plain matrix products
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            value = loss(generator)
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        return {"loss": value.detach(), "grad_norm": norm, "rate": rate}

    for module in trained.values():
        module.requires_grad_(True).train()
    state = {**trained, "optimizer": optimizer}
    train_stage(name, step, state, run_dir, seconds, seed, max_steps)
    for module in trained.values():
        module.requires_grad_(False).eval()


def denoising_loss(
    predict: Callable[..., Tensor],
    scheduler: DDIMScheduler,
    x0: Tensor,
    generator: torch.Generator,
    *conditions: Tensor,
) -> Tensor:
    """Mean squared error between v of x_t and `predict(x_t, t, *conditions)`.

    v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho 2022), a = `scheduler.alphas_cumprod[t]`.
    Where the scheduler takes x_0 (`prediction_type` sample), the same error is 1 / (1 - a) of that
    of x_0; this weight is cut at `HEAVIEST`, as nearly clean pictures would outweigh all others.
    """
    b, total = len(x0), scheduler.config.num_train_timesteps
    t = ((torch.arange(b) + torch.rand(b, generator=generator)) / b * total).long()
    noise = torch.randn(x0.shape, generator=generator)
    predicted = predict(scheduler.add_noise(x0, noise, t), t, *conditions).float()
    if scheduler.config.prediction_type == "sample":
        weight = (1 / (1 - scheduler.alphas_cumprod[t])).clamp(max=HEAVIEST)
        return (weight * (predicted - x0).square().mean((1, 2, 3))).mean()
    return F.mse_loss(predicted, scheduler.get_velocity(x0, noise, t))


def prediction_of(unet: UNet2DConditionModel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The U-Net as a function (x_t, t, context) -> v."""
    return lambda x_t, t, context: unet(x_t, t, context).sample


def drop_texts(texts: Sequence[str], share: float, generator: torch.Generator) -> list[str]:
    """Each caption replaced by "" with this probability."""
    gone = torch.rand(len(texts), generator=generator) < share
    return ["" if g else text for g, text in zip(gone.tolist(), texts, strict=True)]


class TextUnetSystem(LatentSystem):
    """A latent system on the text-to-image U-Net, which it shares."""

    def pretrain(self, shared_dir: Path, max_steps: int) -> None:
        """The U-Net learns faces from captions."""
        unet, config = self.networks[self.shares[1]], self.config
        faces = LatentFaces(Faces.of_world(config), self.vae)

        def loss(generator: torch.Generator) -> Tensor:
            z, _, texts = faces.batch(BATCH, generator)
            words = word_features(self.clip, drop_texts(texts, TEXT_DROP, generator))
            return denoising_loss(prediction_of(unet), self.scheduler, z, generator, words)

        how = (config.baselines.foundation_seconds, config.seed, None, max_steps)
        optimise("text_unet", loss, {"unet": unet}, shared_dir, *how)


# ----------------------------------------------------------------------------------- sampling


@torch.no_grad()
def ddim_sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDIMScheduler,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    steps: int,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12) from pure noise; eta 0: deterministic, 1: as DDPM.

    Args:
        predict: (x_t `b c h w`, t `b`) -> v, or what the scheduler takes, `b c h w`.
        shape: of one sample.
        generators: one for each sample: neither batch nor order counts.
    """
    scheduler.set_timesteps(steps)
    # of equal length, the last one ends at x_0; few steps have to begin where the noise is pure
    length = scheduler.config.num_train_timesteps // steps
    x = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])
    for t in torch.arange(steps, 0, -1) * length - 1:
        told = predict(x, t.expand(len(x)))
        x = scheduler.step(
            told,
            t,
            x,
            eta=eta,
            use_clipped_model_output=scheduler.config.clip_sample,  # as guided-diffusion does
            generator=list(generators) if eta else None,
        ).prev_sample
    return x


def guided(predict: Callable[..., Tensor], weight: float, *arguments: tuple[Tensor, Tensor]):
    """Classifier-free guidance: `e0 + weight (e - e0)`, both in one batch.

    Args:
        arguments: (with condition, without) of each argument of `predict`.
    """
    if weight == 1:
        return predict(*(with_ for with_, _ in arguments))
    e, e0 = predict(*(torch.cat(pair) for pair in arguments)).chunk(2)
    return e0 + weight * (e - e0)
