"""Gradient norms of the losses at the LoRA for each t: which loss influences training, and when.

The norm of the gradient of a training step's mean loss, by term of Eq. 12: flow matching (Eq. 11),
and alpha_1 L_text, alpha_2 L_mask with and without beta(t). A term whose gradient is far smaller
than flow matching's at every t changes little, whatever it measures.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ec2face_core.config import Config
from ec2face_core.consistency import PixelConsistency
from ec2face_core.data import open_dataset
from ec2face_core.flow import interpolate, reverse_estimate, target_velocity
from ec2face_core.losses import beta, flow_matching_loss, latent_weights
from ec2face_core.perception import ClipScorer, FaceParser

from ..cache import code_digest, write_frame
from ..plots.style import BLUE, GREEN, ORANGE, new_figure, styled
from .reliability import TIMES, Estimator, reliability_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


FLOW = "flow matching (Eq. 11)"
TEXT = "text consistency"
MASK = "mask consistency"

CODE = ("ec2face_lab.study.gradients", "ec2face_core.consistency", "ec2face_core.losses")


def gradient_norms(config: Config, method: str = "both", batches: int = 2) -> DataFrame:
    """Gradient norms over the LoRA of a variant, on batches of training faces.

    Every batch has the profile's batch size and one t. Kept in `runs/<profile>/reliability/`.

    Args:
        config: weights, losses and perception models.
        method: one of `VARIANTS`.
        batches: over which the norms are averaged.

    Returns:
        Rows t, loss (`FLOW`, `TEXT`, `MASK`), modulated (with beta(t)?), norm (mean of batches).
    """
    import pandas as pd

    dataset = open_dataset(config, "train")
    size = config.trainer.batch_size
    c = config.loss
    parts = [batches, size, dataclasses.asdict(c), code_digest(CODE)]
    cache = reliability_file(config, f"gradients-{method}", method, dataset, parts)
    if cache.is_file():
        return pd.read_csv(cache)
    model = Estimator(config, method, dataset)
    counts = dataset.label_counts()
    trainable = [p for n, p in model.backbone.transformer.named_parameters() if ".lora_" in n]
    clip = ClipScorer.from_config(config.perception, device=model.device)
    parser = FaceParser.from_config(config.perception, device=model.device)
    consistency = PixelConsistency(model.backbone.vae, clip, parser, c)
    rows = []
    for p in trainable:
        p.requires_grad_(True)
    for k in range(batches):
        ids = dataset.ids[k * size : (k + 1) * size]
        batch = model.batch(ids)
        captions = [dataset.manifest_caption(name) for name in ids]
        z = batch["z"]
        maps = batch["label_map"]
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(config.seed + k))
        noise = noise.to(z)
        weights = None
        if c.long_tail:
            weights = latent_weights(maps, counts.to(maps.device), z.shape[-1], c)
        for time in TIMES:
            t = torch.full((len(ids),), time, device=z.device)
            z_t = interpolate(z, noise, t)
            v = model.velocity(z_t, t, batch)
            flow = flow_matching_loss(v, target_velocity(z, noise), weights).mean()
            text, mask = consistency.losses(reverse_estimate(z_t, v, t), captions, maps)
            modulation = float(beta(t[:1], c.steepness, c.center))
            terms = {FLOW: flow, TEXT: c.alpha_text * text.mean(), MASK: c.alpha_mask * mask.mean()}
            for name, loss in terms.items():
                norm = _norm(torch.autograd.grad(loss, trainable, retain_graph=name != MASK))
                row = {"t": time, "loss": name, "modulated": False, "norm": norm}
                rows.append(row)
                if name != FLOW:
                    rows.append(row | {"modulated": True, "norm": modulation * norm})
    table = pd.DataFrame(rows).groupby(["t", "loss", "modulated"], as_index=False).mean()
    write_frame(cache, table)
    return table


def _norm(gradients: tuple[Tensor, ...]) -> float:
    return float(torch.stack([g.norm() for g in gradients]).norm())


def describe_gradients(table: DataFrame) -> str:
    """The largest gradient of each consistency loss relative to flow matching's, and its t."""
    flow = table[table["loss"] == FLOW].set_index("t")["norm"]
    lines = []
    for name in (TEXT, MASK):
        for modulated, label in ((True, "with β(t)"), (False, "β ≡ 1")):
            rows = table[(table["loss"] == name) & (table["modulated"] == modulated)]
            share = rows.set_index("t")["norm"] / flow
            lines.append(
                f"{name}, {label}: at most {100 * share.max():.0f} % of flow matching's gradient, "
                f"at t = {share.idxmax():.1f}"
            )
    return "\n".join(lines)


@styled
def gradient_figure(table: DataFrame) -> Figure:
    """Gradient norms against t, on a logarithmic scale; dashed: without beta(t)."""
    fig = new_figure(6.4, 3.2)
    ax = fig.subplots()
    for name, colour in ((FLOW, BLUE), (TEXT, ORANGE), (MASK, GREEN)):
        for modulated in (False, True):
            rows = table[(table["loss"] == name) & (table["modulated"] == modulated)]
            rows = rows[rows["norm"] > 0]
            if rows.empty:
                continue
            dashed = name != FLOW and not modulated
            label = f"{name}, β ≡ 1" if dashed else name if name == FLOW else f"{name}, with β(t)"
            ax.plot(rows["t"], rows["norm"], color=colour, ls="--" if dashed else "-", label=label)
    ax.set(xlabel="t  (0 data, 1 noise)", ylabel="gradient norm", yscale="log")
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.grid(axis="y")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def describe_gradient_factor(fits: DataFrame) -> str:
    """From the table of `reliability.fitted_beta`: where t beta(t) is largest."""
    configured = fits.iloc[0]
    fitted = fits.iloc[1:]
    return (
        f"t · β(t) is largest at t = {configured['strongest_at']:.2f} as configured, at "
        f"{fitted['strongest_at'].min():.2f} to {fitted['strongest_at'].max():.2f} with the fits."
    )
