"""Gradients of the losses at the LoRA: their norms for each t, and their systematic parts.

The norm of the gradient of a training step's mean loss, by term of Eq. 12: flow matching (Eq. 11),
and alpha_1 L_text, alpha_2 L_mask with and without beta(t). Most of a batch's gradient is noise,
which averages out over steps: what moves the LoRA is the systematic part, the norm of the mean
gradient. So the terms are compared by it, too, over batches with the t of training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ec2face_core.config import Config
from ec2face_core.consistency import PixelConsistency, pictures_at_once
from ec2face_core.data import FaceDataset, open_dataset
from ec2face_core.flow import interpolate, reverse_estimate, target_velocity
from ec2face_core.losses import beta, flow_matching_loss, latent_weights
from ec2face_core.perception import ClipScorer, FaceParser

from ..cache import code_digest, is_whole, record_hash, write_frame
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
    return _kept(config, f"gradients-{method}", method, batches, _norms)


def systematic_gradients(config: Config, method: str = "both", batches: int = 24) -> DataFrame:
    """What remains of the gradients in the mean over batches as training draws them.

    Each face of a batch has a t of its own, uniform in [0, 1], and beta(t) as configured. Kept in
    `runs/<profile>/reliability/`.

    Args:
        config: weights, losses and perception models.
        method: one of `VARIANTS`.
        batches: of the profile's batch size.

    Returns:
        Rows loss, batch_norm (root mean square over batches), systematic, ci_low and ci_high:
        `systematic_part`.
    """
    return _kept(config, f"systematic-{method}", method, batches, _systematic)


def _kept(
    config: Config,
    name: str,
    method: str,
    batches: int,
    measure: Callable[[Terms, int], DataFrame],
) -> DataFrame:
    """A table of measurements, from its file if it is kept."""
    import pandas as pd

    dataset = open_dataset(config, "train")
    parts = [batches, config.trainer.batch_size, dataclasses.asdict(config.loss), code_digest(CODE)]
    file = reliability_file(config, name, method, dataset, parts)
    if not is_whole(file):
        write_frame(file, measure(Terms(config, method, dataset), batches))
        record_hash(file)
    return pd.read_csv(file)


class Terms:
    """The terms of Eq. 12 on batches of training faces, and their gradients at the LoRA.

    Args:
        config: weights, losses and perception models.
        method: one of `VARIANTS`.
        dataset: the training faces.
    """

    def __init__(self, config: Config, method: str, dataset: FaceDataset) -> None:
        self.config = config
        self.dataset = dataset
        self.model = Estimator(config, method, dataset)
        self.counts = dataset.label_counts().to(self.model.device)
        parameters = self.model.backbone.transformer.named_parameters()
        self.trainable = [p for name, p in parameters if ".lora_" in name]
        for p in self.trainable:
            p.requires_grad_(True)
        clip = ClipScorer.from_config(config.perception, device=self.model.device)
        parser = FaceParser.from_config(config.perception, device=self.model.device)
        vae = self.model.backbone.vae
        self.consistency = PixelConsistency(vae, clip, parser, config.loss)

    def batch(self, k: int) -> dict[str, Any]:
        """The k-th batch of faces, around the end if need be, and captions, noise and times."""
        size = self.config.trainer.batch_size
        ids = [self.dataset.ids[i % len(self.dataset.ids)] for i in range(k * size, (k + 1) * size)]
        batch = self.model.batch(ids)
        generator = torch.Generator().manual_seed(self.config.seed + k)
        batch["noise"] = torch.randn(batch["z"].shape, generator=generator).to(batch["z"])
        batch["t"] = torch.rand(size, generator=generator).to(batch["z"])
        batch["captions"] = [self.dataset.manifest_caption(name) for name in ids]
        return batch

    def gradients(
        self, batch: dict[str, Any], t: Tensor, modulated: bool = False
    ) -> dict[str, Tensor]:
        """The gradient of each loss's mean over the batch at the LoRA, flat.

        As few faces at once as a GPU of training holds.

        Args:
            batch: of `batch`.
            t: times `(b,)`.
            modulated: with beta(t) of each face before the consistency losses.
        """
        c = self.config.loss
        b = len(t)
        weights = self.weights(batch)
        at_once = pictures_at_once(2 * self.config.data.size**2)  # the transformer's graph is there
        total: dict[str, Tensor] = {}
        for rows in torch.arange(b, device=t.device).split(at_once):
            w = None if weights is None else weights[rows]
            fading = beta(t[rows], c.steepness, c.center) if modulated else torch.ones_like(t[rows])
            for name, loss in self.losses(batch, t, rows, w).items():
                factor = 1.0 if name == FLOW else fading
                gradient = self.gradient((factor * loss).sum() / b, last=name == MASK)
                total[name] = total[name] + gradient if name in total else gradient
        return total

    def weights(self, batch: dict[str, Any]) -> Tensor | None:
        """Eq. 10 of the faces of a batch, `b h w`; None: the variant has none."""
        c = self.config.loss
        if not c.long_tail:
            return None
        return latent_weights(batch["label_map"], self.counts, batch["z"].shape[-1], c)

    def losses(
        self,
        batch: dict[str, Any],
        t: Tensor,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Flow matching, alpha_1 L_text and alpha_2 L_mask without beta, each `(b,)`.

        Args:
            batch: of `batch`.
            t: times of all its faces.
            rows: numbers of the faces whose losses are computed; None: all.
            weights: Eq. 10 of these faces; None: of the batch.
        """
        if rows is None:
            rows = torch.arange(len(t), device=t.device)
            weights = self.weights(batch) if weights is None else weights
        c = self.config.loss
        z = batch["z"][rows]
        noise = batch["noise"][rows]
        t = t[rows]
        part = {name: batch[name][rows] for name in ("text", "z_mask")}
        z_t = interpolate(z, noise, t)
        v = self.model.velocity(z_t, t, part)
        flow = flow_matching_loss(v, target_velocity(z, noise), weights)
        z_hat = reverse_estimate(z_t, v, t)
        captions = [batch["captions"][i] for i in rows.tolist()]
        text, mask = self.consistency.losses(z_hat, captions, batch["label_map"][rows])
        return {FLOW: flow, TEXT: c.alpha_text * text, MASK: c.alpha_mask * mask}

    def gradient(self, loss: Tensor, last: bool) -> Tensor:
        """The gradient of a scalar at the LoRA, flat; `last`: the graph is needed no more."""
        parts = torch.autograd.grad(loss, self.trainable, retain_graph=not last)
        return torch.cat([part.flatten() for part in parts])


def _norms(terms: Terms, batches: int) -> DataFrame:
    """The rows of `gradient_norms`."""
    import pandas as pd

    c = terms.config.loss
    rows = []
    for k in range(batches):
        batch = terms.batch(k)
        for time in TIMES:
            t = torch.full_like(batch["t"], time)
            modulation = float(beta(t[:1], c.steepness, c.center))
            for name, gradient in terms.gradients(batch, t).items():
                norm = float(gradient.norm())
                row = {"t": time, "loss": name, "modulated": False, "norm": norm}
                rows.append(row)
                if name != FLOW:
                    rows.append(row | {"modulated": True, "norm": modulation * norm})
    return pd.DataFrame(rows).groupby(["t", "loss", "modulated"], as_index=False).mean()


def _systematic(terms: Terms, batches: int) -> DataFrame:
    """The rows of `systematic_gradients`."""
    import pandas as pd

    gradients: dict[str, list[Tensor]] = {name: [] for name in (FLOW, TEXT, MASK)}
    for k in range(batches):
        batch = terms.batch(k)
        for name, gradient in terms.gradients(batch, batch["t"], modulated=True).items():
            gradients[name].append(gradient.cpu())
    rows = [{"loss": name, **systematic_part(torch.stack(x))} for name, x in gradients.items()]
    return pd.DataFrame(rows)


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
    """The norm of each term's gradient, in one batch of training and in the mean of batches."""
    rows = table.set_index("loss")
    lines = []
    for name in (FLOW, TEXT, MASK):
        row = rows.loc[name]
        lines.append(
            f"{name}{'' if name == FLOW else ', with β(t)'}: {row['batch_norm']:.2g} in one batch, "
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
    ax.set(
        xlabel="t  (0 data, 1 noise)", ylabel="norm of the LoRA's gradient, one batch", yscale="log"
    )
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
