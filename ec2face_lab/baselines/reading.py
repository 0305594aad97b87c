"""How the comparison systems read: captions through the guiding CLIP, masks as maps or colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import NUM_CLASSES, palette_tensor
from ec2face_core.config import Config

if TYPE_CHECKING:
    from ec2face_core.perception import ClipScorer


def one_hot(label_maps: Tensor) -> Tensor:
    """Label maps `b h w` -> one-hot `b 19 h w` float32 in {0, 1}."""
    return F.one_hot(label_maps, NUM_CLASSES).movedim(-1, 1).float()


def coloured(label_maps: Tensor) -> Tensor:
    """Label maps `b h w` -> the palette's colours `b 3 h w` in [-1, 1]."""
    return palette_tensor()[label_maps].movedim(-1, 1)


def guiding_clip(config: Config) -> ClipScorer:
    """The CLIP whose sentence features every system is conditioned on."""
    from ec2face_core.perception import ClipScorer

    return ClipScorer.from_config(config.perception)


@torch.no_grad()
def word_features(clip: ClipScorer, texts: Sequence[str]) -> Tensor:
    """Word features of captions, `b n d`: the last layer of CLIP's text transformer, unpooled."""
    model = clip.model
    x = model.token_embedding(clip.tokenizer(list(texts))) + model.positional_embedding
    return model.ln_final(model.transformer(x, attn_mask=model.attn_mask)).float()


def unknown_words(clip: ClipScorer, texts: Sequence[str]) -> list[str]:
    """Words of captions that the CLIP's vocabulary has no token for: it spells them out."""
    tokenizer = clip.tokenizer.tokenizer
    vocabulary, backend = tokenizer.get_vocab(), tokenizer.backend_tokenizer
    found = {}
    for text in texts:
        for piece, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text.lower()):
            if f"{piece}</w>" not in vocabulary:
                found[text[a:b]] = None
    return list(found)


class Centre(nn.Module):
    """Unit features of pictures and sentences, each kind centred on its own mean.

    In so small a CLIP the two lie further apart than in FaRL, so a network that was trained on
    pictures' features could not read sentences' without.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("picture", torch.zeros(width))
        self.register_buffer("sentence", torch.zeros(width))

    def forward(self, features: Tensor, kind: str) -> Tensor:
        """Features `(b, d)` of the kind `picture` or `sentence` -> unit features `(b, d)`."""
        return F.normalize(features - self.get_buffer(kind), dim=1)
