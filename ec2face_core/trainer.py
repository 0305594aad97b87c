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

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backbone import load_backbone, load_tiny_decoder
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
from .losses import flow_matching_loss, latent_weights, total_loss
from .mask_branch import MaskKVCache, add_mask_lora, precompute_mask_kv, predict_velocity
from .perception import ClipScorer, FaceParser
from .stream import Samples, SampleStream
from .training.checkpoints import training_content
from .training.ema import AveragedLora
from .training.log import METRICS
from .training.run import TrainingRun
from .training.validation import ValidationFaces


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

        Eq. 13 comes first because it decides the inputs; Eq. 10 is computed once for a whole
        optimiser step (`update`). Gradients are added to the LoRA's. Samples whose gradient is zero
        are left out, see `_taught`.

        Args:
            samples: faces, times, noise and dropped conditions of b samples.
            w: Eq. 10 at latent resolution, `b h w`; None: Eq. 3 instead of Eq. 11.

        Returns:
            Means over the computed samples for the log, detached: t, the parts of Eq. 12, and
            unweighted_flow (Eq. 3).
        """
        rows, share = self._taught(samples)
        samples = samples[rows]
        w = None if w is None else w[rows]
        z, z_m, m, c, text = self._read(samples)
        t = send(samples.t, self.device)
        noise = send(samples.noise, self.device)

        text = text.where(samples.keep_text, self.null_text).send(self.device)  # Eq. 13
        keep_text = send(samples.keep_text, self.device)
        keep_mask = send(samples.keep_mask, self.device)

        velocity = partial(  # Eqs. 1, 4
            predict_velocity, self.model, text=text, mask_latents=self._mask_condition(z_m, rows),
            keep_mask=None if self.masks_only else samples.keep_mask,
            guidance=self.config.backbone.guidance, lora=self.config.lora,
        )  # fmt: skip
        z_t = interpolate(z, noise, t)  # the path of Eqs. 2 and 3
        mu = target_velocity(z, noise)
        v = velocity(z_t, t)
        flow_loss = flow_matching_loss(v, mu, w)  # Eqs. 3, 11
        total = flow_loss.mean()

        text_loss = mask_loss = None
        if self.consistency is not None:
            v_c = v
            if self.config.loss.states == "own":  # not the paper's: where sampling comes by
                t = self.config.loss.own_below * t
                with torch.no_grad():
                    z_t = follow_path(velocity, noise, t, self.config.loss.own_steps)
                v_c = velocity(z_t, t)
            z_hat = reverse_estimate(z_t, v_c, t)  # Eq. 5
            with guides_precision(self.config, self.accelerator):
                # Eqs. 6-9: g = dL_mcc / dz_hat, a constant
                g, text_loss, mask_loss = self.consistency.gradient(
                    z_hat, c, m, t, keep_text, keep_mask, samples.pixel_weight
                )
            total = total + (z_hat * g).sum() / len(t)  # has the gradient of Eq. 12, not its value
        self.accelerator.backward(total * share / self.config.trainer.accumulation)

        with torch.no_grad():
            parts = total_loss(
                flow_loss, text_loss, mask_loss, t, self.config.loss, keep_text, keep_mask
            )  # Eqs. 9, 12 for the log
            unweighted = flow_matching_loss(v, mu).mean()
        return parts.mean() | {"t": t.mean(), "unweighted_flow": unweighted}

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

    def long_tail_weights(self, indices: range) -> Tensor | None:
        """Eq. 10 for samples of the stream; None without long-tail learning."""
        if not self.config.loss.long_tail:
            return None
        label_maps = send(self.cache.label_maps(self.stream.ids(indices)), self.device)
        side = self.cache.latent_shape[-1]
        return latent_weights(label_maps, self.counts, side, self.config.loss)

    def _taught(self, samples: Samples) -> tuple[Tensor, float]:
        """The rows that are computed, and the share of the b samples that they stand for.

        With the LoRA on mask tokens alone, a sample whose mask is dropped has no gradient: nothing
        attends to the only tokens that depend on the LoRA. Leaving it out saves its work and keeps
        the key mask away, which would exclude flash attention. DDP needs a forward on every rank,
        so one row stays, with the factor 0, where all masks are dropped.
        """
        b = len(samples.ids)
        if not self.masks_only:
            return torch.arange(b), 1.0
        kept = samples.keep_mask.nonzero()[:, 0]
        return (kept, len(kept) / b) if len(kept) else (kept.new_zeros(1), 0.0)

    def _read(self, samples: Samples) -> tuple[Tensor, Tensor, Tensor, list[str], Any]:
        """Cached inputs: z, z_m and m on the device, captions c and their embeddings."""
        batch = self.cache.batch(samples.ids, samples.caption_indices)
        tensors = (send(batch[name], self.device) for name in ("z", "z_mask", "label_map"))
        return *tensors, batch["captions"], batch["text"]

    def _read_ahead(self, first: int) -> None:
        """Begin to read the next micro-batch, of samples `first` ..., beside the computation."""
        samples = self.stream.sample(range(first, first + self.config.trainer.batch_size))
        samples = samples[self._taught(samples)[0]]
        self.cache.read_ahead(samples.ids, samples.caption_indices)

    def _mask_condition(self, z_m: Tensor, rows: Tensor) -> Tensor | MaskKVCache:
        """Mask latents of these rows, or one pass over each face's mask for its noise repeats."""
        repeats = self.config.trainer.noise_repeats
        if repeats == 1:
            return z_m
        faces, place = (rows // repeats).unique(return_inverse=True)
        first = [place.tolist().index(k) for k in range(len(faces))]
        return precompute_mask_kv(self.model, z_m[first])[place]

    def setup(self) -> None:
        """Encode what is not cached; load transformer, LoRA and guides; make the optimiser."""
        config = self.config
        c = config.trainer
        self._start_processes()
        check_memory(config, self.device)
        with self.accelerator.main_process_first():
            dataset = open_dataset(config, "train")
            if c.validate_every:
                self.validation = ValidationFaces(config)
        fixed = self.validation.captions if self.validation else []
        last = self.samples_done + (c.steps - self.steps_done) * self.step_samples
        drawn: Sequence[int] = range(self.samples_done, last)
        memory = config.data.texts == "memory"
        if memory:  # this rank's alone
            mine = self.accelerator.process_index * c.batch_size
            turn = c.num_processes * c.batch_size
            drawn = [k for k in drawn if mine <= (k - drawn[0]) % turn < mine + c.batch_size]
        self.cache = encode_dataset(
            dataset,
            lambda: load_backbone(config.backbone, ("vae", "text")).to(self.device),
            config,
            cache_folder(config),
            captions=lambda cache: {*self._stream(cache).captions(drawn), *fixed},
            accelerator=self.accelerator,
            memory=memory,
        )
        self.stream = self._stream(self.cache)
        self.content = training_content(config)
        self.null_text = self.cache.text([EMPTY])
        self.counts = self.cache.label_counts().to(self.device)

        needs_text = config.loss.alpha_text > 0
        needs_mask = config.loss.alpha_mask > 0
        needs_vae = (needs_text or needs_mask) and not config.backbone.pixel_decoder
        parts = {"transformer"} | ({"vae"} if needs_vae else set())
        parts |= {"vae", "scheduler"} if self.validation else set()
        backbone = load_backbone(config.backbone, parts)
        self.transformer = backbone.transformer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.parameters = add_mask_lora(self.transformer, config.lora)
        prepare_blocks(self.transformer, c)

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
    """Learning rate of step 0, 1, ...: linear warm-up, then constant or half a cosine to 0.

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
