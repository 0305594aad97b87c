"""Configuration: frozen dataclasses whose defaults are the paper's values, and YAML profiles.

A profile (`ec2face_core/profiles/*.yaml`) holds only what differs from the defaults. Every path in
a configuration is relative to the repository root, found once, here (`ROOT`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROFILES = Path(__file__).resolve().parent / "profiles"


class Refusal(Exception):
    """What was asked for cannot be done; the message names the remedy. Commands exit with 2."""


class ConfigError(Refusal, ValueError):
    """An unknown profile or option, or a value of the wrong type; the message names the remedy."""


@dataclass(frozen=True)
class DataConfig:
    """Where the faces are. Layout: design of `datasets.py` (`image/ mask/ text/ manifest.csv`)."""

    root: str = "data/raw/mm-celeba-hq"  # MM-CelebA-HQ in the merged layout
    zero_shot_root: str = "data/raw/mm-ffhq"  # FFHQ-Text with parsed masks
    size: int = 512  # pixels; images bilinear, label maps nearest
    procedural: bool = False  # make missing roots out of procedural faces (smoke, mini)
    seed: int = 42  # of the procedural faces
    train: int = 27000  # faces of the training split (ids 0-26999)
    test: int = 3000  # faces of the test split (ids 27000-29999)
    zero_shot: int = 760  # faces of the zero-shot set
    validation: int = 0  # procedural faces on which settings are chosen, beside root


@dataclass(frozen=True)
class BackboneConfig:
    """The FluxPipeline folder or hub id, and how its parts are used."""

    path: str = "black-forest-labs/FLUX.1-dev"
    dtype: str = "bfloat16"  # of the frozen weights
    text_length: int = 128  # T5 tokens; padded, so part of every cache key
    guidance: float = 1.0  # value of the guidance embedding in training
    pixel_decoder: str = ""  # AutoencoderTiny (TAEF1) for the pixel losses; empty: the VAE's own


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the mask branch (Sec. 3.5): < 0.1 % new parameters at rank 4 without AdaLN."""

    rank: int = 4
    alpha: float = 4.0
    tokens: str = "mask"  # that feel the LoRA: mask (Sec. 3.5) | all, as an ablation
    attention: str = "joint"  # joint (Eq. 4) | decoupled: mask tokens see mask tokens only
    mask_position: str = "offset"  # first position id of mask tokens: offset = 1 | aligned = 0


@dataclass(frozen=True)
class PerceptionConfig:
    """Two pairs of frozen critics: one guides training, the other scores."""

    parser: str = "data/raw/weights/face_parsing.farl.celebm.main_ema_181500_jit.pt"
    clip: str = "hf-hub:timm/vit_large_patch14_clip_224.openai"
    scoring_parser: str = "data/raw/weights/scoring_parser_jit.pt"
    scoring_clip: str = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    parser_size: int = 448  # pixels the parser wants


@dataclass(frozen=True)
class LossConfig:
    """Eqs. 7-12."""

    alpha_text: float = 0.5  # alpha_1
    alpha_mask: float = 0.5  # alpha_2
    balance: float = 0.5  # lambda of Eq. 7
    smoothing: float = 1e-6  # delta of Eq. 7
    steepness: float = 10.0  # gamma_s of Eq. 8
    center: float = 0.4  # t_c of Eq. 8
    long_tail: bool = True  # Eq. 11 instead of Eq. 3
    scope: str = "dataset"  # T of Eq. 10 counted over the training set | sample
    reduction: str = "max"  # weights to latent resolution: max | mean | nearest
    normalize: str = "mean"  # mean: mean squared weight of a batch is 1 | none
    clip: float = 0.0  # upper bound of the weights after Eq. 10; 0 = none
    gate: float = 0.0  # pixel losses with p = gate beta(t) t / max, weighted by 1/p; 0 = always


@dataclass(frozen=True)
class TrainerConfig:
    """Sec. 4.1: AdamW, 1e-4, 5,000 iterations, 8 GPUs x 4 samples."""

    steps: int = 5000
    batch_size: int = 4  # samples per process and micro-step
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 0  # steps of linear warm-up
    schedule: str = "constant"  # after the warm-up: constant | cosine (to 0 at the last step)
    max_grad_norm: float = 1.0
    drop_probability: float = 0.1  # p of Eq. 13, text and mask independently
    even_times: bool = False  # times of neighbouring samples cover [0, 1] evenly, not by chance
    draws_per_mask: int = 1  # neighbouring samples that share a face and one pass over its mask
    mixed_precision: str = "bf16"  # no | bf16 | fp16
    gradient_checkpointing: bool = False
    recompute_every: int = 1  # with gradient_checkpointing: only each n-th block is recomputed
    compile: bool = False  # torch.compile of the transformer's blocks
    shard: bool = False  # FSDP2 over the frozen weights, for GPUs that cannot hold them
    num_processes: int = 8
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    log_every: int = 10


@dataclass(frozen=True)
class SamplingConfig:
    """Sec. 4.1: FlowMatchEulerDiscreteScheduler, 28 steps, seed 42."""

    steps: int = 28
    guidance: float = 3.5  # guidance embedding of FLUX.1-dev
    text_guidance: float = 1.0  # classifier-free guidance, for a base that is not distilled; 1: off
    mask_guidance: float = 1.0
    seed: int = 42
    batch_size: int = 4
    mixed_precision: str = "no"  # autocast around frozen float32 weights: no | bf16
    num_processes: int = 8  # that draw the pictures of a split


@dataclass(frozen=True)
class EvaluationConfig:
    """What is scored, and with which certainty."""

    limit: int = 0  # test faces to score; 0 = all
    bootstrap: int = 1000  # resamples of each 95 % interval
    lpips: str = "alex"  # trunk; `alex-random` where the trained trunk cannot be had
    niqe_block: int = 96  # pixels of a NIQE block; another than 96 means refitted parameters
    niqe_refit: bool = False  # fit NIQE's pristine model on the training faces


@dataclass(frozen=True)
class BaselinesConfig:
    """Training of the comparison systems' miniatures; seconds are of one core."""

    pool: int = 16_384  # faces that foundations see: as many as `make foundation` takes
    foundation_seconds: float = 1800.0  # for what a system stands on
    seconds: float = 900.0  # for its task: EC²Face's training took 890
    published_masks: bool = False  # masks as the authors feed them, not one-hot maps of 19 classes


@dataclass(frozen=True)
class Config:
    """One experiment. `profile` names its folder in `runs/`."""

    profile: str = "paper"
    seed: int = 42
    adapters: str = "runs/paper/adapters"  # kept LoRA adapters, one folder per variant
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)

    @property
    def run_dir(self) -> Path:
        """`runs/<profile>`: everything this profile makes."""
        return ROOT / "runs" / self.profile

    @property
    def figure_dir(self) -> Path:
        """`figures/<profile>` for mini and paper; inside `run_dir` for every other profile."""
        return (
            (ROOT if self.profile in ("mini", "paper") else self.run_dir)
            / "figures"
            / (self.profile if self.profile in ("mini", "paper") else "")
        )

    def digest(self) -> str:
        """Twelve hex digits that name this configuration in provenance files and stamps."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def replace(self, **overrides: Any) -> Config:
        """A copy with overrides, nested (`trainer={"steps": 5}`) or dotted (`"trainer.steps"`)."""
        values = dataclasses.asdict(self)
        _merge(values, overrides)
        return _build(Config, values)

    def save(self, path: Path) -> None:
        """Write every resolved value as YAML."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


# The rows of Tables 3 and 4: what each adapter is trained with.
VARIANTS: dict[str, dict[str, Any]] = {
    "without_ltal": {"loss": {"long_tail": False, "alpha_text": 0.0, "alpha_mask": 0.0}},
    "none": {"loss": {"alpha_text": 0.0, "alpha_mask": 0.0}},  # = with_ltal of Table 3
    "mask": {"loss": {"alpha_text": 0.0}},
    "text": {"loss": {"alpha_mask": 0.0}},
    "both": {},  # full EC2Face
}


def load_profile(name: str, **overrides: Any) -> Config:
    """Read `profiles/<name>.yaml` over the defaults, then the overrides.

    A profile may name another one as its `base` and then holds only what differs from that.
    Overrides are nested mappings, `trainer={"steps": 5}`, or dotted keys, `**{"trainer.steps": 5}`.
    Raises ConfigError naming an unknown profile, option or wrong type, with the nearest match.
    """
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"profile {name!r} does not exist{_hint(name, known)}; known: {known}")
    values = yaml.safe_load((PROFILES / f"{name}.yaml").read_text()) or {}
    base = values.pop("base", "")
    merged = dataclasses.asdict(load_profile(base) if base else Config())
    _merge(merged, values)
    return load_config({**merged, "profile": name}, **overrides)


def load_config(values: Path | dict[str, Any], **overrides: Any) -> Config:
    """A Config from a mapping or from a YAML file that `Config.save` wrote."""
    if isinstance(values, Path):
        values = yaml.safe_load(values.read_text())
    merged = dataclasses.asdict(Config())
    _merge(merged, values)
    _merge(merged, overrides)
    return _build(Config, merged)


def resolve(path: str | Path) -> Path:
    """A configured path, relative to the repository root unless absolute."""
    return ROOT / path  # an absolute right-hand side wins


def adapter_name(config: Config, variant: str) -> str:
    """Folder name of a variant's training: `both`, and `both-seed43` for another seed than 42."""
    if variant not in VARIANTS:
        raise ConfigError(f"variant {variant!r} does not exist{_hint(variant, VARIANTS)}")
    return variant if config.seed == Config.seed else f"{variant}-seed{config.seed}"


def trained_seeds(config: Config) -> int:
    """For how many seeds, from `config.seed` on, there is an adapter of every variant."""
    k = 0
    while all(adapter_dir(config.replace(seed=config.seed + k), v).is_dir() for v in VARIANTS):
        k += 1
    return k


def adapter_dir(config: Config, variant: str) -> Path:
    """Folder of a variant's LoRA: the retrained one of this profile if it exists, else the kept."""
    name = adapter_name(config, variant)
    retrained = config.run_dir / "adapters" / name
    return retrained if retrained.exists() else resolve(config.adapters) / name


def parse_override(text: str) -> dict[str, Any]:
    """`trainer.steps=5` from a command line -> `{"trainer.steps": 5}`; the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text!r}: expected option=value, for example trainer.steps=10")
    return {key: yaml.safe_load(value)}


def _hint(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _merge(values: dict[str, Any], overrides: dict[str, Any], where: str = "") -> None:
    """Lay nested or dotted overrides over a complete nested mapping, naming what is unknown."""
    for key, value in overrides.items():
        head, _, rest = key.partition(".")
        if head not in values:
            raise ConfigError(f"{where}{head}: unknown option{_hint(head, values)}")
        if rest or isinstance(value, dict):
            if not isinstance(values[head], dict):
                raise ConfigError(f"{where}{head}: is a single value and has no options in it")
            _merge(values[head], {rest: value} if rest else value, f"{where}{head}.")
        elif isinstance(values[head], dict):
            raise ConfigError(f"{where}{head}: expected options, got {value!r}")
        else:
            values[head] = value


def _build(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Frozen dataclass from a complete nested mapping; coerces numbers, refuses other types."""
    kwargs = {}
    for key, hint in typing.get_type_hints(cls).items():
        value = values[key]
        if dataclasses.is_dataclass(hint):
            kwargs[key] = _build(hint, value, f"{where}{key}.")
            continue
        if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML 1.1 reads 1e-4 as a string
        if type(value) is not hint:
            raise ConfigError(f"{where}{key}: expected {hint.__name__}, got {value!r}")
        kwargs[key] = value
    return cls(**kwargs)
