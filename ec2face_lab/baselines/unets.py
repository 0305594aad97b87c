"""Latent diffusion in miniature: the foundation of CoDiffusion, ControlNeXt and UaC.

U-Nets and schedulers are diffusers' own classes. `TextUnetSystem` trains the text-to-image U-Net
once, which CoDiffusion takes as its text diffuser and ControlNeXt as its frozen base.

Chosen here:
- Latents are the miniature VAE's (16 x 16, mean 0, std 1); all are encoded once. Captions enter as
  the guiding CLIP's word features, in place of a text encoder of their own.
- Attention begins at half the latent's side, as in LDM; it doubles the time at the full side.
- Every latent U-Net predicts v instead of the noise: at t = T, where samples begin, an error of
  predicted noise is 80 times as large in x_0. Mixing predictions is the same for both, as long as
  weights add up to 1: v, as x_0, is affine in the noise.
- Steps of sampling are equally long and end at 0, as the scheduler's step assumes: where their
  number does not divide T (28 does not) the first one begins a little below T.
- Times of a batch are stratified over [0, T), which keeps the expectation and lowers the variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ec2face_core.backbone import decode_latents, encode_images, load_backbone
from ec2face_core.config import Config

from ..world.training import descend, set_learning_rates
from .encoders import word_features
from .system import Faces, Generators, Run, System

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel


CHANNELS = (40, 72)  # of a uni-modal U-Net: 1.3 M parameters

BATCH = 32

LR = 1.5e-3

HEAVIEST = 5.0  # weight of an error of x_0

TEXT_DROP = 0.1  # captions replaced by "", for classifier-free guidance


class LatentSystem(System):
    """A system that diffuses the miniature VAE's latents.

    Attributes:
        shape: of a latent, `(c, h, w)`.
        words: width of a word feature.
    """

    parts = ("vae",)

    def __init__(self, config: Config, device: torch.device | str | None = None) -> None:
        super().__init__(config, device)
        self.vae = load_backbone(config.backbone, ("vae",)).vae.requires_grad_(False).eval()
        self.vae.to(self.device)
        side = config.data.size >> (len(self.vae.config.block_out_channels) - 1)
        self.shape = (self.vae.config.latent_channels, side, side)
        self.words = self.clip.model.ln_final.normalized_shape[0]
        self.scheduler = ldm_scheduler()
        self.build(config.seed)

    @torch.no_grad()
    def decode_samples(self, predict: Callable, generators: Generators, eta: float = 0.0) -> Tensor:
        """Sample latents with `predict(z_t, t) -> v` and decode: images [0, 1] `b 3 h w`."""
        steps = self.config.sampling.steps
        z = ddim_sample(predict, self.scheduler, self.shape, generators, steps, eta, self.device)
        return (decode_latents(self.vae, z) / 2 + 0.5).clamp(0, 1)


class LatentFaces:
    """Every training face as a latent, with its label map and captions."""

    def __init__(self, faces: Faces, vae: nn.Module) -> None:
        self.faces = faces
        self.z = encode_all(lambda x: encode_images(vae, x), self.faces)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Random faces: latents `b c h w`, label maps `b h w` int64, a caption each."""
        rows, texts = self.faces.sample(size, generator)
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
    run: Run,
    name: str,
    loss: Callable[[torch.Generator], Tensor],
    trained: Mapping[str, nn.Module],
    share: float = 1.0,
    lrs: Mapping[str, float] | None = None,
) -> None:
    """One stage of training: AdamW, warm-up, cosine to 0 by the time spent, bfloat16 autocast.

    Args:
        run: the training.
        name: of the stage.
        loss: generator of a step -> scalar.
        trained: modules to train and to keep in checkpoints, by name.
        share: of the run's seconds.
        lrs: peak learning rate of a module, where it is not `LR`.
    """
    lrs = lrs or {}
    groups = [
        {"params": list(module.parameters()), "lr": lrs.get(key, LR)}
        for key, module in trained.items()
    ]
    device = run.device.type
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        set_learning_rates(optimizer, progress)
        # the backward pass of the CPU's flash kernel is slower than plain matrix products
        kernel = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
        with torch.autocast(device, torch.bfloat16), kernel:
            value = loss(generator)
        descend(optimizer, value, clip=1.0)
        return {"loss": value}

    for module in trained.values():
        module.requires_grad_(True).train()
    run.stage(name, step, {**trained, "optimizer": optimizer}, share)
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
    of x_0; this weight is clipped at `HEAVIEST`, else nearly clean pictures outweigh all others.

    Args:
        predict: the network.
        scheduler: of the noise.
        x0: clean samples `b c h w`.
        generator: of times and noise, of the device of `x0`.
        conditions: further arguments of `predict`.
    """
    b = len(x0)
    total = scheduler.config.num_train_timesteps
    device = generator.device
    within = torch.rand(b, generator=generator, device=device)
    t = ((torch.arange(b, device=device) + within) / b * total).long()
    noise = torch.randn(x0.shape, generator=generator, device=device)
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
    gone = torch.rand(len(texts), generator=generator, device=generator.device) < share
    return ["" if g else text for g, text in zip(gone.tolist(), texts, strict=True)]


class TextUnetSystem(LatentSystem):
    """A latent system on the text-to-image U-Net, which it shares."""

    def pretrain(self, run: Run) -> None:
        """Train the U-Net on faces with captions."""
        unet = self.networks[self.shares[1]]
        faces = LatentFaces(Faces.of_foundation(self.config).to(self.device), self.vae)

        def loss(generator: torch.Generator) -> Tensor:
            z, _, texts = faces.batch(BATCH, generator)
            words = word_features(self.clip, drop_texts(texts, TEXT_DROP, generator))
            return denoising_loss(prediction_of(unet), self.scheduler, z, generator, words)

        optimise(run, "text_unet", loss, {"unet": unet})


# ----------------------------------------------------------------------------------- sampling


@torch.no_grad()
def ddim_sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: DDIMScheduler,
    shape: Sequence[int],
    generators: Generators,
    steps: int,
    eta: float = 0.0,
    device: torch.device | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12) from pure noise; eta 0: deterministic, 1: as DDPM.

    Args:
        predict: (x_t `b c h w`, t `b`) -> v, or what the scheduler takes, `b c h w`.
        scheduler: of the noise.
        shape: of one sample.
        generators: one for each sample, of the CPU, so that neither batch nor order counts.
        steps: of sampling.
        eta: share of fresh noise.
        device: of the network; None: the CPU.
    """
    scheduler.set_timesteps(steps)
    # Steps of equal length, of which the last ends at x_0; few steps must begin at pure noise.
    length = scheduler.config.num_train_timesteps // steps
    x = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)
    for t in torch.arange(steps, 0, -1) * length - 1:
        prediction = predict(x, t.to(x.device).expand(len(x)))
        x = scheduler.step(
            prediction,
            t,
            x,
            eta=eta,
            use_clipped_model_output=scheduler.config.clip_sample,  # as guided-diffusion does
            generator=list(generators) if eta else None,
        ).prev_sample
    return x


def guided(
    predict: Callable[..., Tensor], weight: float, *arguments: tuple[Tensor, Tensor]
) -> Tensor:
    """Classifier-free guidance: `e0 + weight (e - e0)`, both in one batch.

    Args:
        predict: the network.
        weight: 1 is without guidance.
        arguments: (with condition, without) of each argument of `predict`.
    """
    if weight == 1:
        return predict(*(with_ for with_, _ in arguments))
    e, e0 = predict(*(torch.cat(pair) for pair in arguments)).chunk(2)
    return e0 + weight * (e - e0)
