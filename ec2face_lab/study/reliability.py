"""Reverse estimation along t (Fig. 2, notebooks 03 and 04), and the fit of beta(t).

The curves are measured by the guiding parser and CLIP, since it is their output on the estimate
that Eq. 9 uses. Faces are test faces; the noise is the same at every t.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ec2face_core.backbone import decode_latents, encode_images, encode_text, load_backbone
from ec2face_core.config import Config
from ec2face_core.data import FaceDataset, open_dataset
from ec2face_core.flow import interpolate, reverse_estimate
from ec2face_core.io.lora_file import find_mask_lora, load_mask_lora
from ec2face_core.losses import beta
from ec2face_core.mask_branch import mask_latents_of, predict_velocity
from ec2face_core.metrics import mask_counts, psnr
from ec2face_core.runs import content_key

from ..cache import code_digest, data_digest, is_whole, record_hash, write_frame
from ..plots.style import CYCLE, new_figure, styled
from .intervals import bootstrap_accuracy, bootstrap_interval
from .painters import BASE, painter
from .scores import models_digest, perception_models

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


TIMES = tuple(i / 10 for i in range(11))

CODE = (  # modules that decide the curves, besides those that decide pictures and scores
    "ec2face_core.flow",
    "ec2face_lab.study.intervals",
    "ec2face_lab.study.reliability",
)

LABELS = {
    "latent_mse": "latent error (MSE)", "psnr": "PSNR (dB)", "lpips": "LPIPS",
    "OAA": "mask OAA (%)", "clip_similarity": "CLIP similarity",
}  # fmt: skip


class Model(Protocol):
    """A velocity and the decoder of its latents."""

    def velocity(self, z_t: Tensor, t: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Velocity of noisy latents `b c h w` at times `(b,)`, with a batch's conditions."""

    def decode(self, z: Tensor) -> Tensor:
        """Latents `b c h w` -> images `b 3 h w` in [-1, 1]."""


class Estimator:
    """A method's velocity on the faces of a dataset: a variant, or the base on the text alone.

    Args:
        config: backbone, LoRA, and the guidance embedding of training.
        method: one of `VARIANTS`, or `base`.
        dataset: the faces.
    """

    def __init__(self, config: Config, method: str, dataset: FaceDataset) -> None:
        self.config = config
        self.dataset = dataset
        self.masked = method != BASE
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        gc.collect()  # another model of the same notebook may wait for it
        torch.cuda.empty_cache()
        self.backbone = load_backbone(config.backbone)
        for part in (self.backbone.transformer, self.backbone.vae):
            part.to(self.device)
        if self.masked:
            load_mask_lora(self.backbone.transformer, find_mask_lora(config, method))

    @torch.no_grad()
    def batch(self, ids: Sequence[str]) -> dict[str, Any]:
        """z, image, label_map, z_mask and the embedded manifest captions of these faces."""
        maps = torch.stack([self.dataset.label_map(name) for name in ids]).to(self.device)
        image = torch.stack([self.dataset.image(name) for name in ids]).to(self.device)
        captions = [self.dataset.manifest_caption(name) for name in ids]
        encoders = (self.backbone.text_encoder, self.backbone.text_encoder_2)
        for encoder in encoders:
            encoder.to(self.device)
        text = encode_text(self.backbone, captions, self.config.backbone.text_length)
        for encoder in encoders:  # T5 and the transformer's gradient do not fit together
            encoder.to("cpu")
        return {
            "z": encode_images(self.backbone.vae, image),
            "z_mask": mask_latents_of(self.backbone.vae, maps) if self.masked else None,
            "text": text,
            "image": image,
            "label_map": maps,
        }

    def velocity(self, z_t: Tensor, t: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Eq. 4 with the conditions of a batch, `b c h w`; guided as in training."""
        guidance = self.config.backbone.guidance
        return predict_velocity(
            self.backbone.transformer, z_t, t, batch["text"], batch["z_mask"], guidance=guidance
        )

    def decode(self, z: Tensor) -> Tensor:
        """Latents -> images `b 3 h w` in [-1, 1]."""
        return decode_latents(self.backbone.vae, z)


def reliability_file(
    config: Config, name: str, method: str, dataset: FaceDataset, parts: Sequence[Any]
) -> Path:
    """Where curves of a method are kept, named by everything that shapes them.

    Args:
        config: weights, settings and perception models.
        name: of the curves.
        method: one of `VARIANTS`, or `base`.
        dataset: the faces.
        parts: further JSON-ready values that shape the curves.
    """
    model = [painter(config, method).key(), config.backbone.guidance]
    key = content_key([model, data_digest(dataset), models_digest(config), *parts])
    return config.run_dir / "reliability" / f"{name}-{key}.csv"


def reliability_curves(config: Config, method: str, faces: int = 48) -> DataFrame:
    """Fig. 2's curves for a variant, or for the base model (`base`, text alone).

    They are kept in `runs/<profile>/reliability/`.

    Args:
        config: weights, settings and perception models.
        method: one of `VARIANTS`, or `base`.
        faces: how many test faces, the first ones.

    Returns:
        Rows t, metric (latent error (MSE), PSNR (dB), LPIPS, mask OAA (%), CLIP similarity), value,
        ci_low, ci_high, n.
    """
    import pandas as pd

    dataset = open_dataset(config, "test")
    ids = dataset.ids[:faces]
    cache = reliability_file(config, method, method, dataset, [faces, code_digest(CODE)])
    if is_whole(cache):
        return pd.read_csv(cache)
    model = Estimator(config, method, dataset)
    models = perception_models(config)
    curves = reliability(
        (model.batch(ids[i : i + 16]) for i in range(0, len(ids), 16)),
        model,
        lpips=models.lpips,
        parser=models.parsers["guiding"],
        clip=models.clips["guiding"],
        resamples=config.evaluation.bootstrap,
        seed=config.seed,
    )
    curves = curves[curves["metric"].isin(LABELS)]
    curves = curves.assign(metric=curves["metric"].map(LABELS))
    curves = curves.sort_values(["metric", "t"], ignore_index=True)
    write_frame(cache, curves)
    record_hash(cache)
    return curves


def reverse_examples(
    config: Config, method: str, ids: Sequence[str], times: Sequence[float]
) -> Tensor:
    """Decoded reverse estimates of test faces: `faces times 3 h w` in [-1, 1]."""
    model = Estimator(config, method, open_dataset(config, "test"))
    batch = model.batch(ids)
    noise = torch.randn(batch["z"].shape, generator=torch.Generator().manual_seed(config.seed))
    noise = noise.to(batch["z"])
    columns = [reverse_estimation(batch, t, noise, model)[1].cpu() for t in times]
    return torch.stack(columns, 1)


# ------------------------------------------------------------------- reliability along t (Fig. 2)


@torch.no_grad()
def reverse_estimation(
    batch: Mapping[str, Any], t: float, noise: Tensor, model: Model
) -> tuple[Tensor, Tensor]:
    """Noise a batch to time t and step straight back (Eq. 5).

    Args:
        batch: latents `z`, `b c h w`, and the conditions of the model.
        t: in [0, 1].
        noise: of the shape of z.
        model: velocity and decoder.

    Returns:
        z_tilde, the estimated latents, and x_tilde, their image in [-1, 1].
    """
    z = batch["z"]
    times = torch.full((len(z),), t, device=z.device)
    z_t = interpolate(z, noise, times)
    z_tilde = reverse_estimate(z_t, model.velocity(z_t, times, batch), times)
    return z_tilde, model.decode(z_tilde).clamp(-1, 1)


@torch.no_grad()
def reliability(
    batches: Iterable[Mapping[str, Any]],
    model: Model,
    times: Sequence[float] = TIMES,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    parser: Any = None,
    clip: Any = None,
    resamples: int = 1000,
    seed: int = 0,
) -> DataFrame:
    """How good reverse estimation is at each time (Fig. 2).

    Args:
        batches: mappings with `z` (latents `b c h w`), with `image` (`b 3 h w` in [-1, 1]; without
            it the decoded z is the reference) and, for the parser, `label_map` (`b h w`).
        model: velocity and decoder.
        times: in [0, 1].
        lpips: distance of images to references, `(b,)`.
        parser: a `FaceParser`; the label map is its target.
        clip: a `ClipScorer`; compares estimated and real image.
        resamples: of the bootstrap.
        seed: of the noise, which is the same at every time, and of the bootstrap.

    Returns:
        Rows t, metric, value, ci_low, ci_high, n. Metrics: latent_mse, psnr (dB), and as given
        lpips, pixel_accuracy and OAA (percent), clip_similarity (cosine).
    """
    import pandas as pd
    from tqdm.auto import tqdm

    scores: dict[tuple[float, str], list[Tensor]] = {}
    for index, batch in enumerate(tqdm(batches, desc="reliability", leave=False, mininterval=1)):
        z = batch["z"]
        generator = torch.Generator().manual_seed(1_000_003 * seed + index)
        noise = torch.randn(z.shape, generator=generator).to(z)
        reference = batch["image"].to(z) if "image" in batch else model.decode(z).clamp(-1, 1)
        real_features = clip.image_features(reference) if clip else None
        for t in times:
            z_tilde, x_tilde = reverse_estimation(batch, t, noise, model)
            values = {
                "latent_mse": (z_tilde - z).square().flatten(1).mean(1),
                "psnr": psnr(x_tilde, reference),
            }
            if lpips:
                values["lpips"] = lpips(x_tilde, reference)
            if parser:
                target = batch["label_map"].to(z.device)
                values["counts"] = torch.stack(mask_counts(parser.parse(x_tilde), target), 1)
            if clip:
                values["clip_similarity"] = (clip.image_features(x_tilde) * real_features).sum(1)
            for metric, value in values.items():
                scores.setdefault((t, metric), []).append(value.double().cpu())

    rows = []
    for (t, metric), parts in scores.items():
        per_image = torch.cat(parts).numpy()
        if metric != "counts":
            interval = bootstrap_interval(per_image, resamples, seed)
            rows.append({"t": t, "metric": metric, **interval._asdict()})
            continue
        correct = per_image[:, 0]
        support = per_image[:, 1]
        share = bootstrap_interval(100 * correct.sum(1) / support.sum(1), resamples, seed)
        rows.append({"t": t, "metric": "pixel_accuracy", **share._asdict()})
        overall = bootstrap_accuracy(correct, support, None, resamples, seed).iloc[0]
        rows.append({"t": t, **overall.drop("pixels")})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------- beta(t) and the curves


def normalised(curves: DataFrame) -> DataFrame:
    """Reliability curves with value, ci_low and ci_high scaled to [0, 1], metric by metric.

    1 is the reliable end: the best value of a metric that falls with t (PSNR), as of one that rises
    (LPIPS); the direction is taken from the curve's two ends.
    """
    curves = curves.copy()
    for _, rows in curves.groupby("metric"):
        value = rows.sort_values("t")["value"].astype(float)
        falls = value.iloc[0] > value.iloc[-1]
        best = value.max() if falls else value.min()
        worst = value.min() if falls else value.max()
        columns = [name for name in ("value", "ci_low", "ci_high") if name in curves]
        span = best - worst if best != worst else 1.0
        curves.loc[rows.index, columns] = (rows[columns] - worst) / span
    return curves


def describe_curves(curves: DataFrame) -> str:
    """Each metric at both ends, and the t at which it has lost half of its range."""
    scaled = normalised(curves)
    lines = []
    for metric, rows in curves.groupby("metric"):
        first, last = rows.sort_values("t")["value"].iloc[[0, -1]]
        curve = scaled[scaled["metric"] == metric].sort_values("t")
        below = curve.loc[curve["value"] < 0.5, "t"]
        half = f"below half of its range from t = {below.min():g}" if len(below) else "never falls"
        lines.append(f"{metric}: {first:.3g} at t = 0, {last:.3g} at t = 1; {half}")
    return "\n".join(lines)


def suggest_center(curve: DataFrame) -> tuple[float, float]:
    """The beta(t) of Eq. 8 that follows one metric of `reliability`: its (steepness, center)."""
    from scipy.optimize import curve_fit

    if curve["metric"].nunique() != 1 or curve["value"].nunique() < 3:
        raise ValueError(
            "a curve has one metric and three values or more: curves[curves.metric == 'psnr']"
        )
    t, reliable = normalised(curve)[["t", "value"]].to_numpy(dtype=float).T
    (steepness, center), _ = curve_fit(
        _beta_values, t, reliable, p0=(10.0, 0.5), bounds=([0.0, 0.0], [200.0, 1.0])
    )
    return float(steepness), float(center)


def fitted_beta(curves: DataFrame, config: Config) -> DataFrame:
    """The β(t) that follows each reliability curve, below the configured one.

    Rows: source, steepness, center, and strongest_at, the t at which t · β(t) is largest.
    """
    import pandas as pd

    settings = {"configured (Eq. 8)": (config.loss.steepness, config.loss.center)}
    for metric, rows in curves.groupby("metric"):
        if rows["value"].nunique() >= 3:
            settings[f"fitted to {metric}"] = suggest_center(rows)
    t = np.linspace(0, 1, 1001)
    rows = []
    for source, (steepness, center) in settings.items():
        strongest = float(t[(t * _beta_values(t, steepness, center)).argmax()])
        rows.append((source, steepness, center, strongest))
    return pd.DataFrame(rows, columns=["source", "steepness", "center", "strongest_at"])


def _beta_values(t: np.ndarray, steepness: float, center: float) -> np.ndarray:
    return beta(torch.from_numpy(t), float(steepness), float(center)).numpy()


def describe_fits(fits: DataFrame) -> str:
    """From the table of `fitted_beta`: the fitted settings beside those of the training."""
    configured = fits.iloc[0]
    fitted = fits.iloc[1:]
    return (
        f"Fitted centers {fitted['center'].min():.2f} to {fitted['center'].max():.2f} (configured "
        f"{configured['center']:g}), slopes {fitted['steepness'].min():.1f} to "
        f"{fitted['steepness'].max():.1f} (configured {configured['steepness']:g})."
    )


@styled
def gradient_weights(settings: Sequence[tuple[float, float]]) -> Figure:
    """β(t), and t · β(t): the factor of the consistency losses' gradient at v.

    The estimate is z_t - t v, so that its derivative by v is -t.

    settings: pairs (steepness, center), the configured one first.
    """
    t = np.linspace(0, 1, 201)
    fig = new_figure(7.6, 2.7)
    left, right = fig.subplots(1, 2)
    for k, (steepness, center) in enumerate(settings):
        style = {"color": CYCLE[k], "lw": 2.4 if k == 0 else 1.4}
        label = f"$\\gamma_s$ = {steepness:g}, $t_c$ = {center:g}"
        left.plot(t, _beta_values(t, steepness, center), label=label, **style)
        right.plot(t, t * _beta_values(t, steepness, center), **style)
    left.set(title="β(t)", xlabel="t  (0 data, 1 noise)", xlim=(0, 1))
    right.set(title="t · β(t)", xlabel="t  (0 data, 1 noise)", xlim=(0, 1))
    for ax in (left, right):
        ax.grid(axis="y")
    fig.legend(loc="outside upper center", ncols=len(settings))
    return fig
