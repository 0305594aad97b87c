"""The file of a mask LoRA, and what lies beside it.

    pytorch_lora_weights.safetensors   diffusers' format; the metadata record how it was trained
    adapter_config.json                peft's description of the layers
    README.md                          a model card
    SHA256SUMS                         the hash that is compared when the file is opened

`load_mask_lora` restores what the file records. The loaders of stock pipelines read the file too,
but would apply the LoRA to all tokens silently; `mask_branch.install_mask_branch` prevents that.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import override
from ..config import (
    VARIANTS,
    Config,
    ConfigError,
    LoraConfig,
    adapter_dir,
    named,
    profiles,
    shipped_profile,
)
from ..guards.checks import check_number
from ..mask_branch import ADAPTER, install_mask_branch, keep_loras_active, lora_targets
from ..runs import whole_file, write_tensors
from .sums import check_sums, list_sums

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_FOLDER = "mask_lora"  # inside a saved pipeline: a component of it
WEIGHTS = "weights"  # inside that folder; diffusers knows no weights of another name beside it
CARD = "README.md"
FLUX = "black-forest-labs/FLUX.1-dev"


@dataclass(frozen=True)
class LoraRecord:
    """What the file of a mask LoRA says about its training.

    size and settings are None, and base is "", where an older file does not say.
    """

    lora: LoraConfig
    text_length: int  # T5 tokens
    size: int | None = None  # side of the pictures in pixels
    base: str = ""  # hub id or folder name of the backbone
    settings: dict[str, Any] | None = None  # of loss and trainer, see `training_settings`


def save_mask_lora(
    transformer: FluxTransformer2DModel,
    folder: Path | str,
    config: LoraConfig,
    text_length: int,
    size: int | None = None,
    base: str = "",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write the transformer's mask LoRA with everything that `LoraRecord` holds.

    Args:
        transformer: FluxTransformer2DModel with the adapter `mask`.
        folder: where the files are written.
        config: what it was trained with.
        text_length: T5 tokens in training.
        size: side of the training pictures in pixels.
        base: the backbone.
        settings: of the training, JSON-ready.
    """
    from diffusers import FluxPipeline
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    peft_config = transformer.peft_config[ADAPTER]
    layers = {
        f"transformer.{k}": sorted(v) if isinstance(v, set) else v
        for k, v in peft_config.to_dict().items()
    }
    record = LoraRecord(config, text_length, size, base, dict(settings) if settings else None)
    metadata = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(layers),
        "ec2face": json.dumps(dataclasses.asdict(record)),
    }
    parameters = dict(transformer.named_parameters())
    FluxPipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers=get_peft_model_state_dict(transformer, parameters, ADAPTER),
        save_function=lambda weights, path: write_tensors(Path(path), weights, metadata),
    )
    peft_config.save_pretrained(str(folder))
    write_card(folder, record)
    list_sums(folder / LORA_FILE)


def read_mask_lora(path: Path | str) -> LoraRecord:
    """What the LoRA of a folder, or of a file, was trained with.

    Raises:
        FileNotFoundError: there is no LoRA.
        DamagedError: the file is not the one that was kept (`io/sums.py`).
        ValueError: the file is damaged, or no mask LoRA.
    """
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no mask LoRA at {file}: train it with `python -m ec2face_core.train`, or give the "
            "folder of another one"
        )
    check_sums(file)
    text = _metadata(file).get("ec2face")
    if text is None:
        raise ValueError(f"{file} is not a mask LoRA of this project: it has no `ec2face` metadata")
    try:
        values = json.loads(text)
        if "lora" not in values:  # files of former versions hold LoraConfig and text_length alone
            values = {"text_length": values.pop("text_length"), "lora": values}
        record = LoraRecord(**(values | {"lora": LoraConfig(**values["lora"])}))
        check_number(record.text_length, "text_length", 0, whole=True)  # 0: not known
        if record.size is not None:
            check_number(record.size, "size", 1, whole=True)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"the `ec2face` metadata of {file} cannot be read ({_in_one_line(error)}): copy the "
            "file again, or update this package if a newer version wrote it"
        ) from error
    return record


def is_mask_lora(path: Path) -> bool:
    """Whether a folder or a file is a mask LoRA's, by the metadata of its file."""
    file = _file(path)
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    try:
        return "ec2face" in _metadata(file)
    except ValueError:
        return False  # whoever opens it names the damage


def load_mask_lora(transformer: FluxTransformer2DModel, path: Path | str) -> LoraConfig:
    """Load a LoRA into the mask branch, replacing the one that is there; others stay active.

    Args:
        transformer: FluxTransformer2DModel; unchanged where the LoRA is refused.
        path: the LoRA's folder, or its file.

    Returns:
        The LoraConfig that it was trained with.

    Raises:
        FileNotFoundError, ValueError: as for `read_mask_lora`.
        ValueError: the file's layers are not those of its record and of this transformer.
    """
    file = _file(path)
    record = read_mask_lora(file)
    _check_layers(file, record.lora, transformer)
    if ADAPTER in getattr(transformer, "peft_config", {}):
        transformer.delete_adapters(ADAPTER)
    with keep_loras_active(transformer):
        transformer.load_lora_adapter(
            str(file.parent), prefix="transformer", weight_name=file.name, adapter_name=ADAPTER
        )
    branch = install_mask_branch(transformer, record.lora)
    branch.record = record
    return record.lora


def _file(path: Path | str) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / LORA_FILE


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            return weights.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or incomplete ({error}): copy or train it again"
        ) from error


def _in_one_line(error: Exception) -> str:
    lines = f"{type(error).__name__}: {error}".splitlines()
    return " ".join(lines[:3])


def _check_layers(file: Path, config: LoraConfig, transformer: FluxTransformer2DModel) -> None:
    """Refuse tensors that are not those of the record and of the transformer, and finite."""
    from safetensors.torch import load_file

    peft = _peft_settings(file)
    recorded = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": False,
        "use_dora": False,
    }
    other = [f"{k} {peft[k]}, not {v}" for k, v in recorded.items() if peft.get(k, v) != v]
    if other or peft.get("rank_pattern") or peft.get("alpha_pattern"):
        raise ValueError(
            f"the two records of {file} contradict each other "
            f"({', '.join(other) or 'ranks or scales of single layers'}): copy it again"
        )
    tensors = load_file(file)
    targets = re.compile(lora_targets(transformer, config))
    shapes = {
        f"transformer.{layer}.{name}.weight": shape
        for layer, module in transformer.named_modules()
        if targets.fullmatch(layer)
        for name, shape in (
            ("lora_A", (config.rank, module.in_features)),
            ("lora_B", (module.out_features, config.rank)),
        )
    }
    wrong = {
        "missing": shapes.keys() - tensors.keys(),
        "not of this LoRA": tensors.keys() - shapes.keys(),
        "of another shape": {
            k for k in shapes.keys() & tensors.keys() if tuple(tensors[k].shape) != shapes[k]
        },
        "not finite numbers": {
            k for k, x in tensors.items() if not (x.is_floating_point() and x.isfinite().all())
        },
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(
                f"{file} does not fit this transformer: {len(names)} tensors are {what}, the first "
                f"is {min(names)}; copy the file again, or load the base that it was trained on"
            )


def _peft_settings(file: Path) -> dict[str, Any]:
    """What the file tells peft, by the setting's name; empty if it says nothing."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    text = _metadata(file).get(LORA_ADAPTER_METADATA_KEY, "{}")
    try:
        values = json.loads(text)
        return {k.removeprefix("transformer."): v for k, v in values.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"the `{LORA_ADAPTER_METADATA_KEY}` of {file} cannot be read ({error}): copy it again"
        ) from error


# ------------------------------------------------------------- is it the LoRA that was asked for?

# Settings of the trainer that say how a step is computed, not what it computes.
HOW = {
    "batch_size", "accumulation", "num_processes", "gradient_checkpointing", "recompute_every",
    "compile", "shard", "checkpoint_every", "keep_checkpoints", "log_every", "tracker",
    "validate_every", "validation_faces",
}  # fmt: skip


def training_settings(config: Config, variant: str) -> dict[str, Any]:
    """The settings that shape a variant's LoRA, flat: `loss.clip`, `lora.rank`, `trainer.steps`.

    How a step is computed is left out; `trainer.samples` are those of an optimiser step (their
    mean, in the file of a training that was resumed with another batch).
    """
    config = config.replace(**VARIANTS[variant])
    t = config.trainer
    settings: dict[str, Any] = {"trainer.samples": t.batch_size * t.accumulation * t.num_processes}
    for group in ("loss", "lora", "trainer"):
        for key, value in dataclasses.asdict(getattr(config, group)).items():
            if group != "trainer" or key not in HOW:
                settings[f"{group}.{key}"] = value
    return settings


def find_mask_lora(config: Config, variant: str) -> Path:
    """The folder of a variant's LoRA, which was trained as the configuration says.

    What this profile has trained is compared with what its file records. A LoRA that came with the
    profile (`adapters`) was trained with the settings of the profile, or of the one it builds on,
    so nothing else may be asked of it.

    Raises:
        FileNotFoundError: there is no LoRA.
        ConfigError: it was trained with other settings; the message has the command that trains it.
    """
    folder = adapter_dir(config, variant)
    record = read_mask_lora(folder)
    wanted = training_settings(config, variant)
    trained = record.settings
    ours = folder.is_relative_to(config.run_dir)
    if not ours and config.profile in profiles():
        trained = training_settings(shipped_profile(config.profile), variant)
    length = config.backbone.text_length
    if record.text_length != length:
        raise ConfigError(
            f"backbone.text_length is {length}, but {folder} was trained with {record.text_length}:"
            f" set backbone.text_length to {record.text_length}"
        )
    if record.size and record.size != config.data.size:
        raise ConfigError(
            f"data.size is {config.data.size}, but {folder} was trained at {record.size} px: set "
            f"data.size to {record.size}"
        )
    other = {k: trained[k] for k in wanted if trained and k in trained and trained[k] != wanted[k]}
    if other:
        changes = ", ".join(f"{k} {v}, not {wanted[k]}" for k, v in sorted(other.items()))
        keep = f", or remove {folder} to use the one that came with the profile" if ours else ""
        raise ConfigError(
            f"{folder} was trained with {changes}. `{train_command(config, variant)}` trains the "
            f"one that is asked for{keep}"
        )
    return folder


def train_command(config: Config, variant: str) -> str:
    """The shell command that trains a variant with these settings, from the nearest profile."""
    values = named(dataclasses.asdict(config))

    def changes(name: str) -> list[str]:
        shipped = named(dataclasses.asdict(shipped_profile(name)))
        return [override(key, value) for key, value in values.items() if value != shipped[key]]

    names = profiles()
    name = config.profile if config.profile in names else min(names, key=lambda n: len(changes(n)))
    options = "".join(f" --set {shlex.quote(change)}" for change in changes(name))
    return f"python -m ec2face_core.train --profile {name} --variant {variant}{options}"


# -------------------------------------------------------------------------------------- model card


def write_card(folder: Path, record: LoraRecord | None, pipeline: bool = False) -> None:
    """Write a model card for a LoRA's folder, or for a saved pipeline."""
    from huggingface_hub import ModelCardData

    base = record.base if record else ""
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base if "/" in base else None,
        license="other" if base == FLUX else None,
        license_name="flux-1-dev-non-commercial-license" if base == FLUX else None,
        tags=["ec2face", "flux", "face-generation", "semantic-mask"] + ["lora"] * (not pipeline),
    )
    lines = ["---", data.to_yaml(), "---", ""]
    lines += ["# EC²Face" + ("" if pipeline else ": mask LoRA"), ""]
    lines += ["Faces from a semantic mask of 19 classes and a sentence."]
    lines += ["", "```python", "from ec2face_core import EC2FacePipeline", ""]
    if pipeline:
        lines += ['pipe = EC2FacePipeline.from_pretrained("PATH_OR_HUB_ID")']
    else:
        lines += [f'pipe = EC2FacePipeline.from_pretrained("{base or "FLUX_PATH_OR_HUB_ID"}")']
        lines += ['pipe.load_mask_lora("PATH_OR_HUB_ID")']
    lines += ['face = pipe("She wears earrings.", mask="mask.png").images[0]', "```"]
    if record:
        lines += ["", "| trained with | |", "|---|---|", f"| T5 tokens | {record.text_length} |"]
        lines += [f"| pixels | {record.size}x{record.size} |"] if record.size else []
        settings = record.settings or dataclasses.asdict(record.lora)
        lines += [f"| {key} | {value} |" for key, value in sorted(settings.items())]
    lines += ["", "The LoRA acts on the tokens of the mask; `load_lora_weights` of other pipelines"]
    lines += ["would apply it to all. Use it for faces of no real person, or with consent."]
    with whole_file(folder / CARD) as part:
        part.write_text("\n".join(lines) + "\n")


class MaskLora:
    """The mask LoRA of a pipeline as one of its components: what diffusers saves and loads.

    As a component it is part of everything that diffusers does with a pipeline's folder: saving,
    pushing, downloading, and loading by another class.
    """

    def __init__(
        self, transformer: FluxTransformer2DModel | None = None, folder: Path | None = None
    ) -> None:
        self.transformer = transformer
        self.folder = folder

    def load(self, transformer: FluxTransformer2DModel) -> None:
        """Put it on a transformer, unless it is there."""
        if self.folder is not None and self.transformer is not transformer:
            load_mask_lora(transformer, self.folder)
        self.transformer = transformer

    @property
    def record(self) -> LoraRecord:
        """What it was trained with."""
        assert self.transformer is not None
        branch = self.transformer.mask_branch
        return branch.record or LoraRecord(branch.config, 0)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write its folder, and the module by which diffusers finds this class."""
        r = self.record
        assert self.transformer is not None
        place = Path(folder) / WEIGHTS
        save_mask_lora(self.transformer, place, r.lora, r.text_length, r.size, r.base, r.settings)
        code = f"from {MaskLora.__module__} import MaskLora\n"
        (Path(folder) / f"{MaskLora.__module__}.py").write_text(code)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MaskLora:
        """Open what `save_pretrained` wrote; `load` reads the weights."""
        read_mask_lora(Path(folder) / WEIGHTS)
        return cls(folder=Path(folder) / WEIGHTS)
