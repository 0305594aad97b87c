"""LPIPS and NIQE; images are `b 3 h w` in [-1, 1] and values `(b,)`, without gradients."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ec2face_core.config import Config, ConfigError
from ec2face_core.guards.checks import check_same_shape


class Lpips:
    """LPIPS with AlexNet, calibrated heads included in the package.

    `evaluation.lpips: alex` uses the trunk trained on ImageNet. `alex-random` initialises the
    trunk's weights from a fixed seed, for places where the trained ones are not available: its
    values rank distortions but are not comparable with published ones.
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
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
        check_same_shape(images=images, references=references)
        return self.net(images.to(self.device), references.to(self.device)).flatten()

    __call__ = score


class Niqe:
    """NIQE: how far the statistics of an image's blocks are from those of pristine images.

    The published model has blocks of 96 px and wants images of 192 px or more. For others, say the
    miniature's 64 px, `fit` takes the statistics from pristine images at `evaluation.niqe_block`
    px: the same formula, on a scale of its own, to be labelled so and never set beside published
    values. Features are pyiqa's; double precision, on the CPU.
    """

    def __init__(self, config: Config, pristine: Tensor | None = None) -> None:
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
            features = self._features(y)
            sharpness = self._sharpness(y)
            sharp = sharpness > 0.75 * sharpness.amax(1, keepdim=True)
            rows.append(features[sharp & features.isfinite().all(-1)])
        pristine = torch.cat(rows)
        if len(pristine) <= pristine.shape[1]:
            raise ValueError(
                f"NIQE: {len(pristine)} sharp blocks cannot give a covariance of "
                f"{pristine.shape[1]} features; fit to more images"
            )
        self.mean = pristine.mean(0)
        self.covariance = pristine.T.cov()
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
        self.mean = published.mu_pris_param
        self.covariance = published.cov_pris_param
