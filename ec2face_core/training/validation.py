"""Fixed faces that are drawn while training (`trainer.validate_every`), their sheet and scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..attributes import palette_image
from ..backbone import Backbone
from ..config import Config
from ..data import open_dataset
from ..latents import EMPTY, LatentCache
from ..metrics import mask_accuracy
from ..perception import ClipScorer, FaceParser
from ..runs import whole_file

if TYPE_CHECKING:
    pass


class ValidationFaces:
    """Faces of the validation split (of the test split where a profile has none).

    Every rank draws some of them, by the sampler of the profile and with noise of their own.

    Args:
        config: data, sampling, perception and trainer.validation_faces are used.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        dataset = open_dataset(config, "validation" if config.data.validation else "test")
        count = min(config.trainer.validation_faces, len(dataset))
        ids = [dataset.ids[k * len(dataset) // count] for k in range(count)]
        self.captions = [dataset.manifest_caption(name) for name in ids]
        self.masks = torch.stack([dataset.label_map(name) for name in ids])

    def open(  # noqa: D417
        self,
        backbone: Backbone,
        cache: LatentCache,
        device: torch.device,
        clip: ClipScorer | None = None,
        parser: FaceParser | None = None,
    ) -> None:
        """Take the parts that draw and score.

        Args:
            backbone: vae, scheduler, and the transformer that is trained.
            cache: holds the embeddings of `captions` and of the empty one.
            device: where it is drawn.
            clip, parser: the guides of training, if it has them.
        """
        from ..pipeline import EC2FacePipeline

        s = self.config.sampling
        self.pipe = EC2FacePipeline(
            **backbone.components(),
            text_length=self.config.backbone.text_length,
            image_size=self.config.data.size,
            guidance=s.guidance,
            text_guidance=s.text_guidance,
            mask_guidance=s.mask_guidance,
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.text = cache.text(self.captions).to(device)
        self.null = cache.text([EMPTY]).to(device)
        self.clip = clip or ClipScorer.from_config(self.config.perception, device=device)
        self.parser = parser or FaceParser.from_config(self.config.perception, device=device)
        self.device = device

    @torch.no_grad()
    def draw(self, accelerator: Any, path: Path) -> dict[str, float]:
        """Draw the faces, write their sheet, and score them; every rank has to call it.

        Args:
            accelerator: of the ranks.
            path: of the sheet, a PNG; masks above pictures.

        Returns:
            validation_text (cosine, in percent), validation_recall and validation_f1 (means over
            the classes of these masks, in percent), by the guides of training.
        """
        from accelerate.utils import gather_object

        rank, ranks = accelerator.process_index, accelerator.num_processes
        count = len(self.captions)
        # equally many on each rank: those of a sharded base run together
        mine = [k % count for k in range(rank, -(-count // ranks) * ranks, ranks)]
        images = dict(gather_object([(k, self._picture(k).cpu()) for k in mine]))
        if not accelerator.is_main_process:
            return {}
        pictures = torch.cat([images[k] for k in range(count)])
        self._save(pictures, path)
        given = (2 * pictures - 1).to(self.device)
        accuracy = mask_accuracy(self.parser.parse(given).cpu(), self.masks)
        text = self.clip.score(given, self.captions).mean()
        f1 = accuracy.f1[accuracy.support > 0].mean()
        return {
            "validation_text": float(text),
            "validation_recall": float(accuracy.OAA),
            "validation_f1": float(f1),
        }

    def _picture(self, k: int) -> Tensor:
        (images,) = self.pipe(
            mask=self.masks[k],
            num_inference_steps=self.config.sampling.steps,
            generator=torch.Generator().manual_seed(self.config.sampling.seed + k),
            output_type="pt",
            prompt_embeds=self.text.tokens[k : k + 1],
            pooled_prompt_embeds=self.text.pooled[k : k + 1],
            negative_prompt_embeds=self.null.tokens,
            negative_pooled_prompt_embeds=self.null.pooled,
            return_dict=False,
        )
        return images.float()

    def _save(self, pictures: Tensor, path: Path) -> None:
        colours = (palette_image(self.masks) + 1) / 2
        sheet = torch.cat([torch.cat([*colours], dim=2), torch.cat([*pictures], dim=2)], dim=1)
        pixels = (sheet.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        info = PngInfo()
        info.add_itxt("Source", "synthetic faces by EC2Face while it was trained")
        with whole_file(path) as part:
            Image.fromarray(pixels).save(part, "PNG", pnginfo=info)
