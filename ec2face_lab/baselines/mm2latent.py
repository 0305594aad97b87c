"""MM2Latent (Meng et al., ECCV 2024 workshops; arXiv 2409.11010): mask and text -> w in one pass.

A mapping network is trained on pictures of the frozen generator only: w is known, a parser gives
the mask, and the embedding of the picture with Gaussian noise replaces that of a text. Sampling
uses the embedding of the sentence. So the system is trained without captions.

Simplified: written after the abstract, as there is no official code; CLIP for FaRL. Added:
`Centre`, with the mean feature of 512 captions. A missing mask is a code of zeros (as in 15 % of
the training samples), a missing text the embedding of a random face.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec2face_core.attributes import one_hot
from ec2face_core.config import Config
from ec2face_core.perception import FaceParser

from ..world.training import descend, seeded, set_learning_rates
from .encoders import Centre
from .style import (
    WIDTH,
    Conv,
    Encoder,
    Linear,
    StyleGenerator,
    StyleSystem,
    adam,
    doublings,
    leaky,
    perceptual,
    upsample,
)
from .system import Faces, Generators, Masks, Run, Texts

CODE = 128  # of a mask

NOISE = 0.5  # length of the noise that makes an image embedding a pseudo text

NO_MASK = 0.15  # of the training samples

CENTRED = 512  # faces and captions that the means are taken of

BATCH = 16

LR = 2e-3

SHARES = {"masks": 0.2, "mapping": 0.8}  # of the seconds


class MaskDecoder(nn.Module):
    """Codes `(b, CODE)` -> class logits `b 19 size size`; only training needs it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.stem = Linear(CODE, 64 * 64)
        widths = [64, 64, 48, *[48] * doublings(size)]
        self.convs = nn.ModuleList(Conv(a, b) for a, b in pairwise(widths))
        self.head = Conv(48, 4 * 19, act=False)

    def forward(self, code: Tensor) -> Tensor:
        """Logits `b 19 size size`."""
        x = leaky(self.stem(code)).unflatten(1, (64, 8, 8))
        for conv in self.convs:
            x = upsample(conv(x))
        return F.pixel_shuffle(self.head(x).float(), 2)


class ToLatent(nn.Module):
    """Mask code and text code -> w `(b, WIDTH)`."""

    def __init__(self, features: int, hidden: int = 256) -> None:
        super().__init__()
        sizes = [CODE + features, hidden, hidden, hidden, hidden]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))
        self.head = Linear(hidden, WIDTH)

    def forward(self, mask: Tensor, text: Tensor) -> Tensor:
        """Offset of w from the mean, `(b, WIDTH)`."""
        x = torch.cat([mask, text * text.shape[1] ** 0.5], 1)
        for layer in self.layers:
            x = leaky(layer(x))
        return self.head(x).float()


class MM2Latent(StyleSystem):
    """One forward pass from mask and text to w."""

    name = "MM2Latent"

    def __init__(self, config: Config, device: torch.device | str | None = None) -> None:
        super().__init__(config, device)
        self.parser = FaceParser.from_config(config.perception, device=self.device)
        self.build(config.seed)

    def build(self, seed: int) -> None:
        """Fill `networks` with random weights, a function of the seed."""
        with seeded(seed):
            self.networks["generator"] = StyleGenerator(self.size)
            self.networks["mask"] = Encoder(self.size, 19, CODE)
            width = self.clip.text_features([""]).shape[1]
            self.networks["mapping"] = ToLatent(width)
        self.networks["centre"] = Centre(width)
        self.networks.to(self.device)

    def train(self, faces: Faces, run: Run) -> None:
        """Code masks, then map codes to w."""
        self._centre(faces)
        self._train_masks(faces, run)
        self._train_mapping(run)

    @torch.no_grad()
    def _centre(self, faces: Faces) -> None:
        """Mean features of generated faces and of first captions."""
        generators = [torch.Generator().manual_seed(i) for i in range(CENTRED)]
        codes = self.networks["generator"].random_codes(generators, truncation=1.0)
        images = [self.clip.image_features(self._picture(c)).mean(0) for c in codes.split(64)]
        texts = self.clip.text_features([captions[0] for captions in faces.captions[:CENTRED]])
        self.networks["centre"].picture.copy_(torch.stack(images).mean(0))
        self.networks["centre"].sentence.copy_(texts.mean(0))

    def _train_masks(self, faces: Faces, run: Run) -> None:
        encoder = self.networks["mask"]
        with seeded(run.seed):
            decoder = MaskDecoder(self.size).to(self.device)
        optimizer = adam(nn.ModuleList([encoder, decoder]), LR)

        def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
            set_learning_rates(optimizer, progress)
            _, label_maps, _ = faces.batch(BATCH, generator)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = F.cross_entropy(decoder(self.mask_codes(label_maps)), label_maps)
                descend(optimizer, loss)
            return {"cross_entropy": loss}

        state = {"encoder": encoder, "decoder": decoder, "adam": optimizer}
        run.stage("masks", step, state, SHARES["masks"])
        encoder.requires_grad_(False)

    def _train_mapping(self, run: Run) -> None:
        net = self.networks["mapping"]
        style = self.networks["generator"]
        optimizer = adam(net, LR)

        def step(number: int, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
            set_learning_rates(optimizer, progress)
            with torch.autocast(self.device.type, torch.bfloat16):
                with torch.no_grad():
                    z = torch.randn(BATCH, WIDTH, generator=generator, device=self.device)
                    w = style.map(z)
                    picture = self._picture(style.everywhere(w))
                    mask = self.mask_codes(self.parser.parse(picture))
                    u = torch.rand(BATCH, 1, generator=generator, device=self.device)
                    mask = mask * (u >= NO_MASK)
                    text = self.pseudo_text(picture, generator)
                predicted = style.average + net(mask, text)
                mapped = style(style.everywhere(predicted))
                likeness = perceptual(self.clip, mapped, picture).mean()
                descend(optimizer, mapping_loss(predicted, w) + 0.1 * likeness)
            return {"absolute": (predicted - w).abs().mean(), "perceptual": likeness}

        run.stage("mapping", step, {"mapping": net, "adam": optimizer}, SHARES["mapping"])

    def mask_codes(self, label_maps: Tensor) -> Tensor:
        """Label maps `b h w` -> codes `(b, CODE)` of zero mean and unit variance."""
        return F.layer_norm(self.networks["mask"](one_hot(label_maps)), (CODE,))

    def pseudo_text(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Unit embeddings of images [-1, 1], centred, with noise: replaces a sentence."""
        text = self.networks["centre"](self.clip.image_features(images), "picture")
        noise = torch.randn(text.shape, generator=generator, device=generator.device)
        noise = noise.to(text.device) / text.shape[1] ** 0.5
        return F.normalize(text + NOISE * noise, dim=1)

    def _picture(self, codes: Tensor) -> Tensor:
        return self.networks["generator"](codes).clamp(-1, 1)

    def sample(self, prompts: Texts, masks: Masks, generators: Generators) -> Tensor:
        """Images `b 3 h w` in [0, 1]; no noise is added to the embedding of a given text."""
        net = self.networks["mapping"]
        style = self.networks["generator"]
        if prompts is None:
            faces = self._picture(style.random_codes(generators))
            text = torch.cat(
                [self.pseudo_text(x[None], g) for x, g in zip(faces, generators, strict=True)]
            )
        else:
            text = self.networks["centre"](self.clip.text_features(prompts), "sentence")
        no_mask = torch.zeros(len(text), CODE, device=self.device)
        mask = no_mask if masks is None else self.mask_codes(masks)
        w = style.average + net(mask, text)
        return self._picture(style.everywhere(w)) / 2 + 0.5


def mapping_loss(predicted: Tensor, w: Tensor) -> Tensor:
    """Absolute error and cosine distance between predicted and true w, `(b, d)` -> scalar."""
    cosine = F.cosine_similarity(predicted, w, dim=1)
    return (predicted - w).abs().mean() + (1 - cosine).mean()
