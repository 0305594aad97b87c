"""The run of a training: processes, checkpoints, what it writes, and how it ends.

`Trainer` says what a step is; here is what happens around the steps. `run_dir` holds config.yaml,
metrics.jsonl (one line per step), checkpoints/, validation/ and final/ (the LoRA).
"""

from __future__ import annotations

import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from ..config import VARIANTS, Config, ConfigError, adapter_name, trained_dir
from ..fast.blocks import attention_kernel, avoid_cudnn_attention
from ..fast.precision import accelerated
from ..guards.ranks import agree, locked, make_accelerator
from ..guards.signals import on_signals
from ..io.lora_file import save_mask_lora, training_settings
from ..io.paths import resolve, user_path
from ..latents import LatentCache
from ..runs import (
    VALIDATION_FILE,
    add_metrics,
    cut_metrics,
    path_digest,
    provenance,
    read_metrics,
    remove_leftovers,
    whole_folder,
    write_json,
)
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
from .ema import AveragedLora
from .log import TrainingLog, check_tracker
from .validation import ValidationFaces


class TrainingRun:
    """What is common to every training of a LoRA; `Trainer` is the paper's.

    `setup` has to set the attributes that are declared below, and what `update` needs besides.
    """

    transformer: Any
    model: Any
    optimizer: Any
    parameters: list[torch.nn.Parameter]
    average: AveragedLora
    cache: LatentCache
    content: dict[str, str]

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
        self.accelerator: Any = None
        self.validation: ValidationFaces | None = None
        self._signal = 0
        self._signals: Any = None  # the ranks' group that agrees on stopping

    def setup(self) -> None:
        """Make everything that a step needs."""
        raise NotImplementedError

    def update(self) -> None:
        """One optimiser step over the next samples of the stream."""
        raise NotImplementedError

    @property
    def step_samples(self) -> int:
        """Samples of one optimiser step, over all processes."""
        c = self.config.trainer
        return c.batch_size * c.accumulation * c.num_processes

    @property
    def masks_only(self) -> bool:
        """Whether the LoRA acts through masks alone: a sample whose mask is dropped has no part."""
        return self.config.lora.tokens == "mask" and not self.has_black_masks

    @property
    def has_black_masks(self) -> bool:
        """Whether a dropped mask is a black image, which is attended to."""
        return self.config.trainer.null_mask == "black"

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.accelerator.is_main_process

    def fit(self, stop_on_signals: bool = False) -> Path:
        """Train up to `trainer.steps`, from the newest checkpoint if there is one.

        Args:
            stop_on_signals: SIGTERM and SIGINT call `stop` once the steps have begun.

        Returns:
            The LoRA's folder `run_dir/final`, which `lora_file.load_mask_lora` reads.

        Raises:
            ConfigError: a setting does not fit the launch, or the checkpoint in `run_dir`.
            NotFiniteError: the loss diverged.
        """
        self._start_processes()
        with locked(self.run_dir) if self.is_main else nullcontext():
            return self._fit(stop_on_signals)

    def _fit(self, stop_on_signals: bool) -> Path:
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
        self.log.begin(self.variant)
        with on_signals(lambda sent, _: self.stop(sent)) if stop_on_signals else nullcontext():
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
        with bar:
            while self.steps_done < c.steps:
                self.update()
                bar.update()
                due = self.steps_done % c.checkpoint_every == 0 or self.steps_done == c.steps
                stopping = self._asked_to_stop()
                if due or stopping or self.steps_done % c.log_every == 0:
                    self.log.write()  # before the checkpoint: diverged weights are not kept
                if due or stopping:
                    self._save()
                if stopping and self.steps_done < c.steps:
                    raise SystemExit(128 + stopping)
                self._validate()
        self.log.end()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End after the step under way, with a checkpoint and exit code 128 + the signal."""
        self._signal = number

    def _asked_to_stop(self) -> int:
        """The signal that some rank was sent, or 0; all ranks get the same answer."""
        if self._signals is None:
            return self._signal
        number = torch.tensor(self._signal)
        distributed.all_reduce(number, distributed.ReduceOp.MAX, self._signals)
        return int(number)

    def _validate(self) -> None:
        """Draw the validation faces if it is time for them."""
        every = self.config.trainer.validate_every
        last = self.steps_done == self.config.trainer.steps
        if self.validation is None or (self.steps_done % every and not last):
            return
        path = self.run_dir / "validation" / f"step_{self.steps_done:06d}.png"
        with self.average.in_use():
            scores = self.validation.draw(self.accelerator, path)
        if self.is_main:
            row = {"step": self.steps_done, "samples": self.samples_done, **scores}
            add_metrics(self.run_dir, [row], VALIDATION_FILE)
            shown = "  ".join(f"{name} {value:.1f}" for name, value in scores.items())
            print(f"step {self.steps_done}: {shown}, see {path}", flush=True)
        self.log.track(scores, self.steps_done)

    def _start_processes(self) -> None:
        c = self.config.trainer
        if self.accelerator is None:
            check_tracker(c.tracker)
            avoid_cudnn_attention()
            settings = accelerated(self.config)
            self.accelerator = make_accelerator(settings, self.device_name, self.run_dir)
            self.log = TrainingLog(self.run_dir, self.config, self.accelerator)
            if c.num_processes > 1:
                self._signals = distributed.new_group(backend="gloo")
        self.device = self.accelerator.device

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
            named = self._named_parameters()
            tensors = training_tensors(named, self.optimizer) | self.average.tensors(list(named))
            save_checkpoint(
                self.run_dir / "checkpoints", self.steps_done, tensors, state,
                self.config.trainer.keep_checkpoints, self._write_lora,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        named = self._named_parameters()
        self.average.restore(list(named), tensors)
        restore_training(named, self.optimizer, tensors)
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _begin_files(self) -> None:
        """Write config.yaml, cut metrics.jsonl back to the step resumed from, print a line."""
        if not self.is_main:
            return
        remove_leftovers(self.run_dir)
        self.config.save(self.run_dir / "config.yaml")
        cut_metrics(self.run_dir, self.steps_done)
        if self.validation:
            cut_metrics(self.run_dir, self.steps_done, VALIDATION_FILE)
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
        """Names of the attention kernels, with every mask and, where it occurs, with a key mask."""
        _, h, w = self.cache.latent_shape
        tokens = self.config.backbone.text_length + 2 * (h // 2) * (w // 2)
        precision = self.config.trainer.mixed_precision
        unread = not (self.masks_only or self.has_black_masks)
        kernels = [
            attention_kernel(self.transformer, tokens, precision, self.device, masked)
            for masked in sorted({False, unread})
        ]
        return " or, where a mask is dropped, ".join(dict.fromkeys(kernels))

    def _write_lora(self, folder: Path) -> None:
        config = self.config
        settings = training_settings(config, self.variant)
        if self.samples_done != self.steps_done * self.step_samples:  # resumed with another batch
            settings["trainer.samples"] = self.samples_done / self.steps_done
        with self.average.in_use():
            save_mask_lora(
                self.transformer, folder, config.lora, config.backbone.text_length,
                config.data.size, config.backbone.path, settings,
            )  # fmt: skip
        local = resolve(config.backbone.path).exists()
        record = provenance(
            config,
            seconds=sum(row["seconds"] for row in read_metrics(self.run_dir)),
            inputs=[config.backbone.path] if local else [],
            backbone=self.content.get("backbone.path"),
            variant=self.variant,
            steps=self.steps_done,
            samples=self.samples_done,
            processes=self.accelerator.num_processes,
            data=self.cache.folder.name,
        )
        write_json(folder / "provenance.json", record)
