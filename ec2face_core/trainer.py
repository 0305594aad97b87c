"""The training step (Sec. 3.5, 4.1) on cached latents; only the mask branch's LoRA is trained.

`Trainer.step` is the paper's training step. `Trainer.update` is one optimiser step over samples
[n, n + batch x accumulation x processes) of the stream. `training/run.py` is what is around them.

Everything random is a function of (seed, sample index), see `stream.py`, and the learning rate is a
function of the step. So a checkpoint is the LoRA, the optimiser's state and two counters (and the
scaler of fp16), and resuming with the same settings is bitwise identical to an uninterrupted run.
Long-tail weights are normalised over the samples of a whole optimiser step, so neither ranks nor
accumulation change the loss.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .backbone import TextEmbedding, load_backbone, load_tiny_decoder
from .consistency import PixelConsistency
from .data import open_dataset
from .fast.blocks import prepare_blocks
from .fast.importance import pixel_loss_probability
from .fast.memory import check_memory
from .fast.precision import computes_natively, guides_precision
from .fast.sharding import average_gradients, ignore_frozen, shard_base
from .fast.transfer import send
from .flow import follow_path, interpolate, reverse_estimate, target_velocity
from .latents import EMPTY, LatentCache, cache_folder, encode_dataset
from .losses import flow_matching_loss, focal_weights, latent_weights, total_loss
from .mask_branch import (
    MaskKVCache,
    add_mask_lora,
    mask_latents_of,
    precompute_mask_kv,
    predict_velocity,
)
from .perception import ClipScorer, FaceParser
from .stream import Samples, SampleStream
from .training.checkpoints import training_content
from .training.ema import AveragedLora
from .training.log import METRICS
from .training.run import TrainingRun
from .training.validation import ValidationFaces

SCALE_FACES = 2048  # whose masks give the scale of the long-tail weights


@dataclass(frozen=True)
class Batch:
    """What one micro-batch computes: b samples on the device, if not said otherwise."""

    rows: Tensor  # (b,) their numbers among the given samples, on the CPU
    share: float  # that they stand for of the given samples
    z: Tensor  # b c h w, latents of the faces
    z_m: Tensor  # b c h w, latents of the masks
    m: Tensor  # b H W int64, label maps
    captions: list[str]
    text: TextEmbedding  # of the captions, or of the empty one
    t: Tensor  # (b,)
    noise: Tensor  # b c h w
    keep_text: Tensor  # (b,) bool
    keep_mask: Tensor  # (b,) bool
    keep_mask_tokens: Tensor | None  # (b,) bool on the CPU; None: all mask tokens are attended to
    pixel_weight: Tensor | None  # (b,) on the CPU, see Samples


class Trainer(TrainingRun):
    """Trains one variant of Tables 3 and 4.

    Args:
        config: the experiment; `VARIANTS[variant]` is laid over it.
        variant: row of Tables 3 and 4.
        run_dir: where everything goes; default `runs/<profile>/training/<adapter_name>`, whose
            LoRA is also put where everything looks for it, `runs/<profile>/adapters`. A directory
            that holds a checkpoint is resumed.
        device: "cpu" keeps the training off a GPU; default: accelerate chooses.

    Raises:
        ConfigError: an unknown variant.
    """

    # ----------------------------------------------------------------------------- the paper's step

    def step(self, samples: Samples, w: Tensor | None = None) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch: the paper's step in its symbols.

        Eq. 10 is computed once for a whole optimiser step (`update`), Eq. 13 in `_prepare`, because
        it decides the inputs. Gradients are added to the LoRA's.

        Args:
            samples: faces, times, noise and dropped conditions of b samples.
            w: Eq. 10 at latent resolution, `b h w`; None: Eq. 3 instead of Eq. 11.

        Returns:
            Means over the computed samples for the log, detached: t, the parts of Eq. 12, and
            unweighted_flow (Eq. 3).
        """
        x = self._prepare(samples)
        w = None if w is None else w[x.rows]
        velocity = partial(  # Eqs. 1, 4
            predict_velocity, self.model, text=x.text, mask_latents=self._mask_condition(x),
            keep_mask=x.keep_mask_tokens, guidance=self.config.backbone.guidance,
        )  # fmt: skip
        z_t = interpolate(x.z, x.noise, x.t)  # the path of Eqs. 2 and 3
        mu = target_velocity(x.z, x.noise)
        v = velocity(z_t, x.t)
        if self.config.loss.long_tail and self.is_focal:
            w = focal_weights(v, mu)  # in place of Eq. 10
        L_opt_fm = flow_matching_loss(v, mu, w)  # Eqs. 3, 11

        has_begun = self.steps_done >= self.config.loss.begins * self.config.trainer.steps
        if self.consistency is None or not has_begun:
            parts = total_loss(L_opt_fm, None, None, x.t, self.config.loss)
        else:
            states = (z_t, v, x.t)
            if self.config.loss.states == "own":
                states = self._own_states(velocity, x)
            z_hat = reverse_estimate(*states)  # Eq. 5
            with guides_precision(self.config, self.accelerator):
                L_mcc = self.consistency.loss(  # Eqs. 6-9
                    z_hat, x.captions, x.m, states[-1], x.keep_text, x.keep_mask, x.pixel_weight
                )
            total = L_opt_fm + L_mcc.total  # Eq. 12
            parts = dataclasses.replace(L_mcc, total=total, flow=L_opt_fm)
        self.accelerator.backward(parts.total.mean() * x.share / self.config.trainer.accumulation)

        with torch.no_grad():
            unweighted = flow_matching_loss(v, mu).mean()
        return parts.mean() | {"t": x.t.mean(), "unweighted_flow": unweighted}

    def update(self) -> None:
        """One optimiser step over the next samples of the stream."""
        start = time.perf_counter()
        c = self.config.trainer
        indices = range(self.samples_done, self.samples_done + self.step_samples)
        whole = self.config.loss.normalize == "mean"  # over the samples of all ranks
        w = self.long_tail_weights(indices) if whole else None  # Eq. 10
        sums = torch.zeros(len(METRICS) - 1, device=self.device)
        for k in range(c.accumulation):
            first = (k * c.num_processes + self.accelerator.process_index) * c.batch_size
            rows = slice(first, first + c.batch_size)
            last = k == c.accumulation - 1
            samples = self.stream.sample(indices[rows])
            if not last or self.steps_done + 1 < c.steps:
                self._read_ahead(indices[rows].start + c.batch_size * c.num_processes)
            own = self.long_tail_weights(indices[rows]) if w is None else w[rows]
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                means = self.step(samples, own)
            sums += torch.stack([means[name] for name in METRICS[:-1]])
        if c.shard:
            average_gradients(self.parameters)
        rate = learning_rate(self.steps_done, c.steps, c.learning_rate, c.warmup, c.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self.accelerator.clip_grad_norm_(self.parameters, c.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        self.average.update(self.steps_done)
        self.samples_done = indices.stop
        seconds = time.perf_counter() - start
        row = {
            "step": self.steps_done, "samples": self.samples_done, "lr": rate,
            "seconds": seconds, "samples_per_second": self.step_samples / seconds,
        }  # fmt: skip
        self.log.add(row, torch.cat([sums / c.accumulation, norm.float().reshape(1)]))

    @property
    def is_focal(self) -> bool:
        """Whether the weights of Eq. 11 follow the error, not the classes."""
        return self.config.loss.weighting == "focal"

    def long_tail_weights(self, indices: range) -> Tensor | None:
        """Eq. 10 for samples of the stream; None without long-tail learning by classes."""
        if not self.config.loss.long_tail or self.is_focal:
            return None
        label_maps = send(self.cache.label_maps(self.stream.ids(indices)), self.device)
        side = self.cache.latent_shape[-1]
        return latent_weights(label_maps, self.counts, side, self.config.loss, self.weight_scale)

    def _weight_scale(self) -> Tensor | None:
        """The constant that long-tail weights are divided by; None where there is none.

        It is taken over `SCALE_FACES` faces of the training set, evenly spaced, the same on every
        rank.
        """
        loss = self.config.loss
        if not loss.long_tail or self.is_focal or loss.normalize != "constant":
            return None
        spaced = torch.linspace(0, len(self.cache.ids) - 1, SCALE_FACES).round().long()
        side = self.cache.latent_shape[-1]
        raw = dataclasses.replace(loss, normalize="none")
        squares = []  # of each face
        for rows in spaced.unique().split(32):
            maps = self.cache.label_maps([self.cache.ids[i] for i in rows.tolist()])
            w = latent_weights(maps.to(self.device), self.counts, side, raw)
            squares.append(w.double().square().mean((1, 2)))
        return torch.cat(squares).mean().sqrt()

    def _prepare(self, samples: Samples) -> Batch:
        """The samples that are computed, on the device, with Eq. 13 applied."""
        rows, share = self._computed_rows(samples)
        samples = samples[rows]
        cached = self.cache.batch(samples.ids, samples.caption_indices)
        z, z_m, m = (send(cached[name], self.device) for name in ("z", "z_mask", "label_map"))
        text = cached["text"].where(samples.keep_text, self.null_text).send(self.device)  # Eq. 13
        t, noise, keep_text, keep_mask = (
            send(part, self.device)
            for part in (samples.t, samples.noise, samples.keep_text, samples.keep_mask)
        )
        keep_mask_tokens = None if self.masks_only else samples.keep_mask
        if self.has_black_masks:
            z_m = torch.where(keep_mask[:, None, None, None], z_m, self.black_mask)
            keep_mask_tokens = None
        return Batch(
            rows, share, z, z_m, m, cached["captions"], text, t, noise, keep_text, keep_mask,
            keep_mask_tokens, samples.pixel_weight,
        )  # fmt: skip

    def _computed_rows(self, samples: Samples) -> tuple[Tensor, float]:
        """The rows that are computed, and the share of the b samples that they stand for.

        With the LoRA on mask tokens alone, a sample whose mask is dropped has no gradient: nothing
        attends to the only tokens that depend on the LoRA, unless it is a black image instead
        (`trainer.null_mask`). Leaving it out saves its work and keeps the key mask away, which
        would exclude flash attention. DDP needs a forward on every rank, so one row stays, with
        the factor 0, where all masks are dropped.
        """
        b = len(samples.ids)
        if not self.masks_only:
            return torch.arange(b), 1.0
        kept = samples.keep_mask.nonzero()[:, 0]
        return (kept, len(kept) / b) if len(kept) else (kept.new_zeros(1), 0.0)

    def _own_states(
        self, velocity: Callable[[Tensor, Tensor], Tensor], x: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States, velocities and times on the model's own path (`loss.states: own`).

        The paper's losses look at noised data instead.
        """
        t = self.config.loss.own_below * x.t
        with torch.no_grad():
            z_t = follow_path(velocity, x.noise, t, self.config.loss.own_steps)
        return z_t, velocity(z_t, t), t

    def _read_ahead(self, first: int) -> None:
        """Begin to read the next micro-batch, of samples `first` ..., beside the computation."""
        samples = self.stream.sample(range(first, first + self.config.trainer.batch_size))
        samples = samples[self._computed_rows(samples)[0]]
        self.cache.read_ahead(samples.ids, samples.caption_indices)

    def _mask_condition(self, x: Batch) -> Tensor | MaskKVCache:
        """Mask latents, or one pass over each face's mask for its noise repeats."""
        repeats = self.config.trainer.noise_repeats
        if repeats == 1:
            return x.z_m
        faces, place = (x.rows // repeats).unique(return_inverse=True)
        first = [place.tolist().index(k) for k in range(len(faces))]
        return precompute_mask_kv(self.model, x.z_m[first])[place]

    def setup(self) -> None:
        """Encode what is not cached; load transformer, LoRA and guides; make the optimiser."""
        self._start_processes()
        check_memory(self.config, self.device)
        self._encode()
        self._load_models()
        self._make_optimizer()

    def _encode(self) -> None:
        """The latent cache, and the stream of samples from it."""
        config = self.config
        c = config.trainer
        with self.accelerator.main_process_first():
            dataset = open_dataset(config, "train")
            if c.validate_every:
                self.validation = ValidationFaces(config)
        fixed = self.validation.captions if self.validation else []
        last = self.samples_done + (c.steps - self.steps_done) * self.step_samples
        numbers: Sequence[int] = range(self.samples_done, last)
        memory = config.data.texts == "memory"
        if memory:  # this rank's alone
            mine = self.accelerator.process_index * c.batch_size
            turn = c.num_processes * c.batch_size
            numbers = [k for k in numbers if mine <= (k - numbers[0]) % turn < mine + c.batch_size]
        self.cache = encode_dataset(
            dataset,
            lambda: load_backbone(config.backbone, ("vae", "text")).to(self.device),
            config,
            cache_folder(config),
            captions=lambda cache: {*self._stream(cache).captions(numbers), *fixed},
            accelerator=self.accelerator,
            memory=memory,
        )
        self.stream = self._stream(self.cache)
        self.content = training_content(config)
        self.null_text = self.cache.text([EMPTY])
        self.counts = self.cache.label_counts().to(self.device)
        self.weight_scale = self._weight_scale()

    def _load_models(self) -> None:
        """The frozen transformer with a new LoRA, and the guides of the consistency losses."""
        config = self.config
        needs_text = config.loss.alpha_text > 0
        needs_mask = config.loss.alpha_mask > 0
        needs_vae = (needs_text or needs_mask) and not config.backbone.pixel_decoder
        parts = {"transformer"} | ({"vae"} if needs_vae else set())
        parts |= {"vae", "scheduler"} if self.validation else set()
        parts |= {"vae"} if self.has_black_masks else set()
        backbone = load_backbone(config.backbone, parts)
        if self.has_black_masks:
            nothing = torch.zeros(1, config.data.size, config.data.size, dtype=torch.long)
            self.black_mask = mask_latents_of(backbone.vae, nothing).to(self.device)
        self.transformer = backbone.transformer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.parameters = add_mask_lora(self.transformer, config.lora)
        prepare_blocks(self.transformer, config.trainer)

        self.consistency = None
        if needs_text or needs_mask:
            vae = backbone.vae
            if not needs_vae:
                shape = self.cache.latent_shape
                vae = load_tiny_decoder(config.backbone, shape, config.data.size)
            guides = {"config": config.perception, "device": self.device}
            clip = ClipScorer.from_config(**guides) if needs_text else None
            if clip and computes_natively(config):  # autocast would cast frozen weights every time
                clip.model.to(torch.bfloat16)
            self.consistency = PixelConsistency(
                vae.to(self.device),
                clip,
                FaceParser.from_config(**guides) if needs_mask else None,
                config.loss,
            )
        if self.validation:
            backbone.vae.to(self.device)
            pixels = self.consistency
            guides_there = (pixels.clip, pixels.parser) if pixels else ()
            self.validation.open(backbone, self.cache, self.device, *guides_there)

    def _make_optimizer(self) -> None:
        """AdamW over the LoRA, its moving average, and accelerate's wrappers."""
        c = self.config.trainer
        self.average = AveragedLora(self.parameters, c.ema)
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=c.learning_rate,
            weight_decay=c.weight_decay,
            fused=self.device.type == "cuda",
        )
        if c.shard:
            self.model = shard_base(self.transformer, self.accelerator)
            self.optimizer = self.accelerator.prepare(optimizer)
        else:
            ignore_frozen(self.transformer)
            self.model, self.optimizer = self.accelerator.prepare(self.transformer, optimizer)

    def _stream(self, cache: LatentCache) -> SampleStream:
        c = self.config.trainer
        probability = None
        if self.config.loss.importance_sampling:
            probability = partial(pixel_loss_probability, config=self.config.loss)
        return SampleStream(
            cache, self.config.seed, c.drop_probability, c.low_discrepancy_t, probability,
            c.noise_repeats, c.rare_faces,
        )  # fmt: skip


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "constant"
) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then constant or half a cosine towards 0.

    Args:
        step: number of the optimiser step.
        steps: length of the training.
        peak: learning rate after the warm-up.
        warmup: steps of the warm-up.
        schedule: "constant" or "cosine".
    """
    rate = peak * min(1.0, (step + 1) / max(1, warmup))
    if schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * max(0.0, progress)))
    return rate
