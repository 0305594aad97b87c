"""EC2FacePipeline: a face from a text, a mask, or both.

    pipe = EC2FacePipeline.from_config(load_profile("mini"))
    face = pipe("She wears earrings.", mask=label_map, generator=torch.Generator().manual_seed(42))
    face.images[0].save("face.png")

Sampling is FluxPipeline's: FlowMatchEulerDiscreteScheduler, timesteps shifted by the sequence
length. Without a mask and with the same noise the picture is FluxPipeline's own. Each picture has
its own noise stream, so it does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from .backbone import (
    decode_latents,
    encode_images,
    encode_text,
    load_backbone,
    pack,
    unpack,
    warn_of_lost_words,
)
from .config import BackboneConfig, Config, ConfigError, SamplingConfig, adapter_dir
from .edit import ImageLike, StepEnd, changed_pixels, keep_outside, read_pictures
from .guards.checks import NotFiniteError, check_floats, check_number, check_texts
from .io.masks import mask_ids, split_masks
from .io.paths import user_path
from .io.sums import check_sums
from .io.texts import clean
from .mask_branch import (
    ADAPTER,
    MaskKVCache,
    guided_velocity,
    is_decoupled,
    load_mask_lora,
    mask_latents_of,
    precompute_mask_kv,
    read_mask_lora,
    save_mask_lora,
)

MaskLike = Tensor | np.ndarray | Image.Image | str | Path

LORA_FOLDER = "mask_lora"  # inside a saved pipeline


@dataclass
class EC2FacePipelineOutput(BaseOutput):
    """`images`: PIL images, or `b h w 3` array / `b 3 h w` tensor in [0, 1], by `output_type`."""

    images: list[Image.Image] | np.ndarray | Tensor


class EC2FacePipeline(DiffusionPipeline):
    """Text and mask to face, on the parts of a FluxPipeline and a mask LoRA.

    Args:
        scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer: the parts
            of a FluxPipeline.
        text_length: T5 tokens of a prompt; a loaded mask LoRA sets the length of its training.
        image_size: default side of the pictures in pixels.
        guidance: default value of the guidance embedding.
        text_guidance, mask_guidance: default classifier-free guidance scales.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        transformer: Any,
        text_length: int | None = None,
        image_size: int | None = None,
        guidance: float = SamplingConfig.guidance,
        text_guidance: float = SamplingConfig.text_guidance,
        mask_guidance: float = SamplingConfig.mask_guidance,
    ) -> None:
        super().__init__()
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
        self.register_to_config(
            text_length=text_length
            or min(BackboneConfig.text_length, tokenizer_2.model_max_length),
            image_size=image_size or vae.config.sample_size,
            guidance=guidance,
            text_guidance=text_guidance,
            mask_guidance=mask_guidance,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor * 2)

    # ------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_config(cls, config: Config, variant: str | None = "both") -> EC2FacePipeline:
        """The pipeline of a profile with the LoRA of a variant; None: the base model alone."""
        adapter = adapter_dir(config, variant) if variant else None
        if adapter:
            _, length = read_mask_lora(adapter)  # before the slow part
            if length != config.backbone.text_length:
                raise ConfigError(
                    f"backbone.text_length is {config.backbone.text_length}, but {adapter} was "
                    f"trained with {length}: set backbone.text_length to {length}"
                )
        pipeline = cls(
            **load_backbone(config.backbone).components(),
            text_length=config.backbone.text_length,
            image_size=config.data.size,
            guidance=config.sampling.guidance,
            text_guidance=config.sampling.text_guidance,
            mask_guidance=config.sampling.mask_guidance,
        )
        if adapter:
            pipeline.load_mask_lora(adapter)
        return pipeline

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> EC2FacePipeline:
        """A folder of `save_pretrained`, or any FluxPipeline folder or hub id (base alone)."""
        kwargs.setdefault("use_safetensors", True)  # a pickle runs code when it is opened
        if Path(path).is_dir():
            check_sums(Path(path))
        pipeline = super().from_pretrained(str(path), **kwargs)
        if (Path(path) / LORA_FOLDER).is_dir():
            pipeline.load_mask_lora(Path(path).absolute() / LORA_FOLDER)
        return pipeline

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """Write all parts, and the mask LoRA into the sub-folder `mask_lora`."""
        folder = Path(path).absolute() / LORA_FOLDER
        has_lora = ADAPTER in getattr(self.transformer, "peft_config", {})
        if has_lora:  # the base must be saved without the LoRA's wrappers
            config = self.transformer.mask_branch.config
            save_mask_lora(self.transformer, folder, config, self.config.text_length)
            self.transformer.unload_lora()
        try:
            super().save_pretrained(str(path), **kwargs)
        finally:
            if has_lora:
                self.load_mask_lora(folder)

    def load_mask_lora(self, folder: str | Path) -> None:
        """Load a mask LoRA from its folder or file, replacing the one that is there."""
        folder = user_path(folder)
        folder = folder.parent if folder.is_file() else folder
        _, text_length = read_mask_lora(folder)
        load_mask_lora(self.transformer, folder)
        self.register_to_config(text_length=text_length)

    # ---------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def __call__(  # noqa: PLR0913, PLR0917
        self,
        prompt: str | Sequence[str] = "",
        mask: MaskLike | Sequence[MaskLike | None] | None = None,
        num_inference_steps: int = SamplingConfig.steps,
        guidance_scale: float | None = None,
        text_guidance: float | None = None,
        mask_guidance: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        latents: Tensor | None = None,
        mask_strength: float = 1.0,
        callback_on_step_end: StepEnd | None = None,
    ) -> EC2FacePipelineOutput:
        """Generate faces. Mask only: leave `prompt` empty. Text only: leave `mask` out.

        Args:
            prompt: one text or one per picture; "" is no text. A warning names words that the text
                encoders do not read.
            mask: one mask or one per picture (None in the list: no mask for that picture). A mask
                is a label map (int tensor or array `h w`; `b h w` is b masks), a PIL image or a
                path: a palette or grey image of label ids, or an RGB image in the palette's
                colours (`io/masks.py`). It has the picture's shape and is resized to its size by
                the nearest pixel.
            num_inference_steps: Euler steps.
            guidance_scale: value of the guidance embedding; default: the model's own.
            text_guidance: classifier-free guidance scale `s_t` of the text (see
                `guided_velocity`); default: the model's own.
            mask_guidance: the scale `s_m` of the mask, likewise. A step costs one pass of the
                transformer for every factor of `guided_velocity` that is not 0: one at 1 and 1,
                two where both are equal or text_guidance is 1, otherwise three.
            generator: one per picture, or one from which the pictures' noise is drawn in turn.
            height: pixels, a multiple of 2 * vae_scale_factor; default: the model's own.
            width: likewise.
            num_images_per_prompt: pictures of each prompt-mask pair; they stay together.
            output_type: "pil"; "np" or "pt": in [0, 1].
            latents: initial noise `b c h/f w/f`, instead of `generator`'s.
            mask_strength: factor >= 0 on each mask token in the softmax of text and noise tokens;
                1 is as trained, 0 is no mask.
            callback_on_step_end: called as `f(pipeline, step, timestep, {"latents": tokens})` after
                each step, tokens `b n 4c`; the latents that it returns replace them.

        Returns:
            The pictures.

        Raises:
            TypeError: an argument of another type.
            ValueError: numbers of prompts, masks, generators or latents that do not fit; a mask
                that cannot be read; an unsupported size or output type; a number out of range or
                not finite.
            NotFiniteError: the pictures are not finite.
        """
        side = self.config.image_size
        size = (side if height is None else height, side if width is None else width)
        self._check(size, num_inference_steps, output_type)
        check_number(num_images_per_prompt, "num_images_per_prompt", 1, whole=True)
        check_number(mask_strength, "mask_strength", 0)
        guidance = self._setting("guidance", guidance_scale)
        text_scale = self._setting("text_guidance", text_guidance)
        mask_scale = self._setting("mask_guidance", mask_guidance)
        device = self._execution_device
        f = self.vae_scale_factor
        prompts = [clean(text) for text in check_texts(prompt)]  # as captions are
        masks = _mask_list(mask)
        pairs = max(len(prompts), len(masks))
        if len(prompts) not in (1, pairs) or len(masks) not in (1, pairs):
            raise ValueError(f"{len(prompts)} prompts and {len(masks)} masks do not pair up")
        b = pairs * num_images_per_prompt

        # text embedded once per prompt, masks encoded once each, then laid out for b pictures
        warn_of_lost_words(self, prompts, self.config.text_length, stacklevel=4)
        text = encode_text(self, prompts, self.config.text_length)
        text = text[torch.arange(b) // num_images_per_prompt % len(prompts)]
        mask_latents: Tensor | MaskKVCache | None = None
        keep_mask: Tensor | None = None
        if any(m is not None for m in masks):
            maps = [torch.zeros(size).long() if m is None else _resize(m, size) for m in masks]
            index = torch.arange(b) // num_images_per_prompt % len(masks)
            z_mask = mask_latents_of(self.vae, torch.stack(maps).to(device))
            if is_decoupled(self.transformer):  # one pass over the masks serves every step
                mask_latents = precompute_mask_kv(self.transformer, z_mask)[index]
            else:
                mask_latents = z_mask[index]
            keep_mask = torch.tensor([m is not None for m in masks])[index]

        shape = (b, self.vae.config.latent_channels, size[0] // f, size[1] // f)
        z = self._noise(shape, generator, device) if latents is None else _noise_given(latents)
        z = z.to(device)
        if z.shape != shape:
            raise ValueError(f"latents have shape {tuple(z.shape)}, expected {shape}")
        tokens = shape[-2] * shape[-1] // 4
        timesteps = flux_timesteps(self.scheduler, num_inference_steps, tokens, device)
        null = text if text_scale == 1 else encode_text(self, [""] * b, self.config.text_length)
        condition = (text, null, mask_latents, keep_mask)
        with self.progress_bar(total=len(timesteps)) as bar:
            for step, time in enumerate(timesteps):
                t = (time / 1000).expand(b)
                v = guided_velocity(
                    self.transformer, z, t, *condition, guidance, text_scale, mask_scale,
                    mask_strength,
                )  # fmt: skip
                z = self.scheduler.step(v, time, z, return_dict=False)[0]  # Eq. 2, one Euler step
                if callback_on_step_end is not None:
                    given = {"latents": pack(z)}
                    changed = callback_on_step_end(self, step, time, given) or given
                    z = unpack(changed["latents"], *shape[-2:])
                bar.update()
        decoded = decode_latents(self.vae, z)
        if not decoded.isfinite().all():  # they would be written as black pictures
            raise NotFiniteError(
                "the pictures are not finite: lower the guidance scales "
                f"({guidance:g}, {text_scale:g}, {mask_scale:g}) or check the weights"
            )
        images = self.image_processor.postprocess(decoded, output_type)
        self.maybe_free_model_hooks()
        return EC2FacePipelineOutput(images=images)

    @torch.no_grad()
    def edit(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        new_mask: MaskLike | Sequence[MaskLike],
        prompt: str | Sequence[str] = "",
        margin: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **sampling: Any,
    ) -> EC2FacePipelineOutput:
        """Change pictures through their masks and keep the rest (`edit.py`).

        Args:
            image: one picture or several of one size: PIL images, paths, or a tensor `b 3 h w` in
                [0, 1].
            mask: what each picture shows, as for `__call__`.
            new_mask: what it is to show.
            prompt: one text, or one per picture.
            margin: pixels around the change that are sampled, too; None: 1/32 of the side.
            generator: one per picture, or one for all.
            sampling: further settings of `__call__`, such as num_inference_steps.

        Returns:
            The pictures, of the size of the given ones.

        Raises:
            TypeError, ValueError: as for `__call__`; or numbers of pictures and masks that differ.
        """
        pixels = read_pictures(image).to(self._execution_device)
        size = (pixels.shape[-2], pixels.shape[-1])
        self._check(size, 1, "pil")
        old, new = (
            torch.stack([_resize(m, size) for m in _given(masks)]) for masks in (mask, new_mask)
        )
        if len(old) != len(pixels) or len(new) != len(pixels):
            counts = f"{len(pixels)} pictures, {len(old)} masks and {len(new)} new masks"
            raise ValueError(f"{counts}: give one of each per picture")
        changed = changed_pixels(old, new, margin).to(pixels.device)
        z = encode_images(self.vae, pixels * 2 - 1)
        noise = self._noise(tuple(z.shape), generator, z.device)
        step_end = keep_outside(z, noise, changed, sampling.pop("callback_on_step_end", None))
        return self(
            prompt, new, height=size[0], width=size[1], latents=noise,
            callback_on_step_end=step_end, **sampling,
        )  # fmt: skip

    def _check(self, size: tuple[int, int], steps: int, output_type: str) -> None:
        multiple = 2 * self.vae_scale_factor
        for name, side in zip(("height", "width"), size, strict=True):
            check_number(side, name, multiple, whole=True)
        if any(side % multiple for side in size):
            raise ValueError(f"height and width {size} must be multiples of {multiple}")
        check_number(steps, "num_inference_steps", 1, whole=True)
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type!r}: use pil, np or pt")

    def _setting(self, name: str, given: float | None) -> float:
        """A scale that was given, or the model's own; finite and not negative."""
        value = self.config[name] if given is None else given
        check_number(value, name, 0)
        return float(value)

    def _noise(self, shape: tuple[int, ...], generator: Any, device: torch.device) -> Tensor:
        """Noise, one picture after another, so that batches do not change it."""
        b = shape[0]
        streams = list(generator) if isinstance(generator, Sequence) else [generator] * b
        if len(streams) != b:
            raise ValueError(f"{len(streams)} generators for {b} pictures: give one or {b}")
        if wrong := [g for g in streams if not isinstance(g, torch.Generator | None)]:
            raise TypeError(f"generator: expected a torch.Generator, got {wrong[0]!r}")
        single = (1, *shape[1:])
        noise = [randn_tensor(single, g, device, torch.float32) for g in streams]
        return torch.cat(noise)


def _noise_given(latents: Tensor) -> Tensor:
    """The caller's noise as float32; refused where it is not finite."""
    check_floats(latents, "latents")
    if not latents.isfinite().all():
        raise ValueError("latents must be finite")
    return latents.float()


def flux_timesteps(scheduler: Any, steps: int, tokens: int, device: torch.device | str) -> Tensor:
    """FluxPipeline's timesteps: linear in t, shifted towards noise for long sequences.

    Args:
        scheduler: it is set to begin with the first of them.
        steps: Euler steps.
        tokens: noise tokens of a picture.
        device: where they are needed.

    Returns:
        1000 t, `(steps,)` in (0, 1000].
    """
    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    sigmas = np.linspace(1.0, 1 / steps, steps)
    timesteps, _ = retrieve_timesteps(scheduler, device=device, sigmas=sigmas, mu=mu)
    scheduler.set_begin_index(0)
    return timesteps


# ----------------------------------------------------------------------------- prompts and masks


def _given(mask: Any) -> list[Tensor]:
    """Label maps, none of which may be left out."""
    masks = _mask_list(mask)
    if any(m is None for m in masks):
        raise ValueError("an edit needs the mask of every picture, old and new")
    return [m for m in masks if m is not None]


def _mask_list(mask: Any) -> list[Tensor | None]:
    """The user's masks -> one label map `h w`, or None, per mask."""
    if isinstance(mask, (Tensor, np.ndarray)):
        mask = split_masks(mask)
    masks = mask if isinstance(mask, Sequence) and not isinstance(mask, str) else [mask]
    if not masks:
        raise ValueError("mask is an empty list: give None for no mask")
    return [None if m is None else torch.from_numpy(mask_ids(m)) for m in masks]


def _resize(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by nearest neighbour, aligned at pixel centres; another shape is refused."""
    if labels.shape == size:
        return labels
    h, w = labels.shape
    if abs(h * size[1] - w * size[0]) > max(size):  # a pixel of rounding is none
        raise ValueError(
            f"a mask of {w}x{h} would be stretched to a picture of {size[1]}x{size[0]}: crop or "
            "pad it to the same shape"
        )
    resized = torch.nn.functional.interpolate(
        labels[None, None].double(), size, mode="nearest-exact"
    )
    return resized[0, 0].long()
