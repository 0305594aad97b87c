"""What the tables measure: mask accuracy, LPIPS, NIQE and PSNR (the CLIP score is `ClipScorer`).

Mask accuracy of a class = its correct pixels / its pixels, pooled over the test set. OAA is the
unweighted mean over the classes that occur, HFA, NFA and RFA the same within a group: this is what
the numbers of Tables 1-4 satisfy. Metrics are computed without gradients; images are `b 3 h w` in
[-1, 1] and scores `(b,)`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attributes import CLASSES, pixel_counts
from .config import Config, ConfigError
from .statistics import group_means, psnr

__all__ = [
    "Lpips", "MaskAccuracy", "Niqe", "accuracy_from_counts", "mask_accuracy", "mask_counts", "psnr",
]  # fmt: skip


@dataclass(frozen=True)
class MaskAccuracy:
    """Accuracies in percent; NaN where a class, or every class of a group, has no pixel.

    per_class: `(19,)` float64 in id order. support: `(19,)` int64, pixels of each class.
    """

    per_class: Tensor
    support: Tensor
    OAA: float
    HFA: float
    NFA: float
    RFA: float

    def as_dict(self) -> dict[str, float]:
        """OAA, HFA, NFA and RFA, then the 19 classes by name."""
        groups = {name: getattr(self, name) for name in ("OAA", "HFA", "NFA", "RFA")}
        return groups | dict(zip(CLASSES, self.per_class.tolist(), strict=True))


def mask_counts(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Correct pixels and pixels of each class in each image; their sums pool over a test set.

    Args:
        predicted: label maps parsed from the images, `b h w` int64.
        target: the mask conditions, of the same shape.

    Returns:
        correct, support: `(b, 19)` int64.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"label maps {tuple(predicted.shape)} and {tuple(target.shape)} differ")
    return pixel_counts(target, where=predicted == target), pixel_counts(target)


def accuracy_from_counts(correct: Tensor, support: Tensor) -> MaskAccuracy:
    """Pool the counts of `mask_counts`, `(..., 19)`, over all leading dimensions, then divide."""
    correct, support = correct.reshape(-1, len(CLASSES)), support.reshape(-1, len(CLASSES))
    support = support.sum(0)
    per_class = 100 * correct.sum(0).double() / support
    groups = {name: float(mean) for name, mean in group_means(per_class.cpu().numpy()).items()}
    return MaskAccuracy(per_class, support, **groups)


def mask_accuracy(predicted: Tensor, target: Tensor) -> MaskAccuracy:
    """Mask accuracy pooled over everything given; label maps `b h w` (or `h w`) int64."""
    return accuracy_from_counts(*mask_counts(predicted.flatten()[None], target.flatten()[None]))


class Lpips:
    """LPIPS with AlexNet, calibrated heads included in the package.

    `evaluation.lpips: alex` uses the trunk trained on ImageNet. `alex-random` draws the trunk's
    weights from a fixed seed, for places where the trained ones cannot be had: its values rank
    distortions but are not comparable with published ones.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        name = config.evaluation.lpips
        if name not in ("alex", "alex-random"):
            raise ConfigError(f"evaluation.lpips: {name!r} is none of alex, alex-random")
        import lpips

        generator = torch.default_generator  # torchvision's initialisers know no other
        state = generator.get_state()
        try:
            generator.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lpips calls torchvision in an old manner
                self.net = lpips.LPIPS(net="alex", pnet_rand=name == "alex-random", verbose=False)
        except OSError as error:
            raise RuntimeError(
                "evaluation.lpips: the trunk 'alex' needs torchvision's AlexNet weights "
                "(alexnet-owt-7be5be79.pth in $TORCH_HOME/hub/checkpoints); put the file there, "
                "or choose 'alex-random'"
            ) from error
        finally:
            generator.set_state(state)
        self.net.requires_grad_(False).to(device)
        self.device = device

    @torch.no_grad()
    def score(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance of each image to its reference, `(b,)`; at least 31 px wide and high."""
        return self.net(images.to(self.device), references.to(self.device)).flatten()

    __call__ = score


class Niqe:
    """NIQE: how far the statistics of an image's blocks are from those of pristine images.

    The published model has blocks of 96 px and wants images of 192 px or more. For others, say the
    miniature's 64 px, `fit` takes the statistics from pristine images at `evaluation.niqe_block`
    px: the same formula, on a scale of its own, to be labelled so and never set beside published
    values. Features are pyiqa's; double precision, on the CPU.
    """

    def __init__(self, config: Config, pristine: Tensor | None = None):
        """Fit to pristine images `n 3 h w` if given, else load the published model.

        With `evaluation.niqe_refit` and no pristine images, `fit` has to be called before `score`.
        """
        self.block = config.evaluation.niqe_block
        self.mean: Tensor | None = None
        self.covariance: Tensor | None = None
        if pristine is not None:
            self.fit(pristine)
        elif not config.evaluation.niqe_refit:
            self._load_published()

    def fit(self, images: Tensor) -> Niqe:
        """Take the pristine model from the sharp blocks of `n 3 h w` images (n of 100 or more)."""
        rows = []
        for chunk in images.split(64):
            y = self._luminance(chunk)
            features, sharpness = self._features(y), self._sharpness(y)
            sharp = sharpness > 0.75 * sharpness.amax(1, keepdim=True)
            rows.append(features[sharp & features.isfinite().all(-1)])
        pristine = torch.cat(rows)
        if len(pristine) <= pristine.shape[1]:
            raise ValueError(
                f"NIQE: {len(pristine)} sharp blocks cannot give a covariance of "
                f"{pristine.shape[1]} features; fit to more images"
            )
        self.mean, self.covariance = pristine.mean(0), pristine.T.cov()
        return self

    def score(self, images: Tensor) -> Tensor:
        """NIQE of each image, `(b,)` float64, lower is better; NaN where no block has structure."""
        if self.mean is None:
            raise RuntimeError("NIQE has no pristine model yet: call fit(training images) first")
        luminance = (self._luminance(chunk) for chunk in images.split(64))
        return torch.cat([self._distance(self._features(y)) for y in luminance])

    __call__ = score

    def _distance(self, features: Tensor) -> Tensor:
        """Eq. 10 of Mittal et al. (2012) for block features `b n 36`."""
        usable = features.isfinite().all(-1, keepdim=True)
        count = usable.sum(1)
        features = features.where(usable, 0)
        mean = features.sum(1) / count.clamp(min=1)
        centred = (features - mean[:, None]) * usable
        covariance = centred.mT @ centred / (count - 1).clamp(min=1)[..., None]

        difference = (mean - self.mean)[:, None]
        inverse = torch.linalg.pinv((self.covariance + covariance) / 2)
        distance = (difference @ inverse @ difference.mT).flatten().clamp(min=0).sqrt()
        return distance.where(count[:, 0] > 0, torch.nan)

    def _luminance(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] -> luminance `b 1 h w` in whole numbers 0-255, cut to whole blocks."""
        from pyiqa.utils.color_util import to_y_channel

        rows, columns = (side // self.block * self.block for side in images.shape[-2:])
        if 0 in (rows, columns):
            raise ConfigError(
                f"evaluation.niqe_block: images of {tuple(images.shape[-2:])} px hold no block of "
                f"{self.block} px; set a smaller block together with evaluation.niqe_refit"
            )
        y = to_y_channel((images.detach().cpu().float().clamp(-1, 1) + 1) / 2, 255, "yiq")
        return y.round().double()[..., :rows, :columns]

    def _features(self, y: Tensor) -> Tensor:
        """The 36 features of each of the n blocks, `b n 36`; not finite where a block is flat."""
        from pyiqa.archs.func_util import normalize_img_with_gauss
        from pyiqa.archs.niqe_arch import compute_feature
        from pyiqa.matlab_utils import blockproc, imresize

        half = imresize(y / 255, scale=0.5, antialiasing=True) * 255
        features = []
        for size, scaled in ((self.block, y), (self.block // 2, half)):
            normalised = normalize_img_with_gauss(scaled, padding="replicate")
            features.append(blockproc(normalised, [size, size], fun=compute_feature))
        return torch.cat(features, -1)

    def _sharpness(self, y: Tensor) -> Tensor:
        """Mean local deviation of each block, `b n`, in the order of the features."""
        from pyiqa.matlab_utils import fspecial, imfilter

        kernel = fspecial(7, 7 / 6, 1).to(y)
        mean = imfilter(y, kernel, padding="replicate")
        deviation = (imfilter(y**2, kernel, padding="replicate") - mean**2).abs().sqrt()
        return F.avg_pool2d(deviation, self.block).mT.flatten(1)  # blocks run column first

    def _load_published(self) -> None:
        if self.block != 96:
            raise ConfigError(
                f"evaluation.niqe_block: {self.block} px needs evaluation.niqe_refit, since the "
                "published model is for 96 px"
            )
        from pyiqa.archs.niqe_arch import NIQE

        try:
            published = NIQE()
        except OSError as error:
            raise RuntimeError(
                "NIQE's published model could not be loaded; put niqe_modelparameters.mat into "
                "$TORCH_HOME/hub/pyiqa, or set evaluation.niqe_refit"
            ) from error
        self.mean, self.covariance = published.mu_pris_param, published.cov_pris_param
