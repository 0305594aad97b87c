"""TediGAN (Xia et al., CVPR 2021): every modality is a code in the W+ of one frozen generator.

An encoder inverts faces into W+, another maps label maps there, and a third brings sentences to the
codes of their faces. The layer index chooses the modality: coarse layers take the mask's code,
fine layers the sentence's. At sampling a few steps of CLIP optimisation refine the code
(TediGAN-B, arXiv 2104.08910).

Simplified: the encoders have no adversarial term (as in pSp, which the released code trains for
masks); p_i = 1 in the visual-linguistic similarity; LPIPS is taken in the guiding CLIP's layers;
the sentence feature of that CLIP replaces the recurrent text encoder. Twenty steps of optimisation
instead of 200, in the layers of the text; a mask alone is not optimised. For other faces of
one condition the last layers lean towards a random code by 0.3 instead of being replaced by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import one_hot
from ec2face_core.config import Config

from ..world.training import descend, seeded, set_learning_rates
from .style import (
    WIDTH,
    Encoder,
    Linear,
    StyleGenerator,
    StyleSystem,
    adam,
    leaky,
    perceptual,
)
from .system import Faces, Generators, Masks, Run, Texts

TEXT_LAYERS = 4  # the last layers take the sentence's code, those before the mask's

FREE_LAYERS = 2  # the last layers, which lean towards a random code

DIVERSITY = 0.3  # by this much

BATCH = 16

LR = 2e-3

MARGIN = 0.2  # of the ranking loss

SHARES = {"visual": 0.45, "mask": 0.45, "text": 0.1}  # of the seconds


class SentenceEncoder(nn.Module):
    """CLIP's sentence features `(b, d)` -> `(b, outputs)`, offsets in W+."""

    def __init__(self, features: int, outputs: int, hidden: int = 192) -> None:
        super().__init__()
        self.features = features
        self.layers = nn.ModuleList([Linear(features, hidden), Linear(hidden, hidden)])
        self.head = Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Sentence features -> offsets."""
        x = x * self.features**0.5  # unit vectors -> unit variance
        for layer in self.layers:
            x = leaky(layer(x))
        return self.head(x).float()


class TediGAN(StyleSystem):
    """Mask, sentence and picture as codes in one frozen W+.

    Attributes:
        clip_steps: of optimisation at sampling; 0 leaves the encoders' codes as they are.
        layers: of W+.
    """

    name = "TediGAN"

    def __init__(
        self, config: Config, clip_steps: int = 20, device: torch.device | str | None = None
    ) -> None:
        super().__init__(config, device)
        self.clip_steps = clip_steps
        self.build(config.seed)

    def build(self, seed: int) -> None:
        """Fill `networks` with random weights, a function of the seed."""
        with seeded(seed):
            generator = StyleGenerator(self.size)
            self.layers = generator.layers
            self.networks["generator"] = generator
            self.networks["mask"] = Encoder(self.size, 19, self.layers * WIDTH)
            width = self.clip.text_features([""]).shape[1]
            self.networks["text"] = SentenceEncoder(width, self.layers * WIDTH)
        self.networks.to(self.device)

    def train(self, faces: Faces, run: Run) -> None:
        """Invert faces, then masks, then sentences."""
        with seeded(run.seed):
            visual = Encoder(self.size, 3, self.layers * WIDTH).to(self.device)
        self._train_encoder("visual", visual, faces, run)
        self._train_encoder("mask", self.networks["mask"], faces, run)
        self._train_text(visual, faces, run)

    def _train_encoder(self, name: str, encoder: nn.Module, faces: Faces, run: Run) -> None:
        optimizer = adam(encoder, LR)

        def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
            set_learning_rates(optimizer, progress)
            x, label_maps, _ = faces.batch(BATCH, generator)
            with torch.autocast(self.device.type, torch.bfloat16):
                offsets = encoder(x if name == "visual" else one_hot(label_maps))
                picture = self.networks["generator"](self._codes(offsets))
                pixels = F.mse_loss(picture, x)
                likeness = perceptual(self.clip, picture, x).mean()
                loss = pixels + 0.8 * likeness + 0.005 * offsets.square().mean()
                descend(optimizer, loss)
            return {"pixels": pixels, "perceptual": likeness}

        run.stage(name, step, {"encoder": encoder, "adam": optimizer}, SHARES[name])

    def _train_text(self, visual: nn.Module, faces: Faces, run: Run) -> None:
        encoder = self.networks["text"]
        optimizer = adam(encoder, LR)

        def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
            set_learning_rates(optimizer, progress)
            x, _, captions = faces.batch(4 * BATCH, generator)
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                face_codes = visual(x)
            text_codes = encoder(self.clip.text_features(captions))
            similarity = F.mse_loss(text_codes, face_codes)
            ranking = ranking_loss(text_codes, face_codes, MARGIN)
            descend(optimizer, similarity + 0.1 * ranking)
            return {"similarity": similarity, "ranking": ranking}

        run.stage("text", step, {"encoder": encoder, "adam": optimizer}, SHARES["text"])

    def _codes(self, offsets: Tensor) -> Tensor:
        """Offsets `(b, layers * WIDTH)` from the mean w -> codes `(b, layers, WIDTH)`."""
        return self.networks["generator"].average + offsets.unflatten(1, (self.layers, WIDTH))

    @torch.no_grad()
    def codes(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """Codes `(b, layers, WIDTH)` before optimisation; what is not given is random."""
        random = self.networks["generator"].random_codes(generators)
        codes = random.clone()
        if prompts is not None:
            codes = self._codes(self.networks["text"](self.clip.text_features(prompts)))
        if masks is not None:
            mask_codes = self._codes(self.networks["mask"](one_hot(masks)))
            codes[:, :-TEXT_LAYERS] = mask_codes[:, :-TEXT_LAYERS]
        codes[:, -FREE_LAYERS:].lerp_(random[:, -FREE_LAYERS:], DIVERSITY)
        return codes

    def sample(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """Images `b 3 h w` in [0, 1]."""
        codes = self.codes(prompts, masks, generators)
        if prompts is not None and self.clip_steps:
            first = self.layers - TEXT_LAYERS if masks is not None else 0
            codes = self._optimise(codes, first, self.clip.text_features(prompts))
        return (self.networks["generator"](codes) / 2 + 0.5).clamp(0, 1)

    @torch.enable_grad()
    def _optimise(self, start: Tensor, first: int, text: Tensor) -> Tensor:
        """Layers `first` ... of the codes towards the sentence, held near where they started."""
        free = start[:, first:].clone().requires_grad_()
        optimizer = torch.optim.Adam([free], 0.02)
        for _ in range(self.clip_steps):
            codes = torch.cat([start[:, :first], free], 1)
            image = self.clip.image_features(self.networks["generator"](codes))
            away = (free - start[:, first:]).square().mean((1, 2))
            descend(optimizer, (1 - (image * text).sum(1) + 2.0 * away).sum())
        return torch.cat([start[:, :first], free.detach()], 1)


def ranking_loss(sentences: Tensor, faces: Tensor, margin: float) -> Tensor:
    """Pairwise ranking: a face's code is nearer to its sentence than any other face's, by `margin`.

    sentences, faces: codes `(b, d)` in the same order. Hinge on cosines, mean over other faces.
    """
    cosine = F.normalize(sentences, dim=1) @ F.normalize(faces, dim=1).T
    hinge = (margin - cosine.diagonal()[:, None] + cosine).clamp(min=0)
    others = 1 - torch.eye(len(cosine), device=cosine.device)
    return (hinge * others).sum() / others.sum()
