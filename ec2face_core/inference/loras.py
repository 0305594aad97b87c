"""The LoRAs of a pipeline: the mask's, and others beside it.

Styles, identities and few-step LoRAs act on all tokens, the mask's among them. Loading one never
switches another off; peft and diffusers would leave the newest alone active.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from torch import Tensor

from ..backbone import is_hub_id
from ..io.lora_file import (
    CARD,
    LORA_FILE,
    LORA_FOLDER,
    WEIGHTS,
    MaskLora,
    is_mask_lora,
    load_mask_lora,
    write_card,
)
from ..io.paths import user_path
from ..mask_branch import ADAPTER, keep_loras_active

T = TypeVar("T")

# diffusers loads components of the libraries and classes that it knows
LOADABLE_CLASSES[MaskLora.__module__] = {"MaskLora": ["save_pretrained", "from_pretrained"]}
ALL_IMPORTABLE_CLASSES["MaskLora"] = ["save_pretrained", "from_pretrained"]

MODULE = """# By this file other programs find the pipeline's class:
# DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline", trust_remote_code=True)
from ec2face_core.pipeline import EC2FacePipeline
"""


TRAINED = {"text_length": "text_length", "image_size": "size"}  # pipeline's setting: LoRA's record


def keeps_lora_scales(call: Callable[..., T]) -> Callable[..., T]:
    """Give all LoRAs the scales back that they had before a method of the pipeline.

    `joint_attention_kwargs={"scale": 0}` would leave a scale of 1 behind.
    """

    @functools.wraps(call)
    def kept(self: Any, *args: Any, **kwargs: Any) -> T:
        from peft.tuners.lora import LoraLayer

        parts = (self.transformer, self.text_encoder, self.text_encoder_2)
        layers = [m for part in parts if part is not None for m in part.modules()]
        scales = [(m, dict(m.scaling)) for m in layers if isinstance(m, LoraLayer)]
        try:
            return call(self, *args, **kwargs)
        finally:
            for layer, scaling in scales:
                layer.scaling.update(scaling)

    return kept


class MaskLoraMixin(FluxLoraLoaderMixin):
    """FluxPipeline's loader of LoRAs, for a pipeline with the component `mask_lora`."""

    def load_mask_lora(self, path: str | Path, **hub: Any) -> None:
        """Load a mask LoRA, replacing the one that is there. Other LoRAs stay active.

        Args:
            path: a folder, its file, or a hub id, also of a whole pipeline.
            hub: `revision`, `subfolder`, `token`, ... of `huggingface_hub.hf_hub_download`.
        """
        place = user_path(path)
        if not place.exists() and is_hub_id(str(path)):
            place = _download(str(path), **hub)
        inner = place / LORA_FOLDER / WEIGHTS  # of a whole pipeline
        load_mask_lora(self.transformer, inner if inner.is_dir() else place)
        before = getattr(self, "_without_lora", None)
        if before is None:
            before = {name: self.config[name] for name in TRAINED}
            self._without_lora = before
        self.register_modules(mask_lora=MaskLora(self.transformer))
        for name, recorded in TRAINED.items():
            self.register_to_config(**{name: self._trained(recorded) or before[name]})

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write all parts; the mask LoRA lies in the sub-folder `mask_lora`. Other LoRAs do not."""
        path = Path(save_directory)
        hook = None
        if getattr(self.transformer, "peft_config", None):  # the base is saved as if without LoRAs
            hook = self.transformer.register_state_dict_post_hook(_without_loras)
        path.mkdir(parents=True, exist_ok=True)
        self._describe(path)
        try:
            super().save_pretrained(str(path), **kwargs)
        finally:
            if hook is not None:
                hook.remove()

    def _upload_folder(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Push a folder with our model card, unless the repository has one that somebody wrote."""
        card = Path(working_dir) / CARD
        if not card.is_file() or "automatically generated" in card.read_text():
            self._describe(Path(working_dir))
        return super()._upload_folder(working_dir, *args, **kwargs)

    def _describe(self, folder: Path) -> None:
        """Write the model card, and the module by which DiffusionPipeline finds this class."""
        write_card(folder, self.mask_lora.record if self.mask_lora else None, pipeline=True)
        (folder / "pipeline.py").write_text(MODULE)

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As in FluxPipeline, for styles, identities, few steps: active LoRAs stay active.

        Such a LoRA acts on all tokens, the mask's among them. The folder or file of a mask LoRA is
        given to `load_mask_lora`.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, str | Path) and is_mask_lora(user_path(source)):
            self.load_mask_lora(source)
            return
        with keep_loras_active(self.transformer):
            super().load_lora_weights(source, *args, **kwargs)

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: Any = None) -> None:
        """As in FluxPipeline; a mask LoRA that is not named stays active."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self.mask_lora is not None and ADAPTER not in names:
            given = isinstance(adapter_weights, list)
            weights = adapter_weights if given else [adapter_weights] * len(names)
            names = [*names, ADAPTER]
            adapter_weights = [*weights, 1.0]
        super().set_adapters(names, adapter_weights)

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in FluxPipeline; the mask LoRA stays (`delete_adapters("mask")` removes it)."""
        if self.mask_lora is None:
            super().unload_lora_weights(*args, **kwargs)
        else:
            self.delete_adapters([n for n in self.transformer.peft_config if n != ADAPTER])

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """As in FluxPipeline."""
        super().delete_adapters(adapter_names)
        if ADAPTER not in getattr(self.transformer, "peft_config", {}):
            self.register_modules(mask_lora=None)
            self.register_to_config(**getattr(self, "_without_lora", {}))

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in FluxPipeline; refused with a mask LoRA, which a fused layer would leave out."""
        if self.mask_lora is not None:
            raise RuntimeError(
                "no LoRA can be fused beside the mask LoRA, which acts on mask tokens only: fuse "
                "before load_mask_lora, or use set_adapters"
            )
        super().fuse_lora(*args, **kwargs)

    def _trained(self, name: str) -> Any:
        """What the mask LoRA's file says of its training; None without a LoRA or a word of it."""
        lora = getattr(self, LORA_FOLDER, None)
        return getattr(lora.record, name) or None if lora is not None else None

    def _warn_of_size(self, size: tuple[int, int]) -> None:
        trained = self._trained("size")
        if trained and size != (trained, trained):
            warnings.warn(
                f"the mask LoRA was trained at {trained}x{trained} pixels, and {size[1]}x{size[0]} "
                "are asked for: leave height and width out for its own size",
                UserWarning,
                stacklevel=6,
            )


def _without_loras(_: Any, state: dict[str, Tensor], *__: Any) -> None:
    """Make a state dict with peft's wrappers that of the base model, in place."""
    for name in list(state):
        value = state.pop(name)
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = value


HUB = ("revision", "token", "cache_dir", "local_files_only")  # arguments of a download


def saved_mask_lora(path: str | Path, options: dict[str, Any]) -> MaskLora | None:
    """The mask LoRA of a saved pipeline, a folder or a hub id; None: it has none."""
    from huggingface_hub.errors import EntryNotFoundError

    place = Path(path) / LORA_FOLDER / WEIGHTS / LORA_FILE
    if not Path(path).is_dir() and is_hub_id(str(path)):
        given = {name: options[name] for name in HUB if name in options}
        try:
            place = _download(str(path), f"{LORA_FOLDER}/{WEIGHTS}", **given)
        except EntryNotFoundError:
            return None
    return MaskLora(folder=place.parent) if place.is_file() else None


def _download(repository: str, subfolder: str | None = None, **hub: Any) -> Path:
    """The file of a mask LoRA on the hub, alone or in a pipeline's repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, LORA_FILE, subfolder=subfolder, **hub))
    except EntryNotFoundError:
        if subfolder:
            raise
        return _download(repository, f"{LORA_FOLDER}/{WEIGHTS}", **hub)
