"""Configuration: frozen dataclasses whose defaults are paper scale, and YAML profiles.

A profile (`ec2face_core/profiles/*.yaml`) holds only what differs from the defaults. Each field has
a type with bounds, checked by pydantic whenever a configuration is built, so an impossible value
never reaches a training. Paths inside a configuration are relative to `ROOT`, paths on a command
line to the working directory: see `io/paths.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from .guards.bounds import (
    Count,
    CountOrZero,
    Flag,
    FolderName,
    Fraction,
    Name,
    NotNegative,
    Positive,
    Real,
    Seed,
    Size,
    Text,
)
from .guards.errors import ConfigError, NotInProfileError, UserError  # noqa: F401
from .io.paths import resolve
from .io.settings import describe, flat, hint, read_environment, read_mapping

PROFILES = Path(__file__).resolve().parent / "profiles"
SETTINGS = "EC2FACE_SETTINGS"  # environment variable: JSON of settings that profiles are read with

# ------------------------------------------------------------------------------------- the schema


# Fields that were added or renamed later keep old digests valid: a field with ADDED does not count
# while it has its default, and `{"digest": name}` counts under its former name.
ADDED = {"added": True}
Weighting = Literal["inverse", "sqrt", "effective", "focal"]


@dataclass(frozen=True)
class DataConfig:
    """Where the faces are. Layout: `image/ mask/ text/ manifest.csv`, see `data.py`."""

    root: Name = "data/raw/mm-celeba-hq"  # MM-CelebA-HQ in the merged layout
    zero_shot_root: Name = "data/raw/mm-ffhq"  # FFHQ-Text with parsed masks
    size: Annotated[Size, Field(ge=16)] = 512  # pixels
    procedural: Flag = False  # make missing roots from procedural faces (smoke, mini)
    maker: Name = field(  # the function that makes them, `module:name`
        default="ec2face_lab.world.sources:write_dataset", metadata=ADDED
    )
    cache: Text = field(default="", metadata=ADDED)  # folder of the latents; empty: beside root
    texts: Literal["disk", "memory"] = field(default="disk", metadata=ADDED)  # embedded captions
    seed: Seed = 42  # of the procedural faces
    train: Count = 27000  # faces of the training split (ids 0-26999)
    test: Count = 3000  # faces of the test split (ids 27000-29999)
    zero_shot: Count = 760  # faces of the zero-shot set
    validation: CountOrZero = 0  # procedural faces for choosing settings, beside root
    rare: CountOrZero = field(default=0, metadata=ADDED)  # procedural faces rich in rare classes


@dataclass(frozen=True)
class BackboneConfig:
    """The FluxPipeline folder or hub id, and how its parts are used."""

    path: Name = "black-forest-labs/FLUX.1-dev"
    revision: Text = field(default="", metadata=ADDED)  # commit, branch or tag of the hub id
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the frozen weights
    text_length: Size = 77  # T5 tokens; padded, so part of every cache key
    guidance: NotNegative = 1.0  # value of the guidance embedding in training
    pixel_decoder: Text = ""  # AutoencoderTiny (TAEF1) for the pixel losses; empty: the VAE's own


@dataclass(frozen=True)
class LoraConfig:
    """LoRA on the mask branch (Sec. 3.5): < 0.1 % new parameters at rank 4 without AdaLN."""

    rank: Size = 4
    alpha: Positive = 4.0
    tokens: Literal["mask", "all"] = "mask"  # with the LoRA; all: profile paper-all-tokens
    attention: Literal["joint", "decoupled"] = "joint"  # Eq. 4 | mask tokens see mask tokens only
    mask_position: Literal["offset", "aligned"] = "offset"  # first position id of mask tokens: 1|0


@dataclass(frozen=True)
class PerceptionConfig:
    """Two pairs of frozen perception models: the guides of training, and the evaluators."""

    parser: Name = "data/raw/weights/face_parsing.farl.celebm.main_ema_181500_jit.pt"
    clip: Name = "hf-hub:timm/vit_large_patch14_clip_224.openai"
    scoring_parser: Name = "data/raw/weights/scoring_parser_jit.pt"
    scoring_clip: Name = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    parser_size: Annotated[Size, Field(ge=16)] = 448  # pixels the parser reads
    scoring_facts: Text = field(  # tells the facts that captions mention; empty: not measured
        default="", metadata=ADDED
    )


@dataclass(frozen=True)
class LossConfig:
    """Weights and options of the losses (Eqs. 7-12)."""

    alpha_text: NotNegative = 0.5  # alpha_1
    alpha_mask: NotNegative = 0.5  # alpha_2
    balance: Fraction = 0.5  # lambda of Eq. 7
    smoothing: Positive = 1e-6  # delta of Eq. 7
    steepness: NotNegative = 10.0  # gamma_s of Eq. 8
    center: Real = 0.4  # t_c of Eq. 8
    long_tail: Flag = True  # Eq. 11 instead of Eq. 3
    scope: Literal["dataset", "sample"] = "dataset"  # T of Eq. 10: training set | one face
    reduction: Literal["max", "mean", "nearest"] = "max"  # weights to latent resolution
    # the mean squared weight is 1 over the latent cells of the training set | of a step
    normalize: Literal["constant", "mean", "none"] = "constant"
    clip: NotNegative = 0.0  # upper bound of the weights after Eq. 10; 0: none
    # Eq. 10 | its root | Eq. 10 for rare classes, 1 for frequent ones (Cui et al. 2019) | by error
    weighting: Weighting = field(default="inverse", metadata=ADDED)
    floor: NotNegative = field(default=0.0, metadata=ADDED)  # lower bound of the weights; 0: none
    # where the consistency losses look: at noised data (the paper) | on the model's own path
    states: Literal["data", "own"] = field(default="data", metadata=ADDED)
    own_steps: Size = field(default=6, metadata=ADDED)  # of the path, without gradient
    own_below: Fraction = field(default=0.7, metadata=ADDED)  # its times are uniform in [0, this]
    begins: Fraction = field(default=0.0, metadata=ADDED)  # share of the steps before these losses
    importance_sampling: NotNegative = field(  # pixel losses on a sample of faces; 0: on all
        default=0.0, metadata={"digest": "gate"}
    )

    @model_validator(mode="after")
    def _usable_clip(self) -> LossConfig:
        if 0 < self.clip < 1e-6:
            raise ValueError(f"clip {self.clip:g} is too small: 1e-6 or more, or 0 for none")
        if 0 < self.clip < self.floor:
            raise ValueError(f"floor {self.floor:g} is above clip {self.clip:g}")
        return self

    @model_validator(mode="after")
    def _samples_that_are_decoded(self) -> LossConfig:
        if self.states == "own" and self.importance_sampling:
            raise ValueError("importance_sampling knows the times of states data alone, not own")
        return self

    @model_validator(mode="after")
    def _constant_of_the_training_set(self) -> LossConfig:
        if self.normalize == "constant" and self.scope == "sample":
            raise ValueError(
                "normalize constant is taken from the counts of the training set; with scope "
                "sample give normalize mean or none"
            )
        return self


@dataclass(frozen=True)
class TrainerConfig:
    """Sec. 4.1: AdamW, 1e-4, 5,000 iterations, 8 GPUs x 4 samples."""

    steps: Count = 5000
    batch_size: Size = 4  # samples per process and micro-step
    accumulation: Size = 1
    learning_rate: Positive = 1e-4
    weight_decay: NotNegative = 0.01
    warmup: CountOrZero = 0  # steps of linear warm-up
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: towards 0
    max_grad_norm: NotNegative = 1.0  # 0: no clipping
    drop_probability: Fraction = 0.1  # p of Eq. 13, text and mask independently
    # no token attends to a dropped mask (unread), or it is a picture without any class (black)
    null_mask: Literal["unread", "black"] = field(default="unread", metadata=ADDED)
    low_discrepancy_t: Flag = field(  # t of neighbouring samples covers [0, 1] evenly
        default=False, metadata={"digest": "even_times"}
    )
    noise_repeats: Size = field(  # neighbouring samples that share a face and its mask's pass
        default=1, metadata={"digest": "draws_per_mask"}
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: Flag = False
    recompute_every: Count = 1  # with gradient_checkpointing: recompute each n-th block only
    compile: Flag = False  # torch.compile of the transformer's blocks
    shard: Flag = False  # FSDP2 over the frozen weights, for GPUs that cannot hold them
    num_processes: Size = 8
    checkpoint_every: Count = 250
    keep_checkpoints: Count = 2
    log_every: Count = 10
    # share of samples that show a face with a rare class, besides those that do so by chance
    rare_faces: Fraction = field(default=0.0, metadata=ADDED)
    ema: Fraction = field(default=0.0, metadata=ADDED)  # decay of the LoRA's average; 0: none
    tracker: Literal["none", "tensorboard", "wandb"] = field(default="none", metadata=ADDED)
    validate_every: CountOrZero = field(default=0, metadata=ADDED)  # steps; 0: draw no faces
    validation_faces: Size = field(default=8, metadata=ADDED)

    @model_validator(mode="after")
    def _combination(self) -> TrainerConfig:
        if self.batch_size % self.noise_repeats:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of noise_repeats "
                f"{self.noise_repeats}"
            )
        if self.null_mask == "black" and self.noise_repeats > 1:
            raise ValueError("null_mask black needs noise_repeats 1: repeats share a face's mask")
        if self.shard and self.num_processes == 1:
            raise ValueError(
                "shard divides the base among several processes: raise num_processes, or turn "
                "shard off"
            )
        return self


@dataclass(frozen=True)
class SamplingConfig:
    """Sec. 4.1: FlowMatchEulerDiscreteScheduler, 28 steps, seed 42."""

    steps: Count = 28
    guidance: NotNegative = 3.5  # guidance embedding of FLUX.1-dev
    text_guidance: NotNegative = 1.0  # CFG scale of the text, for an undistilled base; 1: off
    mask_guidance: NotNegative = 1.0  # CFG scale of the mask
    # not the paper's: how far the parser of training leads the estimate at each step; 0: not
    consistency: NotNegative = field(default=0.0, metadata=ADDED)
    consistency_below: Fraction = field(default=0.6, metadata=ADDED)  # at times up to this
    seed: Seed = 42
    batch_size: Size = 4
    mixed_precision: Literal["no", "bf16"] = "no"  # autocast around frozen float32 weights
    num_processes: Size = 8  # that generate the pictures of a split


@dataclass(frozen=True)
class EvaluationConfig:
    """What is scored, and how its intervals are computed."""

    limit: CountOrZero = 0  # test faces to score; 0: all
    bootstrap: Count = 1000  # resamples of each 95 % interval
    lpips: Literal["alex", "alex-random"] = "alex"  # trunk; random where trained weights are absent
    niqe_block: Annotated[int, Field(strict=True, ge=2)] = 96  # pixels of a NIQE block
    niqe_refit: Flag = False  # fit NIQE's pristine model on the training faces

    @model_validator(mode="after")
    def _published_niqe(self) -> EvaluationConfig:
        if self.niqe_block != 96 and not self.niqe_refit:
            raise ValueError(
                f"niqe_block {self.niqe_block} needs niqe_refit, since the published model is for "
                "blocks of 96 px"
            )
        return self


@dataclass(frozen=True)
class BaselinesConfig:
    """Training of the comparison systems' miniatures; seconds are of one core."""

    pool: Count = 16_384  # faces that foundations see: as many as `make foundation` takes
    foundation_seconds: Positive = 1800.0  # for the base model that a system builds on
    seconds: Positive = 900.0  # for its task: EC²Face's training took 890
    published_masks: Flag = False  # masks as the authors feed them, not one-hot maps of 19 classes


@dataclass(frozen=True)
class Config:
    """One experiment. `profile` names its folder in `runs/`."""

    profile: FolderName = "paper"
    seed: Seed = 42
    adapters: Name = "runs/paper/adapters"  # kept LoRA adapters, one folder per variant
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)

    @model_validator(mode="after")
    def _repeats_need_decoupling(self) -> Config:
        if self.trainer.noise_repeats > 1 and self.lora.attention != "decoupled":
            raise ValueError(
                f"trainer.noise_repeats {self.trainer.noise_repeats} needs lora.attention "
                "decoupled: in joint attention mask tokens depend on time, noise and text"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """`runs/<profile>`: everything this profile makes."""
        return resolve(Path("runs") / self.profile)

    @property
    def figure_dir(self) -> Path:
        """`runs/<profile>/figures`: the figures and tables that a run writes."""
        return self.run_dir / "figures"

    @property
    def published_dir(self) -> Path:
        """`figures/<profile>`: the figures and tables that are published."""
        return resolve(Path("figures") / self.profile)

    def digest(self) -> str:
        """Twelve hex digits that name this configuration in provenance files and stamps."""
        text = json.dumps(digest_values(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def replace(self, /, **overrides: Any) -> Config:
        """A copy with overrides, nested (`trainer={"steps": 5}`) or dotted (`"trainer.steps"`)."""
        return load_config(dataclasses.asdict(self), **overrides)

    def save(self, path: Path) -> None:
        """Write every resolved value as YAML; OSError names the file."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))
        except OSError as error:
            raise OSError(f"cannot write {path}: {error}") from error


DEFAULTS = dataclasses.asdict(Config())  # to be read, not to be changed


def digest_values(config: Any) -> dict[str, Any]:
    """The settings of a configuration as nested mappings, under the names used for the digest."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("added") and value == f.default:
            continue
        nested = dataclasses.is_dataclass(value)
        values[f.metadata.get("digest", f.name)] = digest_values(value) if nested else value
    return values


# The rows of Tables 3 and 4: what each adapter is trained with.
VARIANTS: dict[str, dict[str, Any]] = {
    "without_ltal": {"loss": {"long_tail": False, "alpha_text": 0.0, "alpha_mask": 0.0}},
    "none": {"loss": {"alpha_text": 0.0, "alpha_mask": 0.0}},  # = with_ltal of Table 3
    "mask": {"loss": {"alpha_text": 0.0}},
    "text": {"loss": {"alpha_mask": 0.0}},
    "both": {},  # full EC2Face
}


# ---------------------------------------------------------------------------------------- loading


def profiles() -> list[str]:
    """Names of all profiles."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str, **overrides: Any) -> Config:
    """Read `profiles/<name>.yaml` over the defaults, then the overrides.

    A profile may name another one as its `base` and then holds only what differs from that.
    Overrides are nested mappings, `trainer={"steps": 5}`, or dotted keys, `**{"trainer.steps": 5}`.
    The settings of `reproduce --set` reach its notebooks through the environment (`SETTINGS`).

    Raises:
        ConfigError: an unknown profile or option (with the nearest match), or a value of the wrong
            type or out of bounds.
    """
    config = shipped_profile(name)
    if given := read_environment(SETTINGS):
        try:
            config = config.replace(**given)
        except ConfigError as error:
            raise ConfigError(f"{error} (a setting of `reproduce --set` or {SETTINGS})") from error
    return config.replace(**overrides) if overrides else config


def shipped_profile(name: str) -> Config:
    """A profile as it was shipped: its file over the defaults.

    Raises:
        ConfigError: as `load_profile`.
    """
    known = profiles()
    if name not in known:
        raise ConfigError(f"profile {name!r} does not exist{hint(name, known)}; known: {known}")
    base, settings = _read_file(PROFILES / f"{name}.yaml")
    return (base or Config()).replace(**(settings | {"profile": str(name)}))


def load_config(values: Path | dict[str, Any], /, **overrides: Any) -> Config:
    """A Config from a mapping or from a YAML file.

    A file has all settings, as `Config.save` writes them, or names a profile as its `base` and then
    holds only what differs from that. A file of `profiles/` is that profile.

    Raises:
        ConfigError: as `load_profile`; or the file is not YAML, or has the name of a profile but
            not its settings.
    """
    if isinstance(values, Path):
        if values.resolve().parent == PROFILES:
            return shipped_profile(values.stem).replace(**overrides)
        base, settings = _read_file(values)
        if base is None:
            _check_profile(settings, values)
        start = base or Config()
        try:
            return _build(start, settings, overrides)
        except ConfigError as error:  # that of the overrides is not the file's
            where = "" if overrides and _loads(start, settings) else f"{values}: "
            raise ConfigError(f"{where}{error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"expected a Path or a mapping of settings, got {reprlib.repr(values)}")
    return _build(Config(), values, overrides)


def named(values: dict[str, Any]) -> dict[str, Any]:
    """Nested or dotted settings as dotted ones, `trainer.steps`; ConfigError if one is unknown."""
    return flat(values, DEFAULTS)


def _build(start: Config, *layers: dict[str, Any]) -> Config:
    """A Config with settings laid over it."""
    merged = dataclasses.asdict(start)
    for layer in layers:
        for name, value in named(layer).items():
            group, _, key = name.rpartition(".")
            (merged[group] if group else merged)[key] = value
    try:
        return Config(**merged)
    except ValidationError as error:
        raise ConfigError("; ".join(map(describe, error.errors()))) from error


def _loads(start: Config, settings: dict[str, Any]) -> bool:
    try:
        _build(start, settings)
    except ConfigError:
        return False
    return True


def _read_file(path: Path) -> tuple[Config | None, dict[str, Any]]:
    """The profile that a file names as its base, if it does, and the settings of the file."""
    values = read_mapping(path)
    base = values.pop("base", None)
    try:
        return None if base is None else shipped_profile(base), named(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_profile(settings: dict[str, Any], path: Path) -> None:
    """Refuse a file of no profile, or of one whose settings it neither has nor is based on."""
    name = settings.get("profile")
    if name is None:
        raise ConfigError(
            f"{path}: has neither a `profile`, which names its folder in runs/, nor a `base`: "
            "write `base: mini`, for example, to begin with the settings of that profile"
        )
    if name not in profiles():
        return
    shipped = named(dataclasses.asdict(shipped_profile(name)))
    defaults = named(DEFAULTS)
    lacking = [key for key in shipped if key not in settings and shipped[key] != defaults[key]]
    if lacking:
        raise ConfigError(
            f"{path}: has the name of profile {name}, but no {lacking[0]}, which is "
            f"{shipped[lacking[0]]!r} there: write `base: {name}` instead of `profile: {name}` to "
            "begin with the settings of that profile, or give it a name of its own"
        )


# ------------------------------------------------------------------------------------------ paths


def adapter_name(config: Config, variant: str) -> str:
    """Folder name of a variant's training: `both`, and `both-seed43` for a seed other than 42."""
    if variant not in list(VARIANTS):
        raise ConfigError(f"variant {variant!r} does not exist{hint(variant, VARIANTS)}")
    return variant if config.seed == Config.seed else f"{variant}-seed{config.seed}"


def adapter_dir(config: Config, variant: str) -> Path:
    """Folder of a variant's LoRA: this profile's retrained one, otherwise that of `adapters`."""
    trained = trained_dir(config, variant)
    there = any(trained.glob("*.safetensors"))
    return trained if there else resolve(config.adapters) / trained.name


def trained_dir(config: Config, variant: str) -> Path:
    """Where a training of a variant puts its LoRA at the end."""
    return config.run_dir / "adapters" / adapter_name(config, variant)


def trained_seeds(config: Config) -> int:
    """For how many seeds, from `config.seed` on, there is an adapter of every variant."""
    k = 0
    while all(adapter_dir(config.replace(seed=config.seed + k), v).is_dir() for v in VARIANTS):
        k += 1
    return k
