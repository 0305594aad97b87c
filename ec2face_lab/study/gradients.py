"""Gradients of the losses at the LoRA: their norms for each t, and their systematic parts.

The norm of the gradient of a training step's mean loss, by term of Eq. 12: flow matching (Eq. 11),
and alpha_1 L_text, alpha_2 L_mask with and without beta(t). Most of a batch's gradient is noise,
which averages out over steps: what moves the LoRA is the systematic part, the norm of the mean
gradient. So the terms are compared by it, too, over all t and many batches.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ec2face_core.config import Config
from ec2face_core.consistency import PixelConsistency
from ec2face_core.data import FaceDataset, open_dataset
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

BATCHES = 16  # over which gradients are averaged

CODE = ("ec2face_lab.study.gradients", "ec2face_core.consistency", "ec2face_core.losses")


def gradient_norms(config: Config, method: str = "both", batches: int = BATCHES) -> DataFrame:
    """Gradient norms over the LoRA of a variant, on batches of training faces.

    Every batch has the profile's batch size and one t. Kept in `runs/<profile>/reliability/`.

    Args:
        config: weights, losses and perception models.
        method: one of `VARIANTS`.
        batches: over which the norms are averaged.

    Returns:
        Rows t, loss (`FLOW`, `TEXT`, `MASK`), modulated (with beta(t)?), norm (mean of batches).
    """
    return _kept(config, method, batches)[0]


def systematic_gradients(config: Config, method: str = "both", batches: int = BATCHES) -> DataFrame:
    """What remains of the gradients in the mean over batches; t is uniform over `TIMES`.

    Arguments as for `gradient_norms`, with which the measurement is shared.

    Returns:
        Rows loss, modulated, batch_norm (root mean square over batches), systematic, ci_low and
        ci_high: `systematic_part`.
    """
    return _kept(config, method, batches)[1]


def _kept(config: Config, method: str, batches: int) -> tuple[DataFrame, DataFrame]:
    """The norms and the systematic parts; measured if they are not kept."""
    import pandas as pd

    dataset = open_dataset(config, "train")
    parts = [batches, config.trainer.batch_size, dataclasses.asdict(config.loss), code_digest(CODE)]
    names = (f"gradients-{method}", f"systematic-{method}")
    files = [reliability_file(config, name, method, dataset, parts) for name in names]
    if not all(file.is_file() for file in files):
        for file, table in zip(files, _measure(config, method, dataset, batches), strict=True):
            write_frame(file, table)
    norms, systematic = (pd.read_csv(file) for file in files)
    return norms, systematic


def _measure(
    config: Config, method: str, dataset: FaceDataset, batches: int
) -> tuple[DataFrame, DataFrame]:
    import pandas as pd

    size = config.trainer.batch_size
    c = config.loss
    model = Estimator(config, method, dataset)
    counts = dataset.label_counts()
    trainable = [p for n, p in model.backbone.transformer.named_parameters() if ".lora_" in n]
    clip = ClipScorer.from_config(config.perception, device=model.device)
    parser = FaceParser.from_config(config.perception, device=model.device)
    consistency = PixelConsistency(model.backbone.vae, clip, parser, c)
    rows = []
    gradients: dict[tuple[str, bool], list[Tensor]] = {}  # of each batch, the mean over t
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
        means = {}  # of this batch, over t
        for time in TIMES:
            t = torch.full((len(ids),), time, device=z.device)
            z_t = interpolate(z, noise, t)
            v = model.velocity(z_t, t, batch)
            flow = flow_matching_loss(v, target_velocity(z, noise), weights).mean()
            text, mask = consistency.losses(reverse_estimate(z_t, v, t), captions, maps)
            modulation = float(beta(t[:1], c.steepness, c.center))
            terms = {FLOW: flow, TEXT: c.alpha_text * text.mean(), MASK: c.alpha_mask * mask.mean()}
            for name, loss in terms.items():
                parts = torch.autograd.grad(loss, trainable, retain_graph=name != MASK)
                gradient = torch.cat([part.flatten() for part in parts])
                for modulated in (False,) if name == FLOW else (False, True):
                    factor = modulation if modulated else 1.0
                    row = {"t": time, "loss": name, "modulated": modulated}
                    rows.append(row | {"norm": factor * float(gradient.norm())})
                    share = factor * gradient / len(TIMES)
                    means[name, modulated] = means.get((name, modulated), 0) + share
        for key, mean in means.items():
            gradients.setdefault(key, []).append(mean.cpu())
    norms = pd.DataFrame(rows).groupby(["t", "loss", "modulated"], as_index=False).mean()
    systematic = [
        {"loss": name, "modulated": modulated, **systematic_part(torch.stack(parts))}
        for (name, modulated), parts in gradients.items()
    ]
    return norms, pd.DataFrame(systematic)


def systematic_part(gradients: Tensor) -> dict[str, float]:
    """The norm of the mean of a random gradient, from n independent draws `(n, parameters)`.

    Its square is the mean product of different draws, to which noise adds nothing in expectation.
    The bounds are those of the square, two standard errors (jackknife) away; a negative square
    counts as 0.

    Returns:
        batch_norm (root mean square of the draws' norms), systematic, ci_low, ci_high; the last
        three are NaN for fewer than three draws.
    """
    products = (gradients @ gradients.T).double().numpy()
    n = len(products)
    result = {"batch_norm": float(np.sqrt(np.trace(products) / n))}
    if n < 3:
        return result | dict.fromkeys(("systematic", "ci_low", "ci_high"), np.nan)
    np.fill_diagonal(products, 0)
    square = products.sum() / (n * (n - 1))
    without = (products.sum() - 2 * products.sum(1)) / ((n - 1) * (n - 2))
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    squares = np.array([square, square - 2 * error, square + 2 * error])
    values = np.sqrt(squares.clip(min=0)).tolist()
    return result | dict(zip(("systematic", "ci_low", "ci_high"), values, strict=True))


def describe_systematic(table: DataFrame) -> str:
    """The norm of each term's gradient over all t, in one batch and in the mean."""
    rows = table.set_index(["loss", "modulated"])
    lines = []
    for name, modulated in ((FLOW, False), (TEXT, True), (MASK, True)):
        row = rows.loc[name, modulated]
        lines.append(
            f"{name}{', with β(t)' if modulated else ''}: {row['batch_norm']:.2g} in one batch, "
            f"of which {row['systematic']:.2g} [{row['ci_low']:.2g}, {row['ci_high']:.2g}] is "
            "systematic"
        )
    return "\n".join([*lines, "The rest is noise, which averages out over steps."])


def describe_gradients(table: DataFrame) -> str:
    """The largest batch gradient of each consistency loss relative to flow matching's, its t."""
    flow = table[table["loss"] == FLOW].set_index("t")["norm"]
    lines = []
    for name in (TEXT, MASK):
        for modulated, label in ((True, "with β(t)"), (False, "β ≡ 1")):
            rows = table[(table["loss"] == name) & (table["modulated"] == modulated)]
            share = rows.set_index("t")["norm"] / flow
            lines.append(
                f"{name}, {label}: at most {100 * share.max():.0f} % of the norm of flow "
                f"matching's gradient in a batch, at t = {share.idxmax():.1f}"
            )
    return "\n".join(lines)


@styled
def gradient_figure(table: DataFrame) -> Figure:
    """Norms of a batch's gradients against t, on a logarithmic scale; dashed: without beta(t)."""
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
    ax.set(xlabel="t  (0 data, 1 noise)", ylabel="gradient norm of a batch", yscale="log")
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
