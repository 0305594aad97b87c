"""EC2FacePipeline: a face from a text, a mask, or both.

    pipe = EC2FacePipeline.from_config(load_profile("mini"))
    face = pipe("She wears earrings.", mask=label_map, generator=torch.Generator().manual_seed(42))
    face.images[0].save("face.png")

Sampling is FluxPipeline's: FlowMatchEulerDiscreteScheduler, timesteps shifted by the sequence
length. Without a mask and with the same noise the picture is FluxPipeline's own. Each picture has
its own noise stream, so it does not depend on its batch. Arguments and methods have FluxPipeline's
names and meaning, and other LoRAs work beside the mask's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from .backbone import (
    TextEmbedding,
    decode_latents,
    encode_text,
    load_backbone,
    pack,
    warn_of_lost_words,
)
from .config import BackboneConfig, Config, DataConfig, SamplingConfig
from .guards.checks import NotFiniteError, check_number
from .inference.consistency import ConsistencyGuidance
from .inference.inputs import (
    MaskLike,
    Texts,
    after_callback,
    attention_options,
    callback_inputs,
    check_embeddings,
    check_request,
    checked_sigmas,
    draw_noise,
    flux_timesteps,
    given_latents,
    laid_out,
    mask_list,
    paired_texts,
    resize_mask,
    t5_length,
)
from .inference.loras import MaskLoraMixin, keeps_lora_scales, saved_mask_lora
from .io.lora_file import LORA_FOLDER, MaskLora, find_mask_lora
from .io.sums import check_sums
from .mask_branch import (
    ADAPTER,
    MaskKVCache,
    guided_velocity,
    is_decoupled,
    mask_latents_of,
    precompute_mask_kv,
)


@dataclass
class EC2FacePipelineOutput(BaseOutput):
    """`images`: PIL images, or `b h w 3` array / `b 3 h w` tensor in [0, 1], by `output_type`."""

    images: list[Image.Image] | np.ndarray | Tensor


class EC2FacePipeline(MaskLoraMixin, DiffusionPipeline):
    """Text and mask to face, on the parts of a FluxPipeline and a mask LoRA.

    Args:
        scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer: the parts
            of a FluxPipeline. The text parts may be None if calls give embeddings.
        mask_lora: of a saved pipeline; None: the one that is on the transformer, if there is one.
        text_length: T5 tokens of a prompt; default: those of the mask LoRA's training.
        image_size: default side of the pictures in pixels; default: that of its training.
        guidance: default value of the guidance embedding.
        text_guidance, mask_guidance: default classifier-free guidance scales.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components: ClassVar = [LORA_FOLDER]
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds"]

    def __init__(  # noqa: PLR0913, PLR0917
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        mask_lora: MaskLora | None = None,
        text_length: int | None = None,
        image_size: int | None = None,
        guidance: float = SamplingConfig.guidance,
        text_guidance: float = SamplingConfig.text_guidance,
        mask_guidance: float = SamplingConfig.mask_guidance,
    ) -> None:
        super().__init__()
        if mask_lora is not None:
            mask_lora.load(transformer)
        elif ADAPTER in getattr(transformer, "peft_config", {}):
            mask_lora = MaskLora(transformer)
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            mask_lora=mask_lora,
        )
        longest = BackboneConfig.text_length
        if tokenizer_2 is not None:
            longest = min(longest, tokenizer_2.model_max_length)
        side = vae.config.sample_size if vae else DataConfig.size
        self.register_to_config(
            text_length=text_length or self._trained("text_length") or longest,
            image_size=image_size or self._trained("size") or side,
            guidance=guidance,
            text_guidance=text_guidance,
            mask_guidance=mask_guidance,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor * 2)
        self._guidance_scale = guidance
        self._interrupt = False
        self._num_timesteps = 0
        self._current_timestep: Tensor | None = None
        self._joint_attention_kwargs: dict[str, Any] = {}

    @property
    def components(self) -> dict[str, Any]:
        """FluxPipeline's parts; the mask LoRA is on the transformer."""
        return {name: part for name, part in super().components.items() if name != LORA_FOLDER}

    @property
    def guidance_scale(self) -> float:
        """Value of the guidance embedding in the call under way; a callback may change it."""
        return self._guidance_scale

    @property
    def joint_attention_kwargs(self) -> dict[str, Any]:
        """Of the call under way."""
        return self._joint_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Euler steps of the call under way."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """1000 t of the step under way."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt` skips the remaining steps."""
        return self._interrupt

    # ------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_config(cls, config: Config, variant: str | None = "both") -> EC2FacePipeline:
        """The pipeline of a profile with the LoRA of a variant; None: the base model alone.

        Guidance and size are the profile's; steps and seed are arguments of the call.

        Raises:
            ConfigError: the variant's LoRA was trained with other settings.
        """
        adapter = find_mask_lora(config, variant) if variant else None  # before the slow part
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
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> EC2FacePipeline:
        """A pipeline that was saved or pushed, or any FluxPipeline (base alone): folder or hub id.

        Pickles of the hub are not opened, those of a folder as tensors alone.
        """
        place = pretrained_model_name_or_path
        if Path(place).is_dir():
            check_sums(Path(place))
        else:
            kwargs.setdefault("use_safetensors", True)
        if (lora := saved_mask_lora(place, kwargs)) is not None:
            kwargs.setdefault(LORA_FOLDER, lora)  # else diffusers would open it as foreign code
        return super().from_pretrained(str(place), **kwargs)

    # ---------------------------------------------------------------------------------- sampling

    def encode_prompt(
        self,
        prompt: Texts = None,
        prompt_2: Texts = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in FluxPipeline: embed b prompts, or pass on what is embedded already.

        Args:
            prompt: of CLIP and T5; "" or None is no text.
            prompt_2: of T5 instead.
            device: of the embeddings; default: where the pipeline runs.
            num_images_per_prompt: pictures of each prompt; they stay together.
            prompt_embeds: T5's tokens `b T d`, instead of prompts.
            pooled_prompt_embeds: CLIP's vectors `b p`, likewise.
            max_sequence_length: T; default: `text_length`.
            lora_scale: of the text encoders' LoRAs.

        Returns:
            Tokens, pooled vectors, and position ids of the tokens, `(T, 3)` zeros.

        Raises:
            ValueError: one kind of embeddings without the other, or no text encoders.
        """
        device = device or self._execution_device
        if (prompt_embeds is None) != (pooled_prompt_embeds is None):
            raise ValueError("give prompt_embeds and pooled_prompt_embeds, or neither")
        if prompt_embeds is not None and (prompt or prompt_2):
            raise ValueError("give prompts or prompt_embeds, not both")
        if prompt_embeds is not None and pooled_prompt_embeds is not None:
            check_embeddings(prompt_embeds, pooled_prompt_embeds, self.transformer.config)
        else:
            if self.text_encoder is None or self.text_encoder_2 is None:
                raise ValueError(
                    "this pipeline has no text encoders: give prompt_embeds and "
                    "pooled_prompt_embeds, with guidance the negative ones too"
                )
            texts, texts_2 = paired_texts(prompt, prompt_2)
            length = t5_length(max_sequence_length, self.config.text_length)
            warn_of_lost_words(self, texts, length, texts_2, stacklevel=7)
            scale = 1.0 if lora_scale is None else lora_scale
            for encoder in (self.text_encoder, self.text_encoder_2):
                scale_lora_layers(encoder, scale)
            text = encode_text(self, texts, length, texts_2)
            for encoder in (self.text_encoder, self.text_encoder_2):
                unscale_lora_layers(encoder, scale)
            prompt_embeds = text.tokens
            pooled_prompt_embeds = text.pooled
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, 0).to(device)
        pooled_prompt_embeds = pooled_prompt_embeds.repeat_interleave(num_images_per_prompt, 0)
        pooled_prompt_embeds = pooled_prompt_embeds.to(device)
        text_ids = torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=prompt_embeds.dtype)
        return prompt_embeds, pooled_prompt_embeds, text_ids

    @torch.no_grad()
    @keeps_lora_scales
    def __call__(  # noqa: D417, PLR0913, PLR0917
        self,
        prompt: Texts = None,
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
        *,
        prompt_2: Texts = None,
        negative_prompt: Texts = None,
        negative_prompt_2: Texts = None,
        true_cfg_scale: float | None = None,
        sigmas: Sequence[float] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        consistency: ConsistencyGuidance | None = None,
    ) -> EC2FacePipelineOutput | tuple[Any]:
        """Generate faces. Mask only: leave `prompt` empty. Text only: leave `mask` out.

        The arguments from prompt_2 to max_sequence_length are FluxPipeline's.

        Args:
            prompt: one text or one per picture; None or "" is no text. A warning names words that
                the text encoders do not read.
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
            height: pixels, a multiple of 2 * vae_scale_factor; default: the model's own. A mask
                LoRA was trained at one size; a warning says so at another.
            width: likewise.
            num_images_per_prompt: pictures of each prompt-mask pair; they stay together.
            output_type: "pil"; "np" or "pt": in [0, 1]; "latent": tokens `b n 4c`.
            latents: initial noise `b c h/f w/f`, or its tokens `b n 4c`, instead of `generator`'s.
            mask_strength: factor >= 0 on each mask token in the softmax of text and noise tokens;
                1 is as trained, 0 is no mask.
            prompt_2: read by T5 instead of `prompt`.
            negative_prompt: what text_guidance leads away from; default: no text.
            negative_prompt_2: read by T5 instead of `negative_prompt`.
            true_cfg_scale: FluxPipeline's name of text_guidance.
            sigmas: times to pass through, before the shift by the sequence length.
            prompt_embeds, pooled_prompt_embeds: instead of prompts, see `encode_prompt`.
            negative_prompt_embeds, negative_pooled_prompt_embeds: instead of negative_prompt.
            return_dict: False: a tuple with the pictures.
            joint_attention_kwargs: for the attention, and `scale` of all LoRAs.
            callback_on_step_end: called as `f(pipeline, step, timestep, tensors)` after each step;
                what it returns replaces `latents` (tokens `b n 4c`) and `prompt_embeds`. It ends
                the sampling by `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: which tensors it is given.
            max_sequence_length: T5 tokens; default: those of the training.
            consistency: leads the sampling by the consistency losses; not part of the paper.

        Returns:
            The pictures.

        Raises:
            TypeError: an argument of another type.
            ValueError: numbers of prompts, masks, generators or latents that do not fit; a mask
                that cannot be read; an unsupported size or output type; a number out of range or
                not finite.
            NotFiniteError: the pictures are not finite.
        """
        if sigmas is not None:
            sigmas = checked_sigmas(sigmas)
            num_inference_steps = len(sigmas)
        side = self.config.image_size
        size = (side if height is None else height, side if width is None else width)
        check_request(size, 2 * self.vae_scale_factor, num_inference_steps, output_type)
        check_number(num_images_per_prompt, "num_images_per_prompt", 1, whole=True)
        check_number(mask_strength, "mask_strength", 0)
        wanted = callback_inputs(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        if text_guidance is not None and true_cfg_scale is not None:
            raise ValueError("true_cfg_scale is another name of text_guidance: give one of them")
        self._guidance_scale = self._setting("guidance", guidance_scale)
        text_scale = self._setting(
            "text_guidance", true_cfg_scale if text_guidance is None else text_guidance
        )
        mask_scale = self._setting("mask_guidance", mask_guidance)
        self._joint_attention_kwargs = attention_options(joint_attention_kwargs)
        self._interrupt = False
        device = self._execution_device

        masks = mask_list(mask)
        about = {
            "num_images_per_prompt": num_images_per_prompt,
            "max_sequence_length": max_sequence_length,
            "lora_scale": self._joint_attention_kwargs.get("scale"),
        }
        text = self._embed(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds, about)
        prompts = len(text) // num_images_per_prompt
        pairs = max(prompts, len(masks))
        if prompts not in (1, pairs) or len(masks) not in (1, pairs):
            raise ValueError(f"{prompts} prompts and {len(masks)} masks do not pair up")
        b = pairs * num_images_per_prompt

        # text embedded once per prompt, masks encoded once each, then laid out for b pictures
        text = text[torch.arange(b) % len(text)]
        null = text
        if text_scale != 1:
            null = self._embed(
                negative_prompt, negative_prompt_2, negative_prompt_embeds,
                negative_pooled_prompt_embeds, about,
            )  # fmt: skip
            null = laid_out(null, text)
        rows = torch.arange(b) // num_images_per_prompt % len(masks)
        mask_latents, keep_mask = self._mask_condition(masks, size, rows)
        led_by = consistency.conditions(prompt, masks, size, rows) if consistency else None

        f = self.vae_scale_factor
        shape = (b, self.transformer.config.in_channels // 4, size[0] // f, size[1] // f)
        z = (
            draw_noise(shape, generator, device)
            if latents is None
            else given_latents(latents, shape).to(device)
        )
        tokens = shape[-2] * shape[-1] // 4
        timesteps = flux_timesteps(self.scheduler, num_inference_steps, tokens, device, sigmas)
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=len(timesteps)) as bar:
            for step, time in enumerate(timesteps):
                if self._interrupt:
                    continue
                self._current_timestep = time
                t = (time / 1000).expand(b)
                v = guided_velocity(
                    self.transformer, z, t, text, null, mask_latents, keep_mask,
                    self._guidance_scale, text_scale, mask_scale, mask_strength,
                    self._joint_attention_kwargs,
                )  # fmt: skip
                if consistency is not None and led_by is not None:
                    v = consistency(v, z, t, led_by)
                z = self.scheduler.step(v, time, z, return_dict=False)[0]  # Eq. 2, one Euler step
                if callback_on_step_end is not None:
                    told = partial(callback_on_step_end, self, step, time)
                    z, text = after_callback(told, wanted, z, text)
                bar.update()
        self._current_timestep = None
        images = pack(z) if output_type == "latent" else self._decode(z, output_type)
        self.maybe_free_model_hooks()
        return EC2FacePipelineOutput(images=images) if return_dict else (images,)

    def _embed(
        self,
        prompt: Texts,
        prompt_2: Texts,
        tokens: Tensor | None,
        pooled: Tensor | None,
        about: dict[str, Any],
    ) -> TextEmbedding:
        tokens, pooled, _ = self.encode_prompt(
            prompt, prompt_2, prompt_embeds=tokens, pooled_prompt_embeds=pooled, **about
        )
        return TextEmbedding(tokens, pooled)

    def _mask_condition(
        self, masks: Sequence[Tensor | None], size: tuple[int, int], rows: Tensor
    ) -> tuple[Tensor | MaskKVCache | None, Tensor | None]:
        """Mask latents, or keys and values, of b pictures, and which of them have a mask `(b,)`."""
        if all(m is None for m in masks):
            return None, None
        self._warn_of_size(size)
        maps = [torch.zeros(size).long() if m is None else resize_mask(m, size) for m in masks]
        stacked = torch.stack(maps).to(get_module_execution_device(self.vae))
        z_mask = mask_latents_of(self.vae, stacked).to(self._execution_device)
        keep_mask = torch.tensor([m is not None for m in masks])[rows]
        if is_decoupled(self.transformer):  # one pass over the masks serves every step
            kv = precompute_mask_kv(self.transformer, z_mask, self._joint_attention_kwargs)
            return kv[rows], keep_mask
        return z_mask[rows], keep_mask

    def _decode(self, z: Tensor, output_type: str) -> Any:
        """Latents `b c h w` -> pictures."""
        decoded = decode_latents(self.vae, z.to(get_module_execution_device(self.vae)))
        if not decoded.isfinite().all():  # they would be written as black pictures
            raise NotFiniteError(
                "the pictures are not finite: lower the guidance scales "
                f"({self._guidance_scale:g} and those of text and mask) or check the weights"
            )
        return self.image_processor.postprocess(decoded, output_type)

    def _setting(self, name: str, given: float | None) -> float:
        """A scale that was given, or the model's own; finite and not negative."""
        value = self.config[name] if given is None else given
        check_number(value, name, 0)
        return float(value)
