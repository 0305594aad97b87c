"""Facts about faces: what captions can mention, and a network that sees which of it holds.

A fact is a key of a face's attributes with a value, such as eyeglasses that are worn or black hair.
`FactNet` serves as an evaluator only: nothing is ever guided by it. With the facts that a caption
mentions (`prepare.captions.caption_facts`) it tells how many of them a picture shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.io.sums import check_sums, list_sums
from ec2face_core.runs import write_tensors

from ..prepare.captions import HAIR_WORDS, fact_name

Attributes = dict[str, "bool | str"]


def facts(rows: Sequence[Attributes]) -> list[Attributes]:
    """Everything that one sentence can say of faces with the keys of `rows`, one fact each."""
    kinds = {key: isinstance(value, bool) for row in rows for key, value in row.items()}
    flags: list[Attributes] = [{key: True} for key in sorted(kinds) if kinds[key]]
    either: list[Attributes] = [{key: False} for key in ("male", "young") if key in kinds]
    known = {key: words for key, words in HAIR_WORDS.items() if key in kinds}
    words: list[Attributes] = [
        {key: word} for key, values in known.items() for word in values if word != "medium"
    ]
    return flags + either + words


def fact_names(statements: Sequence[Attributes]) -> list[str]:
    """Names of `facts`, as `prepare.captions.caption_facts` gives them."""
    return [fact_name(*pair) for statement in statements for pair in statement.items()]


def fact_targets(rows: Sequence[Attributes], statements: Sequence[Attributes]) -> Tensor:
    """Which of the facts `statements` hold for each face: `(b, n)` bool.

    A fact whose key a face does not have is not visible and does not hold.
    """
    pairs = [pair for statement in statements for pair in statement.items()]
    return torch.tensor([[row.get(key) == value for key, value in pairs] for row in rows])


class FactNet(nn.Module):
    """A strided residual network that looks at a face and tells which facts hold.

    Args:
        names: of the facts.
        widths: channels at 1/2, 1/4, 1/8 ... of the side.
        size: side in pixels, a multiple of 4 * 2 ** len(widths); other images are resized.
    """

    def __init__(
        self, names: Sequence[str], widths: Sequence[int] = (24, 48, 96, 128), size: int = 128
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.widths = tuple(widths)
        self.size = size
        last = widths[-1]
        stages: list[nn.Module] = []
        for inputs, outputs in zip((3, *widths), widths, strict=False):
            stages += [
                nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                _Residual(outputs),
            ]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),  # faces are aligned: places matter
            nn.Flatten(),
            nn.Linear(16 * last, last, bias=False),
            nn.BatchNorm1d(last),
            nn.ReLU(),
            nn.Linear(last, len(self.names)),
        )
        self.register_buffer("thresholds", torch.zeros(len(self.names)))

    def forward(self, images: Tensor) -> Tensor:
        """Images [-1, 1] `b 3 h w` -> logits of the facts `b n`."""
        size = (self.size, self.size)
        if images.shape[-2:] != size:
            images = F.interpolate(
                images, size, mode="bilinear", align_corners=False, antialias=True
            )
        return self.head(self.stages(images))

    @torch.no_grad()
    def holds(self, images: Tensor) -> Tensor:
        """Images [-1, 1] `b 3 h w` -> which facts hold, `b n` bool."""
        return self(images) > self.thresholds

    @torch.no_grad()
    def calibrate(self, logits: Tensor, truth: Tensor) -> None:
        """Set the thresholds to those of the highest balanced accuracy.

        Args:
            logits: of faces, `b n`.
            truth: which facts hold, `b n` bool.
        """
        order = logits.argsort(0)
        ranked = truth.gather(0, order).double()
        below = ranked.cumsum(0) / ranked.sum(0).clamp(min=1)  # missed facts
        others = (1 - ranked).cumsum(0) / (1 - ranked).sum(0).clamp(min=1)  # rejected rightly
        best = (others - below)[:-1].argmax(0)[None]
        values = logits.gather(0, order)
        self.thresholds.copy_((values.gather(0, best) + values.gather(0, best + 1))[0] / 2)


class _Residual(nn.Module):
    """x and two convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def balanced_accuracy(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean of the shares of right answers where a fact holds and where it does not, in percent.

    predicted, truth: `b n` bool. Returns `(n,)` float64; NaN where a fact holds for all or none.
    """
    right = (predicted == truth).double()
    held = (right * truth).sum(0) / truth.sum(0)
    rejected = (right * ~truth).sum(0) / (~truth).sum(0)
    return 100 * (held + rejected) / 2


def save_facts(net: FactNet, path: Path) -> None:
    """Write a net in half precision; names, widths and size stand in the file's header."""
    header = {"names": net.names, "widths": net.widths, "size": net.size}
    state = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in net.state_dict().items()
    }
    write_tensors(path, state, {key: json.dumps(value) for key, value in header.items()})
    list_sums(path)


def load_facts(path: str | Path, device: torch.device | str = "cpu") -> FactNet:
    """The net of a file that `save_facts` wrote, in float32, frozen.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it is not the one that was kept.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    check_sums(Path(path))
    with safe_open(path, "pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items()}
    net = FactNet(**header)
    net.load_state_dict(load_file(path))
    return net.to(device).eval().requires_grad_(False)
