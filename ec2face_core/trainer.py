"""The training loop (Sec. 3.5, 4.1) on cached latents; only the mask branch's LoRA is trained.

`Trainer.step` is the paper's training step. `Trainer.update` is one optimiser step over samples
[n, n + batch x accumulation x processes) of the stream.

Everything random is a function of (seed, sample index), see `stream.py`, and the learning rate is a
function of the step. So a checkpoint is the LoRA, the optimiser's state and two counters (and the
scaler of fp16), and resuming with the same settings is bitwise identical to an uninterrupted run.
Long-tail weights are normalised over the samples of a whole optimiser step, so neither ranks nor
accumulation change the loss. `run_dir` holds config.yaml, metrics.jsonl (one line per step),
checkpoints/ and final/ (the LoRA).
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbone import load_backbone, load_tiny_decoder
from .checkpoints import (
    compare_identities,
    final_steps,
    newest_checkpoint,
    restore_training,
    save_checkpoint,
    training_content,
    training_identity,
    training_tensors,
)
from .config import VARIANTS, Config, ConfigError, adapter_name, trained_dir
from .consistency import PixelConsistency
from .data import open_dataset
from .fast.blocks import attention_kernel, prepare_blocks
from .fast.importance import pixel_loss_probability
from .fast.sharding import average_gradients, shard_base
from .fast.transfer import send
from .flow import interpolate, reverse_estimate, target_velocity
from .guards.checks import NotFiniteError
from .guards.ranks import agree, locked, make_accelerator
from .io.paths import user_path
from .latents import EMPTY, LatentCache, cache_folder, encode_dataset
from .lora_file import save_mask_lora, training_settings
from .losses import flow_matching_loss, latent_weights, total_loss
from .mask_branch import (
    MaskKVCache,
    add_mask_lora,
    precompute_mask_kv,
    predict_velocity,
)
from .perception import ClipScorer, FaceParser
from .runs import (
    add_metrics,
    cut_metrics,
    path_digest,
    progress_line,
    provenance,
    read_metrics,
    remove_leftovers,
    whole_folder,
    write_json,
)
from .stream import Samples, SampleStream

METRICS = ("t", "total", "flow", "text", "mask", "beta", "unweighted_flow", "grad_norm")


class Trainer:
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

    def __init__(
        self,
        config: Config,
        variant: str = "both",
        run_dir: Path | str | None = None,
        device: str | None = None,
    ) -> None:
        name = adapter_name(config, variant)  # refuses an unknown variant
        self.config = config.replace(**VARIANTS[variant])
        self.variant = variant
        self.device_name = device
        usual = config.run_dir / "training" / name
        self.run_dir = user_path(run_dir or usual)
        self.publishes = self.run_dir == user_path(usual)
        self.steps_done = 0
        self.samples_done = 0
        self._unlogged: list[tuple[dict[str, float], Tensor]] = []
        self.accelerator: Any = None
        self._training = False
        self._stopping = False

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

        z_t = interpolate(z, noise, t)  # the path of Eqs. 2 and 3
        mu = target_velocity(z, noise)
        v = predict_velocity(  # Eqs. 1, 4
            self.model, z_t, t, text, self._mask_condition(z_m, rows),
            None if self.masks_only else samples.keep_mask,
            guidance=self.config.backbone.guidance, lora=self.config.lora,
        )  # fmt: skip
        flow_loss = flow_matching_loss(v, mu, w)  # Eqs. 3, 11
        total = flow_loss.mean()

        text_loss = mask_loss = None
        if self.consistency is not None:
            z_hat = reverse_estimate(z_t, v, t)  # Eq. 5
            with self.accelerator.autocast():  # Eqs. 6-9: g = dL_mcc / dz_hat, a constant
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
        w = self.long_tail_weights(indices)  # Eq. 10
        sums = torch.zeros(len(METRICS) - 1, device=self.device)
        for k in range(c.accumulation):
            first = (k * c.num_processes + self.accelerator.process_index) * c.batch_size
            rows = slice(first, first + c.batch_size)
            last = k == c.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                samples = self.stream.sample(indices[rows])
                means = self.step(samples, None if w is None else w[rows])
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
        self.samples_done = indices.stop
        seconds = time.perf_counter() - start
        row = {
            "step": self.steps_done, "samples": self.samples_done, "lr": rate,
            "seconds": seconds, "samples_per_second": self.step_samples / seconds,
        }  # fmt: skip
        self._unlogged.append((row, torch.cat([sums / c.accumulation, norm.float().reshape(1)])))

    def long_tail_weights(self, indices: range) -> Tensor | None:
        """Eq. 10 for all samples of a step, of all ranks, so that normalisation covers them all."""
        if not self.config.loss.long_tail:
            return None
        label_maps = send(self.cache.label_maps(self.stream.ids(indices)), self.device)
        side = self.cache.latent_shape[-1]
        return latent_weights(label_maps, self.counts, side, self.config.loss)

    @property
    def masks_only(self) -> bool:
        """Whether the LoRA is on mask tokens alone."""
        return self.config.lora.tokens == "mask"

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

    def _mask_condition(self, z_m: Tensor, rows: Tensor) -> Tensor | MaskKVCache:
        """Mask latents of these rows, or one pass over each face's mask for its noise repeats."""
        repeats = self.config.trainer.noise_repeats
        if repeats == 1:
            return z_m
        faces, place = (rows // repeats).unique(return_inverse=True)
        first = [place.tolist().index(k) for k in range(len(faces))]
        return precompute_mask_kv(self.model, z_m[first])[place]

    # ------------------------------------------------------------------------------------- the run

    def fit(self) -> Path:
        """Train up to `trainer.steps`, from the newest checkpoint if there is one.

        Returns:
            The LoRA's folder `run_dir/final`, which `lora_file.load_mask_lora` reads.

        Raises:
            ConfigError: a setting does not fit the launch, or the checkpoint in `run_dir`.
            NotFiniteError: the loss diverged.
        """
        self._start_processes()
        with locked(self.run_dir) if self.is_main else nullcontext():
            return self._fit()

    def _fit(self) -> Path:
        c = self.config.trainer
        final = self.run_dir / "final"
        checkpoint = self._newest_checkpoint()
        if checkpoint and self.steps_done == c.steps == final_steps(final):
            print(f"{self.variant}: {c.steps} steps are done already, see {final}", flush=True)
            self._publish(final)
            return final
        self.setup()
        if checkpoint:
            self._restore(*checkpoint)
        self._begin_files()
        self._train()
        if self.is_main:
            with whole_folder(final) as part:
                self._write_lora(part)
            self._publish(final)
        self.accelerator.wait_for_everyone()
        return final

    def _publish(self, final: Path) -> None:
        """Put the LoRA where the pipeline, evaluation and notebooks look for it first."""
        place = trained_dir(self.config, self.variant)
        if not self.publishes or not self.is_main or path_digest(place) == path_digest(final):
            return
        with whole_folder(place) as part:
            shutil.copytree(final, part, dirs_exist_ok=True)
        print(f"{self.variant}: published in {place}", flush=True)

    def _train(self) -> None:
        from tqdm.auto import tqdm

        c = self.config.trainer
        bar = tqdm(
            desc=self.variant, unit="step", initial=self.steps_done, total=c.steps, mininterval=1,
            disable=None if self.is_main else True,
        )  # fmt: skip
        self._training = True
        with bar:
            while self.steps_done < c.steps:
                self.update()
                bar.update()
                due = self.steps_done % c.checkpoint_every == 0 or self.steps_done == c.steps
                if due or self.steps_done % c.log_every == 0:
                    self._log()  # before the checkpoint: weights of a diverged loss are not kept
                if due or self._stopping:
                    self._save()
                if self._stopping and self.steps_done < c.steps:
                    raise SystemExit(128 + signal.SIGTERM)

    def stop(self) -> None:
        """End with exit code 143: at once, or in training after the step, with a checkpoint."""
        if self._training:
            self._stopping = True
        else:
            raise SystemExit(128 + signal.SIGTERM)

    def _start_processes(self) -> None:
        if self.accelerator is None:
            self.accelerator = make_accelerator(self.config.trainer, self.device_name)
        self.device = self.accelerator.device

    def setup(self) -> None:
        """Encode what is not cached; load transformer, LoRA and guides; make the optimiser."""
        config = self.config
        c = config.trainer
        self._start_processes()
        with self.accelerator.main_process_first():
            dataset = open_dataset(config, "train")
        last = self.samples_done + (c.steps - self.steps_done) * self.step_samples
        planned = range(self.samples_done, last)
        self.cache = encode_dataset(
            dataset,
            lambda: load_backbone(config.backbone, ("vae", "text")).to(self.device),
            config,
            cache_folder(config),
            captions=lambda cache: self._stream(cache).captions(planned),
            accelerator=self.accelerator,
        )
        self.stream = self._stream(self.cache)
        self.content = training_content(config)
        self.null_text = self.cache.text([EMPTY])
        self.counts = self.cache.label_counts().to(self.device)

        needs_text = config.loss.alpha_text > 0
        needs_mask = config.loss.alpha_mask > 0
        needs_vae = (needs_text or needs_mask) and not config.backbone.pixel_decoder
        parts = ("transformer", "vae") if needs_vae else ("transformer",)
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
            self.consistency = PixelConsistency(
                vae.to(self.device),
                ClipScorer.from_config(**guides) if needs_text else None,
                FaceParser.from_config(**guides) if needs_mask else None,
                config.loss,
            )
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
            self.model, self.optimizer = self.accelerator.prepare(self.transformer, optimizer)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.accelerator.is_main_process

    @property
    def step_samples(self) -> int:
        """Samples of one optimiser step, over all processes."""
        c = self.config.trainer
        return c.batch_size * c.accumulation * c.num_processes

    def _stream(self, cache: LatentCache) -> SampleStream:
        c = self.config.trainer
        probability = None
        if self.config.loss.importance_sampling:
            probability = partial(pixel_loss_probability, config=self.config.loss)
        return SampleStream(
            cache, self.config.seed, c.drop_probability, c.low_discrepancy_t, probability,
            c.noise_repeats,
        )  # fmt: skip

    # --------------------------------------------------------------------- checkpoints and messages

    def _newest_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest valid checkpoint of this run_dir; ConfigError if it is of another training."""
        found = newest_checkpoint(self.run_dir / "checkpoints", ("samples", "identity"))
        about = found[1] if found else {}
        view = {name: about.get(name) for name in ("step", "samples", "sha256")}
        agree(self.accelerator, view, f"checkpoints in {self.run_dir}")
        if found is None:
            return None
        identity = self._identity(training_content(self.config))
        compare_identities(about["identity"], identity, self.run_dir)
        if about["step"] > self.config.trainer.steps:
            raise ConfigError(
                f"{self.run_dir} holds a training of {about['step']} steps, more than trainer.steps"
                f" {self.config.trainer.steps}: raise it, name another --run-dir, or delete this"
            )
        self.steps_done = about["step"]
        self.samples_done = about["samples"]
        return found

    def _identity(self, content: dict[str, str]) -> dict[str, Any]:
        return training_identity(self.config) | {"variant": self.variant, "content": content}

    def _named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.transformer.named_parameters() if p.requires_grad}

    def _save(self) -> None:
        if self.is_main:
            state = {"samples": self.samples_done, "identity": self._identity(self.content)}
            if self.accelerator.scaler is not None:  # fp16
                state["scaler"] = self.accelerator.scaler.state_dict()
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.steps_done,
                training_tensors(self._named_parameters(), self.optimizer),
                state,
                self.config.trainer.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        restore_training(self._named_parameters(), self.optimizer, tensors)
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _begin_files(self) -> None:
        """Write config.yaml, cut metrics.jsonl back to the step resumed from, print a line."""
        if not self.is_main:
            return
        remove_leftovers(self.run_dir)
        self.config.save(self.run_dir / "config.yaml")
        cut_metrics(self.run_dir, self.steps_done)
        trainable = sum(p.numel() for p in self.parameters)
        frozen = sum(p.numel() for p in self.transformer.parameters()) - trainable
        resumed = f", resumed after step {self.steps_done}" if self.steps_done else ""
        print(
            f"{self.variant}: {trainable:,} LoRA parameters "
            f"({100 * trainable / frozen:.3f} % of the transformer's), "
            f"{self.accelerator.num_processes} x {self.device.type}, {self.step_samples} samples "
            f"per step, attention kernel {self._kernels()}, latents in {self.cache.folder}"
            f"{resumed}",
            flush=True,
        )

    def _kernels(self) -> str:
        """Names of the attention kernels of batches with every mask and with dropped ones."""
        _, h, w = self.cache.latent_shape
        tokens = self.config.backbone.text_length + 2 * (h // 2) * (w // 2)
        precision = self.config.trainer.mixed_precision
        kernels = [
            attention_kernel(self.transformer, tokens, precision, self.device, masked)
            for masked in (False, True)
        ]
        return " or, where a mask is dropped, ".join(dict.fromkeys(kernels))

    def _log(self) -> None:
        """Write the steps since the last call, and print their mean above the progress bar."""
        from tqdm.auto import tqdm

        means = torch.stack([values for _, values in self._unlogged])
        means = self.accelerator.reduce(means, "mean").tolist()
        rows = [
            row | dict(zip(METRICS, values, strict=True))
            for (row, _), values in zip(self._unlogged, means, strict=True)
        ]
        self._unlogged = []
        if self.is_main:
            add_metrics(self.run_dir, rows)
            tqdm.write(progress_line(rows, self.config.trainer.steps))
            sys.stdout.flush()
        bad = [r["step"] for r in rows if not math.isfinite(r["total"] + r["grad_norm"])]
        if bad and self.config.trainer.mixed_precision != "fp16":  # whose scaler skips such steps
            raise NotFiniteError(
                f"the loss or gradient of step {bad[0]} is not finite; the newest checkpoint is "
                "from before. Lower trainer.learning_rate, or set loss.clip"
            )

    def _write_lora(self, folder: Path) -> None:
        config = self.config
        save_mask_lora(
            self.transformer, folder, config.lora, config.backbone.text_length, config.data.size,
            config.backbone.path, training_settings(config, self.variant),
        )  # fmt: skip
        record = provenance(
            config,
            seconds=sum(row["seconds"] for row in read_metrics(self.run_dir)),
            inputs=[config.backbone.path],
            variant=self.variant,
            steps=self.steps_done,
            samples=self.samples_done,
            processes=self.accelerator.num_processes,
            data=self.cache.folder.name,
        )
        write_json(folder / "provenance.json", record)


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
