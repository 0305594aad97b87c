"""Captions for the comparison systems: features of the guiding CLIP, and words that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from ec2face_core.perception import ClipScorer


@torch.no_grad()
def word_features(clip: ClipScorer, texts: Sequence[str]) -> Tensor:
    """Word features of captions, `b n d`: the last layer of CLIP's text transformer, unpooled."""
    model = clip.model
    tokens = clip.tokenizer(list(texts)).to(clip.device)
    x = model.token_embedding(tokens) + model.positional_embedding
    return model.ln_final(model.transformer(x, attn_mask=model.attn_mask)).float()


def unknown_words(clip: ClipScorer, texts: Sequence[str]) -> list[str]:
    """Words of captions that are no token of the CLIP's vocabulary, so that it spells them."""
    tokenizer = clip.tokenizer.tokenizer
    vocabulary = tokenizer.get_vocab()
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = {}
    for text in texts:
        for piece, (start, end) in split(text.lower()):
            if f"{piece}</w>" not in vocabulary:
                words[text[start:end]] = None
    return list(words)


class Centre(nn.Module):
    """Unit features of pictures and sentences, each kind centred on its own mean.

    In so small a CLIP the two lie further apart than in FaRL: without centring, a network trained
    on features of pictures cannot read those of sentences.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("picture", torch.zeros(width))
        self.register_buffer("sentence", torch.zeros(width))

    def forward(self, features: Tensor, kind: str) -> Tensor:
        """Features `(b, d)` of the kind `picture` or `sentence` -> unit features `(b, d)`."""
        return F.normalize(features - self.get_buffer(kind), dim=1)
