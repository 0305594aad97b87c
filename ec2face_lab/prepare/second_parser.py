"""The second parser of paper scale: a SegFormer of the hub, exported to what facer opens.

`jonathandinu/face-parsing` is a SegFormer (MiT-B5) that was trained on CelebAMask-HQ. It shares
neither its network nor its training with FaRL, so it can evaluate what FaRL guided. Its classes are
found by name.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import CLASSES, FACER_TO_CELEBAMASK
from ec2face_core.io.hub import answering_hub
from ec2face_core.perception import WeightsError
from ec2face_core.runs import whole_file

SEGFORMER = "jonathandinu/face-parsing"


class _Logits(nn.Module):
    """A SegFormer's logits `b 19 h w` in facer's order, from its normalised images."""

    def __init__(self, net: Any, channels: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("channels", channels)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixel_values=pixels).logits[:, self.channels]


class _FacerParser(nn.Module):
    """The contract of FaRL's file: [0, 1] `b 3 h w` -> (logits `b 19 h w`, {})."""

    def __init__(self, logits: nn.Module, size: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.size = size
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = (image - self.mean) / self.std
        if x.shape[-1] != self.size or x.shape[-2] != self.size:
            x = F.interpolate(x, size=[self.size, self.size], mode="bilinear", align_corners=False)
        y = self.logits(x)
        y = F.interpolate(
            y, size=[image.shape[-2], image.shape[-1]], mode="bilinear", align_corners=False
        )
        aux: dict[str, Tensor] = {}
        return y, aux


def export_segformer(source: str | Path, out: Path, size: int = 512) -> Path:
    """Write a SegFormer as a TorchScript file that `ec2face_core.perception.FaceParser` opens.

    Args:
        source: hub id or folder, in safetensors.
        out: file to write.
        size: side in pixels of the frame that the network computes; 512 is what it was trained for.

    Returns:
        `out`.

    Raises:
        WeightsError: it is a file, cannot be opened, or its classes are not those of CelebAMask-HQ.
    """
    source = str(source)
    if Path(source).is_file():
        raise WeightsError(f"{source} is a file: name the folder of the SegFormer")
    from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

    asked = nullcontext() if Path(source).is_dir() else answering_hub(source, "config.json")
    try:
        with asked:
            net = SegformerForSemanticSegmentation.from_pretrained(source, use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source}: no SegFormer in safetensors ({error})") from error
    logits = _Logits(net.float(), _facer_channels(source, net.config.id2label))
    logits.eval().requires_grad_(False)
    example = torch.zeros(2, 3, size, size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants, as they should
        traced = torch.jit.trace(logits, example, check_trace=False)
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    script = torch.jit.script(_FacerParser(traced, size, mean, std).eval())
    with whole_file(out) as part:
        script.save(str(part))
    return out


def _facer_channels(source: str, names: dict[int, str]) -> Tensor:
    """The network's channel of each of facer's classes.

    Raises:
        WeightsError: a class is missing or has another name.
    """
    channels = {name.lower(): int(channel) for channel, name in names.items()}
    lost = [name for name in CLASSES if name not in channels]
    if lost or len(channels) != len(CLASSES):
        raise WeightsError(
            f"{source}: its {len(channels)} classes are not CelebAMask-HQ's; missing: "
            f"{', '.join(lost) or 'none'}"
        )
    return torch.tensor([channels[CLASSES[k]] for k in FACER_TO_CELEBAMASK])
