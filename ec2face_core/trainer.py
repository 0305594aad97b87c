"""Several processes: accelerate's DDP over the LoRA, or the frozen base in shards.

By default every process holds the whole frozen base, and DDP averages the LoRA's gradients (44 MB
at paper scale). `trainer.shard` is for GPUs that cannot hold the base (24 GB for FLUX.1-dev in
bfloat16): FSDP2 leaves each process 1/n of it and gathers one block at a time. The LoRA stays whole
on every process, so that optimiser, checkpoints and files are the same in both.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbone import load_backbone, load_tiny_decoder
from .config import VARIANTS, Config, ConfigError, TrainerConfig, adapter_name, resolve
from .consistency import PixelConsistency
from .fast.blocks import attention_kernel, prepare_blocks
from .fast.importance import gate_probability
from .fast.sharding import average_gradients, shard_base
from .flow import interpolate, reverse_estimate, velocity
from .latents import EMPTY, LatentCache, cache_folder, encode_dataset
from .losses import LossBreakdown, flow_matching_loss, latent_weights, total_loss
from .mask_branch import (
    MaskKVCache,
    add_mask_lora,
    precompute_mask_kv,
    predict_velocity,
    save_mask_lora,
)
from .perception import ClipScorer, FaceParser
from .runs import (
    add_metrics,
    compare_identities,
    cut_metrics,
    newest_checkpoint,
    read_metrics,
    restore_training,
    save_checkpoint,
    training_identity,
    training_tensors,
    whole_folder,
)
from .stream import Draws, SampleStream


def make_accelerator(config: TrainerConfig, device: str | None = None) -> Any:
    """Accelerate with DDP over the LoRA only, checked against the configuration.

    Args:
        config: reads mixed_precision, num_processes and shard.
        device: "cpu" keeps it off a GPU; None: accelerate chooses.

    Raises:
        ConfigError: it was started on another number of processes, or cannot work on this machine.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    cpu = device == "cpu" or not torch.cuda.is_available()
    if cpu and config.mixed_precision == "fp16":
        raise ConfigError("trainer.mixed_precision: fp16 needs a GPU; use bf16 or no")
    AcceleratorState._reset_state()  # else a second trainer of a notebook has the first's precision
    accelerator = Accelerator(
        # Without cpu=True each rank of a machine without GPU believes that it is alone.
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    if accelerator.num_processes != config.num_processes:
        raise ConfigError(
            f"started on {accelerator.num_processes} processes, but trainer.num_processes is "
            f"{config.num_processes}: set it to what you start, or start with launch.run"
        )
    if config.shard and config.num_processes == 1:
        raise ConfigError(
            "trainer.shard divides the base among several processes: raise trainer.num_processes, "
            "or turn it off"
        )
    return accelerator


METRICS = ("t", "total", "flow", "text", "mask", "beta", "unweighted_flow", "grad_norm")


class Trainer:
    """Trains one variant of Tables 3 and 4.

    Args:
        config: the experiment; `VARIANTS[variant]` is laid over it.
        variant: what the adapter is trained with.
        run_dir: where everything goes; default `runs/<profile>/training/<variant>`. A directory
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
        name = adapter_name(config, variant)  # refuses an unknown one
        if config.trainer.schedule not in ("constant", "cosine"):
            raise ConfigError(f"trainer.schedule {config.trainer.schedule!r}: constant or cosine")
        if (k := config.trainer.noise_repeats) != 1:
            if config.lora.attention != "decoupled":
                raise ConfigError(
                    f"trainer.noise_repeats {k} needs lora.attention decoupled: in joint "
                    "attention mask tokens depend on time, noise and text"
                )
            if k < 1 or config.trainer.batch_size % k:
                raise ConfigError(
                    f"trainer.batch_size {config.trainer.batch_size} must be a multiple of "
                    f"trainer.noise_repeats {k}"
                )
        self.config = config.replace(**VARIANTS[variant])
        self.variant, self.device_name = variant, device
        self.run_dir = resolve(run_dir or config.run_dir / "training" / name)
        self.step = self.samples = 0  # done so far
        self._rows: list[tuple[dict[str, float], Tensor]] = []  # steps that are not yet logged

    # ------------------------------------------------------------------------------- the run

    def fit(self) -> Path:
        """Train up to `trainer.steps`, from the newest checkpoint if there is one.

        Returns:
            The adapter folder `run_dir/final`, what `backbone.load_mask_lora` reads.

        Raises:
            ConfigError: a setting does not fit the launch, or the checkpoint in `run_dir`.
            FloatingPointError: the loss diverged.
        """
        final, c = self.run_dir / "final", self.config.trainer
        checkpoint = self._checkpoint()
        if checkpoint and checkpoint[1]["step"] >= c.steps and final.is_dir():
            print(f"{self.variant}: {c.steps} steps are done already, see {final}", flush=True)
            return final
        self.setup()
        if checkpoint:
            self._restore(*checkpoint)
        self._begin_files()
        from tqdm.auto import tqdm

        bar = tqdm(
            desc=self.variant, unit="step", initial=self.step, total=c.steps, mininterval=1,
            disable=None if self.is_main else True,
        )  # fmt: skip
        with bar:
            while self.step < c.steps:
                self.train_step()
                bar.update()
                due = self.step % c.checkpoint_every == 0 or self.step == c.steps
                if due or self.step % c.log_every == 0:
                    self._log()  # before the checkpoint: no weights of a diverged loss are kept
                if due:
                    self._save()
        if self.is_main:
            with whole_folder(final) as part:
                self._write_adapter(part)
        self.accelerator.wait_for_everyone()
        return final

    def setup(self) -> None:
        """Encode what is not cached; load transformer, LoRA and critics; make the optimiser."""
        from .data import open_dataset

        config, c = self.config, self.config.trainer
        self.accelerator = make_accelerator(c, self.device_name)
        self.device = self.accelerator.device
        with self.accelerator.main_process_first():
            dataset = open_dataset(config, "train")
        planned = range(c.steps * self.step_samples)
        self.cache = encode_dataset(
            dataset,
            lambda: load_backbone(config.backbone, ("vae", "text")).to(self.device),
            config,
            cache_folder(config),
            captions=lambda cache: self._stream(cache).captions(planned),
            accelerator=self.accelerator,
        )
        self.stream, self.null_text = self._stream(self.cache), self.cache.text([EMPTY])
        self.counts = self.cache.label_counts()

        guided = config.loss.alpha_text > 0, config.loss.alpha_mask > 0
        tiny = config.backbone.pixel_decoder
        parts = ("transformer", "vae") if any(guided) and not tiny else ("transformer",)
        backbone = load_backbone(config.backbone, parts)
        if any(guided) and tiny:
            shape = self.cache.latent_shape
            backbone.vae = load_tiny_decoder(config.backbone, shape, config.data.size)
        self.transformer = backbone.transformer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.parameters = add_mask_lora(self.transformer, config.lora)
        prepare_blocks(self.transformer, c)
        self.guidance = None
        if any(guided):
            of = {"config": config.perception, "device": self.device}
            self.guidance = PixelConsistency(
                backbone.vae.to(self.device),
                ClipScorer.from_config(**of) if guided[0] else None,
                FaceParser.from_config(**of) if guided[1] else None,
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
        c, loss = self.config.trainer, self.config.loss
        gate = partial(gate_probability, config=loss) if loss.importance_sampling else None
        return SampleStream(
            cache, self.config.seed, c.drop_probability, c.low_discrepancy_t, gate, c.noise_repeats
        )

    # ----------------------------------------------------------------------------- one step

    def train_step(self) -> None:
        """One optimiser step over the next samples of the stream."""
        start, c, accelerator = time.perf_counter(), self.config.trainer, self.accelerator
        indices = range(self.samples, self.samples + self.step_samples)
        weights = self._weights(indices)
        sums = torch.zeros(len(METRICS) - 1, device=self.device)
        for k in range(c.accumulation):
            first = (k * accelerator.num_processes + accelerator.process_index) * c.batch_size
            rows = slice(first, first + c.batch_size)
            last = k == c.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                draws = self.stream.draw(indices[rows])
                loss, means = self.loss(draws, None if weights is None else weights[rows])
                accelerator.backward(loss / c.accumulation)
            sums += torch.stack([means[name] for name in METRICS[:-1]])
        if c.shard:
            average_gradients(self.parameters)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(c, self.step)
        norm = accelerator.clip_grad_norm_(self.parameters, c.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.samples = self.step + 1, indices.stop
        seconds = time.perf_counter() - start
        about = {"step": self.step, "samples": self.samples, "lr": group["lr"]}
        about |= {"seconds": seconds, "samples_per_second": self.step_samples / seconds}
        self._rows.append((about, torch.cat([sums / c.accumulation, norm.float().reshape(1)])))

    def loss(self, draws: Draws, weights: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of Eq. 12 to call backward on, and the batch means for the log.

        The tensor's gradient is that of Eq. 12; its value is not (see `guidance.py`), the log's is.

        Args:
            draws: b samples of the stream.
            weights: of Eq. 11 at latent resolution, `b h w`; None = Eq. 3.
        """
        config, to = self.config, self.device
        batch = self.cache.batch(draws.ids, draws.captions)
        z, z_mask, label_map = (batch[k].to(to) for k in ("z", "z_mask", "label_map"))
        text = batch["text"].where(draws.keep_text, self.null_text).to(to)
        keep_text, keep_mask = draws.keep_text.to(to), draws.keep_mask.to(to)
        t, noise = draws.t.to(to), draws.noise.to(to)

        z_t, target = interpolate(z, noise, t), velocity(z, noise)
        v = predict_velocity(
            self.model, z_t, t, text, self._masks(z_mask),
            None if draws.keep_mask.all() else keep_mask,  # decided without waiting for the GPU
            guidance=config.backbone.guidance, lora=config.lora,
        )  # fmt: skip
        flow = flow_matching_loss(v, target, weights)
        loss, text_loss, mask_loss = flow.mean(), None, None
        if self.guidance is not None:
            z_hat = reverse_estimate(z_t, v, t)
            with self.accelerator.autocast():
                g, text_loss, mask_loss = self.guidance.gradient(
                    z_hat, batch["captions"], label_map, t, keep_text, keep_mask, draws.gate
                )
            loss = loss + (z_hat * g).sum() / len(t)

        with torch.no_grad():
            parts: LossBreakdown = total_loss(
                flow, text_loss, mask_loss, t, config.loss, keep_text, keep_mask
            )
            means = {"t": t.mean(), "unweighted_flow": flow_matching_loss(v, target).mean()}
        return loss, parts.mean() | means

    def _masks(self, z_mask: Tensor) -> Tensor | MaskKVCache:
        """Mask latents, or what one pass over each face's mask leaves for its K samples."""
        k = self.config.trainer.noise_repeats
        if k == 1:
            return z_mask
        return precompute_mask_kv(self.model, z_mask[::k])[torch.arange(len(z_mask)) // k]

    def _weights(self, indices: range) -> Tensor | None:
        """Eq. 10 for all samples of the step, of all ranks, so that `normalize` sees them all."""
        if not self.config.loss.long_tail:
            return None
        label_maps = self.cache.label_maps(self.stream.ids(indices)).to(self.device)
        side = self.cache.latent_shape[-1]
        return latent_weights(label_maps, self.counts, side, self.config.loss)

    # ------------------------------------------------------------------- files and messages

    def _checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest valid checkpoint of this run_dir; ConfigError if it is of another training."""
        found = newest_checkpoint(self.run_dir / "checkpoints")
        if found is not None:
            compare_identities(found[1]["identity"], self._identity(), self.run_dir)
        return found

    def _identity(self) -> dict[str, Any]:
        return training_identity(self.config) | {"variant": self.variant}

    def _save(self) -> None:
        if self.is_main:
            about = {"samples": self.samples, "identity": self._identity()}
            if self.accelerator.scaler is not None:  # fp16
                about["scaler"] = self.accelerator.scaler.state_dict()
            save_checkpoint(
                self.run_dir / "checkpoints",
                self.step,
                training_tensors(self._named_parameters(), self.optimizer),
                about,
                self.config.trainer.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def _restore(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        restore_training(self._named_parameters(), self.optimizer, tensors)
        if "scaler" in about and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(about["scaler"])
        self.step, self.samples = about["step"], about["samples"]

    def _named_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.transformer.named_parameters() if p.requires_grad}

    def _begin_files(self) -> None:
        """config.yaml, metrics.jsonl cut back to the step resumed from, and a first message."""
        if not self.is_main:
            return
        self.config.save(self.run_dir / "config.yaml")
        cut_metrics(self.run_dir, self.step)
        learnt = sum(p.numel() for p in self.parameters)
        whole = sum(p.numel() for p in self.transformer.parameters())
        share, resuming = 100 * learnt / (whole - learnt), f", after step {self.step}"
        print(
            f"{self.variant}: {learnt:,} LoRA parameters ({share:.3f} % of the backbone's), "
            f"{self.accelerator.num_processes} x {self.device.type}, {self.step_samples} samples "
            f"a step, attention by {self._kernels()}, latents in {self.cache.folder}"
            f"{resuming if self.step else ''}",
            flush=True,
        )

    def _kernels(self) -> str:
        """Names of the attention kernels of batches with every mask and with dropped ones."""
        _, h, w = self.cache.latent_shape
        tokens, c = self.config.backbone.text_length + 2 * (h // 2) * (w // 2), self.config.trainer
        of = self.transformer, tokens, c.mixed_precision, self.device
        kernels = [attention_kernel(*of, masked) for masked in (False, True)]
        return " or, where a mask is dropped, ".join(dict.fromkeys(kernels))

    def _log(self) -> None:
        """Write the steps since the last call, and a line with their mean."""
        means = self.accelerator.reduce(torch.stack([m for _, m in self._rows]), "mean").tolist()
        rows = [
            about | dict(zip(METRICS, values, strict=True))
            for (about, _), values in zip(self._rows, means, strict=True)
        ]
        self._rows = []
        if self.is_main:
            add_metrics(self.run_dir, rows)
            self._print_progress(rows)
        bad = [r["step"] for r in rows if not math.isfinite(r["total"] + r["grad_norm"])]
        if bad and self.config.trainer.mixed_precision != "fp16":  # whose scaler skips such steps
            raise FloatingPointError(
                f"loss or gradient of step {bad[0]} is not finite; the newest checkpoint is from "
                "before. Lower trainer.learning_rate, or set loss.clip"
            )

    def _print_progress(self, rows: Sequence[dict[str, float]]) -> None:
        """One plain line with the mean of these rows, above the progress bar if there is one."""
        from tqdm.auto import tqdm

        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[-1]}
        last = rows[-1]
        steps = self.config.trainer.steps
        tqdm.write(
            f"step {last['step']}/{steps}  loss {mean['total']:.4f}  flow {mean['flow']:.4f}  "
            f"text {mean['text']:.4f}  mask {mean['mask']:.4f}  gradient {mean['grad_norm']:.3f}  "
            f"lr {last['lr']:.1e}  {mean['seconds']:.3f} s/step  "
            f"{mean['samples_per_second']:.1f} samples/s  "
            f"{(steps - last['step']) * mean['seconds'] / 60:.1f} min left"
        )
        sys.stdout.flush()

    def _write_adapter(self, folder: Path) -> None:
        from .runs import provenance

        config = self.config
        save_mask_lora(self.transformer, folder, config.lora, config.backbone.text_length)
        about = provenance(
            config,
            seconds=sum(row["seconds"] for row in read_metrics(self.run_dir)),
            inputs=[config.backbone.path],
            variant=self.variant,
            steps=self.step,
            samples=self.samples,
            processes=self.accelerator.num_processes,
            data=self.cache.folder.name,
        )
        (folder / "provenance.json").write_text(json.dumps(about, indent=2) + "\n")


def learning_rate(config: TrainerConfig, step: int) -> float:
    """Rate of step 0, 1, ...: a linear warm-up, then constant or half a cosine down to 0."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        rest = (step - config.warmup) / max(1, config.steps - config.warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * max(0.0, rest)))
    return rate
