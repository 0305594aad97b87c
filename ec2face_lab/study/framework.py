"""The facts of Fig. 1, from the loaded modules: their sizes, token counts and example pictures."""

from __future__ import annotations

from typing import Any

import torch

from ec2face_core.attributes import CLASSES
from ec2face_core.config import Config
from ec2face_core.data import open_dataset
from ec2face_core.losses import latent_weights

from ..plots.style import mask_picture, picture
from .long_tail import trained_weights
from .reliability import Estimator, reverse_estimation
from .scores import perception_models


def framework_facts(
    config: Config, name: str, method: str = "both", t: float = 0.3
) -> dict[str, Any]:
    """The content of `plots.diagram.framework_diagram`, taken from the loaded modules.

    Args:
        config: the profile.
        name: a training face, whose pictures are shown.
        method: one of `VARIANTS`.
        t: time of the shown estimate.
    """
    from matplotlib import colormaps

    dataset = open_dataset(config, "train")
    model = Estimator(config, method, dataset)
    models = perception_models(config)
    b = model.backbone
    batch = model.batch([name])
    z = batch["z"]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    _, estimate = reverse_estimation(batch, t, noise, model)

    counts = dataset.label_counts()
    weights = latent_weights(batch["label_map"].cpu(), counts, z.shape[-1], config.loss)[0].log()
    every_weight = trained_weights(counts, config.loss)
    heat = (weights - weights.min()) / (weights.max() - weights.min())
    parts = {
        "text_encoder": b.text_encoder, "text_encoder_2": b.text_encoder_2, "vae": b.vae,
        "transformer": b.transformer, "clip": models.clips["guiding"].model,
        "parser": models.parsers["guiding"].net,
    }  # fmt: skip
    sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    named = b.transformer.named_parameters()
    sizes["lora"] = sum(p.numel() for key, p in named if ".lora_" in key)
    sizes["transformer"] -= sizes["lora"]
    tokens = z.shape[-2] * z.shape[-1] // 4
    return {
        "names": {
            part: getattr(module, "original_name", type(module).__name__)
            for part, module in parts.items()
        },
        "parameters": sizes,
        "tokens": {"text": config.backbone.text_length, "noise": tokens, "mask": tokens},
        "blocks": (b.transformer.config.num_layers, b.transformer.config.num_single_layers),
        "rank": config.lora.rank,
        "loss": config.loss,
        "weights": {
            c: float(w) for c, w, n in zip(CLASSES, every_weight, counts, strict=True) if n
        },
        "t": t,
        "caption": dataset.manifest_caption(name),
        "pictures": {
            "image": picture(batch["image"][0]),
            "mask": mask_picture(batch["label_map"][0]),
            "estimate": picture(estimate[0]),
            "weights": colormaps["magma"](heat.numpy())[..., :3],
        },
    }
