"""Editing a picture through its mask: what two masks agree on is kept, the rest is sampled.

The sampled latent cells are those that the change touches, with a margin. All others follow the
picture's own path (`flow.interpolate` between its latents and the noise of the sampling), so that
at every step the sampled cells see the kept ones at their own noise level (Blended Latent
Diffusion, Avrahami et al. 2023; RePaint, Lugmayr et al. 2022, without its repeats). At t = 0 the
kept latents are the picture's: what differs there is due to the autoencoder alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor

from ec2face_core.attributes import NUM_CLASSES
from ec2face_core.backbone import encode_images, pack
from ec2face_core.flow import interpolate
from ec2face_core.guards.checks import (
    check_floats,
    check_labels,
    check_number,
    check_range,
    check_same_shape,
)
from ec2face_core.inference.inputs import (
    MaskLike,
    Texts,
    check_request,
    draw_noise,
    mask_list,
    resize_mask,
)
from ec2face_core.io.paths import user_file
from ec2face_core.io.pictures import decoded, open_picture, to_rgb, upright
from ec2face_core.io.report import DataError

if TYPE_CHECKING:
    from ec2face_core.pipeline import EC2FacePipeline

ImageLike = Tensor | np.ndarray | Image.Image | str | Path
OWN_SETTINGS = ("height", "width", "latents")  # what an edit gives to the pipeline itself

MARGIN = 32  # the default margin is this fraction of the mask's side: 2 pixels of 64


@torch.no_grad()
def edit(
    pipe: EC2FacePipeline,
    image: ImageLike | Sequence[ImageLike],
    mask: MaskLike | Sequence[MaskLike],
    new_mask: MaskLike | Sequence[MaskLike],
    prompt: Texts = None,
    margin: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    **sampling: Any,
) -> Any:
    """Change pictures through their masks and keep the rest.

    Args:
        pipe: samples by masks.
        image: one picture or several of one size, as for `read_pictures`.
        mask: what each picture shows, as for a call of the pipeline.
        new_mask: what it is to show.
        prompt: one text, or one per picture.
        margin: pixels around the change that are sampled, too; None: 1/32 of the side.
        generator: one per picture, or one for all.
        sampling: further settings of a call of the pipeline, such as num_inference_steps.

    Returns:
        What a call of the pipeline returns: pictures of the size of the given ones.

    Raises:
        TypeError, ValueError: as for a call of the pipeline; numbers of pictures and masks that
            differ; or a setting that an edit makes itself, such as height.
    """
    if own := [name for name in OWN_SETTINGS if name in sampling]:
        raise TypeError(
            f"{own[0]}: an edit takes the size from the picture and draws its own noise, which "
            "generator seeds; leave this setting out"
        )
    pixels = read_pictures(image)
    size = (pixels.shape[-2], pixels.shape[-1])
    check_request(size, 2 * pipe.vae_scale_factor, 1, "pil")
    old = _label_maps(mask, size)
    new = _label_maps(new_mask, size)
    if len(old) != len(pixels) or len(new) != len(pixels):
        counts = f"{len(pixels)} pictures, {len(old)} masks and {len(new)} new masks"
        raise ValueError(f"{counts}: give one of each per picture")
    device = pipe._execution_device
    vae_device = get_module_execution_device(pipe.vae)
    z = encode_images(pipe.vae, pixels.to(vae_device) * 2 - 1).to(device)
    noise = draw_noise(tuple(z.shape), generator, device)
    changed = changed_pixels(old, new, margin).to(device)
    then = sampling.pop("callback_on_step_end", None)
    wanted = sampling.pop("callback_on_step_end_tensor_inputs", ())
    return pipe(
        prompt, new, height=size[0], width=size[1], latents=noise,
        callback_on_step_end=keep_outside(z, noise, changed, then),
        callback_on_step_end_tensor_inputs=tuple({"latents": 0, **dict.fromkeys(wanted)}),
        **sampling,
    )  # fmt: skip


def changed_pixels(mask: Tensor, new_mask: Tensor, margin: int | None = None) -> Tensor:
    """Where two masks differ, with a margin: `b h w` bool.

    Args:
        mask: label maps `b h w` of the picture as it is.
        new_mask: label maps of the wanted picture, of the same shape.
        margin: pixels by which each changed pixel reaches in every direction, at most the side;
            None: 1/32 of the side.

    Raises:
        TypeError, ValueError: no label maps, different shapes, or a negative margin.
    """
    labels = check_labels(mask, NUM_CLASSES, "mask")
    wanted = check_labels(new_mask, NUM_CLASSES, "new_mask")
    check_same_shape(mask=labels, new_mask=wanted)
    reach = labels.shape[-1] // MARGIN if margin is None else margin
    check_number(reach, "margin", 0, whole=True)
    reach = min(int(reach), max(labels.shape[-2:]))
    grown = (labels != wanted)[:, None].float()
    for k in ((2 * reach + 1, 1), (1, 2 * reach + 1)):  # a square, one axis after the other
        grown = torch.nn.functional.max_pool2d(grown, k, stride=1, padding=(k[0] // 2, k[1] // 2))
    return grown[:, 0].bool()


StepEnd = Callable[..., dict[str, Any] | None]


def keep_outside(z: Tensor, noise: Tensor, changed: Tensor, then: StepEnd | None = None) -> StepEnd:
    """A `callback_on_step_end` that puts the kept latents back on the picture's own path.

    Args:
        z: latents of the picture, `b c h w`.
        noise: of the sampling, of the same shape.
        changed: pixels `b fh fw` bool that are sampled; a latent cell is if one of its pixels is.
        then: another such callback, called after it.
    """
    factor = changed.shape[-1] // z.shape[-1]
    cells = torch.nn.functional.max_pool2d(changed[:, None].float(), factor).bool()
    sampled = pack(cells.expand_as(z))
    data = pack(z)
    start = pack(noise)

    def step_end(pipe: Any, step: int, time: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        t = pipe.scheduler.sigmas[step + 1].to(z).expand(len(z))  # the time that was reached
        kept = interpolate(data, start, t)
        values = values | {"latents": torch.where(sampled, values["latents"], kept)}
        return values | (then(pipe, step, time, values) or {}) if then else values

    return step_end


def read_pictures(image: Any) -> Tensor:
    """One picture or several of one size -> `b 3 h w` in [0, 1], upright.

    Args:
        image: PIL images; paths; tensors `3 h w` or `b 3 h w` in [0, 1]; arrays `h w 3` or
            `b h w 3`, uint8 or floats in [0, 1].

    Raises:
        TypeError, ValueError: something else; pictures that cannot be read or differ in size.
        FileNotFoundError: no such file.
    """
    given = image if isinstance(image, Sequence) and not isinstance(image, str | bytes) else [image]
    if not given:
        raise ValueError("image is an empty list: give one picture or more")
    pictures = [_one_or_more(item) for item in given]
    if len({picture.shape[1:] for picture in pictures}) != 1:
        sizes = sorted({(picture.shape[-1], picture.shape[-2]) for picture in pictures})
        raise ValueError(f"pictures of the sizes {sizes}: give one or more of one size")
    return torch.cat(pictures)


def _one_or_more(image: Any) -> Tensor:
    """A picture in any form, or a tensor or array of several -> `b 3 h w` in [0, 1]."""
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if isinstance(image, Tensor):
        pixels = image[None] if image.ndim == 3 else image
        check_floats(pixels, "image")
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"image has shape {tuple(image.shape)}, expected b 3 h w")
        check_range(pixels, 0, 1, "image")
        return pixels.float()
    name = "image"
    try:
        if isinstance(image, str | Path):
            path = user_file(image, "image")
            name = f"image {path}"
            picture = to_rgb(open_picture(path))
        elif isinstance(image, Image.Image):
            picture = to_rgb(upright(decoded(image, "image")))
        else:
            raise TypeError(
                f"image: expected PIL images, paths, tensors or arrays, got {type(image).__name__}"
            )
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    pixels = torch.from_numpy(np.array(picture)).movedim(-1, 0)[None] / 255
    check_floats(pixels, name)
    return pixels


def _from_array(array: np.ndarray) -> Tensor:
    """An array `h w 3` or `b h w 3` as a tensor `b 3 h w`; uint8 is scaled to [0, 1]."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise TypeError(f"image is an array of {array.dtype}; give uint8, or floats in [0, 1]")
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(f"image is an array of shape {array.shape}, expected h w 3 or b h w 3")
    scale = 255 if array.dtype == np.uint8 else 1
    pixels = torch.from_numpy(np.array(array, np.float32)).movedim(-1, -3) / scale
    return pixels[None] if pixels.ndim == 3 else pixels


def _label_maps(mask: Any, size: tuple[int, int]) -> Tensor:
    """Label maps `b h w` of this size, none of which may be left out."""
    masks = mask_list(mask)
    given = [m for m in masks if m is not None]
    if len(given) < len(masks):
        raise ValueError("an edit needs the mask of every picture, old and new")
    return torch.stack([resize_mask(m, size) for m in given])
