"""TediGAN (Xia et al., CVPR 2021): every modality is a code in the W+ of one frozen generator.

An encoder inverts faces into W+, another maps label maps there, and a third brings sentences to the
codes of their faces. The layer index decides which modality speaks: coarse layers take the mask's
code, fine layers the sentence's. At sampling a few steps of CLIP optimisation refine the code
(TediGAN-B, arXiv 2104.08910).

Simplified: the encoders have no adversarial term (as in pSp, which the released code trains for
masks); p_i = 1 in the visual-linguistic similarity; LPIPS is taken in the guiding CLIP's layers;
the sentence feature of that CLIP replaces the recurrent text encoder. Twenty steps of optimisation
instead of 200, in the layers that the text owns; a mask alone is not optimised. For other faces of
one condition the last layers lean towards a random code by 0.3 instead of being replaced by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.config import Config
from ec2face_core.data import FaceDataset

from .reading import one_hot
from .style import (
    LAYERS,
    WIDTH,
    Encoder,
    Linear,
    StyleGenerator,
    StyleSystem,
    adam,
    leaky,
    perceptual,
    schedule,
    update,
)
from .system import Faces, seeded, train_stage

MASK_LAYERS = 6  # layers 0-5 take the mask's code, 6-9 the sentence's

FREE_LAYERS, DIVERSITY = 2, 0.3  # the last layers lean towards a random code by this much

BATCH, RATE, MARGIN = 16, 2e-3, 0.2

SHARES = {"visual": 0.45, "mask": 0.45, "text": 0.1}  # of the seconds


class SentenceEncoder(nn.Module):
    """CLIP's sentence features `(b, d)` -> offsets in W+ `(b, LAYERS * WIDTH)`."""

    def __init__(self, features: int, hidden: int = 192) -> None:
        super().__init__()
        self.features = features
        self.layers = nn.ModuleList([Linear(features, hidden), Linear(hidden, hidden)])
        self.head = Linear(hidden, LAYERS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.features**0.5  # unit vectors -> unit variance
        for layer in self.layers:
            x = leaky(layer(x))
        return self.head(x).float()


class TediGAN(StyleSystem):
    """Mask, sentence and picture as codes in one frozen W+.

    Attributes:
        clip_steps: of optimisation at sampling; 0 leaves the encoders' codes as they are.
    """

    name = "TediGAN"

    def __init__(self, config: Config, clip_steps: int = 20) -> None:
        super().__init__(config)
        self.clip_steps = clip_steps
        self.build(config.seed)

    def build(self, seed: int) -> None:
        """Fill `networks` with random weights, a function of the seed."""
        with seeded(seed):
            self.networks["generator"] = StyleGenerator()
            self.networks["mask"] = Encoder(19, LAYERS * WIDTH)
            width = self.clip.text_features([""]).shape[1]
            self.networks["text"] = SentenceEncoder(width)

    def fit(
        self,
        dataset: FaceDataset,
        run_dir: Path,
        seconds: float,
        seed: int = 42,
        max_steps: int = 0,
    ) -> None:
        """Invert faces, then masks, then sentences."""
        self.build(seed)
        self.prepare(run_dir.parent / "shared", max_steps=max_steps)
        faces = Faces.read(dataset)
        with seeded(seed):
            visual = Encoder(3, LAYERS * WIDTH)
        for name, encoder in (("visual", visual), ("mask", self.networks["mask"])):
            self._fit_encoder(name, encoder, faces, run_dir, seconds, seed, max_steps)
        self._fit_text(visual, faces, run_dir, seconds, seed, max_steps)
        self.networks.requires_grad_(False).eval()

    def _fit_encoder(self, name, encoder, faces, run_dir, seconds, seed, max_steps) -> None:
        optimizer = adam(encoder, RATE)

        def step(number: int, done: float, generator: torch.Generator) -> Mapping[str, Tensor]:
            schedule(optimizer, RATE, done)
            x, label_maps, _ = faces.batch(BATCH, generator)
            with torch.autocast("cpu", torch.bfloat16):
                offsets = encoder(x if name == "visual" else one_hot(label_maps))
                picture = self.networks["generator"](self._codes(offsets))
                pixels = F.mse_loss(picture, x)
                likeness = perceptual(self.clip, picture, x).mean()
                loss = pixels + 0.8 * likeness + 0.005 * offsets.square().mean()
                update(optimizer, loss)
            return {"pixels": pixels, "perceptual": likeness}

        state = {"encoder": encoder, "adam": optimizer}
        train_stage(name, step, state, run_dir, SHARES[name] * seconds, seed, max_steps)

    def _fit_text(self, visual, faces, run_dir, seconds, seed, max_steps) -> None:
        encoder = self.networks["text"]
        optimizer = adam(encoder, RATE)

        def step(number: int, done: float, generator: torch.Generator) -> Mapping[str, Tensor]:
            schedule(optimizer, RATE, done)
            x, _, captions = faces.batch(4 * BATCH, generator)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                of_faces = visual(x)
            of_sentences = encoder(self.clip.text_features(captions))
            similarity = F.mse_loss(of_sentences, of_faces)
            ranking = ranking_loss(of_sentences, of_faces, MARGIN)
            update(optimizer, similarity + 0.1 * ranking)
            return {"similarity": similarity, "ranking": ranking}

        state = {"encoder": encoder, "adam": optimizer}
        train_stage("text", step, state, run_dir, SHARES["text"] * seconds, seed, max_steps)

    def _codes(self, offsets: Tensor) -> Tensor:
        """Offsets `(b, LAYERS * WIDTH)` from the mean w -> codes `(b, LAYERS, WIDTH)`."""
        return self.networks["generator"].average + offsets.unflatten(1, (LAYERS, WIDTH))

    @torch.no_grad()
    def codes(
        self,
        prompts: Sequence[str] | None,
        masks: Tensor | None,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Codes `(b, LAYERS, WIDTH)` before optimisation; what is not given is random."""
        random = self.networks["generator"].random_codes(generators)
        codes = random.clone()
        if prompts is not None:
            codes = self._codes(self.networks["text"](self.clip.text_features(prompts)))
        if masks is not None:
            codes[:, :MASK_LAYERS] = self._codes(self.networks["mask"](one_hot(masks)))[
                :, :MASK_LAYERS
            ]
        codes[:, -FREE_LAYERS:].lerp_(random[:, -FREE_LAYERS:], DIVERSITY)
        return codes

    def sample(
        self,
        prompts: Sequence[str] | None,
        masks: Tensor | None,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Images `b 3 64 64` in [0, 1]."""
        codes = self.codes(prompts, masks, generators)
        if prompts is not None and self.clip_steps:
            first = MASK_LAYERS if masks is not None else 0
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
            update(optimizer, (1 - (image * text).sum(1) + 2.0 * away).sum())
        return torch.cat([start[:, :first], free.detach()], 1)


def ranking_loss(sentences: Tensor, faces: Tensor, margin: float) -> Tensor:
    """Pairwise ranking: a face's code is nearer to its sentence than any other face's, by `margin`.

    sentences, faces: codes `(b, d)` in the same order. Hinge on cosines, mean over other faces.
    """
    cosine = F.normalize(sentences, dim=1) @ F.normalize(faces, dim=1).T
    hinge = (margin - cosine.diagonal()[:, None] + cosine).clamp(min=0)
    others = 1 - torch.eye(len(cosine))
    return (hinge * others).sum() / others.sum()
