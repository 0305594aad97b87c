"""The equations of UaC, CoDiffusion and ControlNeXt, and sampling with their scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ec2face_core.config import Config
from ec2face_lab.baselines import unets
from ec2face_lab.baselines.codiffusion import CoDiffusion
from ec2face_lab.baselines.controlnext import ControlNeXt, cross_normalise
from ec2face_lab.baselines.encoders import word_features
from ec2face_lab.baselines.uac import UaC, compose, pixel_scheduler


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def config(tiny_config) -> Config:
    return tiny_config.replace(sampling={"steps": 2})


def noise(n: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


# -------------------------------------------------------------------------- the equations


def test_composition_of_experts():
    """The score of p(x) prod_i (p_i(x | c_i) / p_i(x))^w_i with p = prod_i p_i(x)^b_i.

    Of Gaussians, whose scores autograd takes from their log densities.
    """
    x = torch.linspace(-2, 3, 7, dtype=torch.float64, requires_grad=True)
    weights, reliability = {"mask": 1.4, "text": 2.2}, {"mask": 3.0, "text": 1.0}

    def log_density(mean: float, std: float) -> torch.Tensor:
        return torch.distributions.Normal(mean, torch.tensor(std).double()).log_prob(x).sum()

    given = {"mask": log_density(0.3, 0.5), "text": log_density(1.1, 0.8)}
    without = {"mask": log_density(0.0, 1.5), "text": log_density(0.2, 1.2)}
    base = 0.75 * without["mask"] + 0.25 * without["text"]
    want = base + sum(weights[k] * (given[k] - base) for k in given)

    def score(log_p: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(log_p, x, retain_graph=True)[0]

    found = compose({k: (score(given[k]), score(without[k])) for k in given}, weights, reliability)
    assert torch.allclose(found, score(want))
    alone = compose({"text": (score(given["text"]), score(without["text"]))}, weights, reliability)
    guided = without["text"] + weights["text"] * (given["text"] - without["text"])
    assert torch.allclose(alone, score(guided))


def test_composition_is_the_same_for_clean_pictures_and_noise():
    """x_0 of x_t = sqrt(a) x_0 + sqrt(1 - a) e is affine in e."""
    x_t, a = torch.randn(3, 4, 4), 0.3
    noises = {k: (torch.randn(3, 4, 4), torch.randn(3, 4, 4)) for k in ("mask", "text")}

    def clean(e: torch.Tensor) -> torch.Tensor:
        return (x_t - (1 - a) ** 0.5 * e) / a**0.5

    numbers = ({"mask": 1.5, "text": 2.0}, {"mask": 0.5, "text": 0.5})
    composed = compose({k: (clean(e), clean(e0)) for k, (e, e0) in noises.items()}, *numbers)
    assert torch.allclose(composed, clean(compose(noises, *numbers)), atol=1e-5)


def test_errors_of_x0_and_of_v_have_the_same_loss(monkeypatch):
    """The same guess as x_0 and as v, written out, has the same loss where no weight is clipped."""
    pixels, latents = pixel_scheduler(), unets.ldm_scheduler()
    latents.alphas_cumprod = pixels.alphas_cumprod
    x0, guess = torch.randn(6, 2, 4, 4), torch.randn(6, 2, 4, 4)

    def v(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = pixels.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (a.sqrt() * x_t - guess) / (1 - a).sqrt()

    def losses() -> list[float]:
        pairs = ((lambda x_t, t: guess, pixels), (v, latents))
        return [
            unets.denoising_loss(f, s, x0, torch.Generator().manual_seed(1)).item()
            for f, s in pairs
        ]

    monkeypatch.setattr(unets, "HEAVIEST", 1e9)
    as_x0, as_v = losses()
    assert as_x0 == pytest.approx(as_v, rel=1e-4)
    monkeypatch.setattr(unets, "HEAVIEST", 1.0)
    assert losses()[0] == pytest.approx((guess - x0).square().mean().item(), rel=1e-5)


def test_two_maps_are_skin_and_hair(config):
    system = UaC(config.replace(baselines={"published_masks": True}))
    masks = torch.randint(0, 19, (2, 64, 64))
    assert torch.equal(system.see(masks)[:, 0] == 1, masks == 1)
    assert torch.equal(system.see(masks)[:, 1] == 1, masks == 13)
    assert system.generate(None, masks, noise()).shape == (2, 3, 64, 64)


def test_influence_maps_share_each_pixel(config):
    """The collaborative noise, pixel by pixel, from the two U-Nets and a softmax written out."""
    system = CoDiffusion(config)
    x, t = torch.randn(2, *system.shape), torch.tensor([30, 900])
    masks = torch.randint(0, 19, (2, 64, 64))
    contexts = system.contexts(["a man", "she smiles"], masks)
    nets = system.networks.eval()
    with torch.no_grad():
        found, influence = system.collaborate(x, t, contexts)
        raw = {m: nets[f"{m}_influence"](x, t, contexts[m]).sample.exp() for m in contexts}
        each = {m: nets[m](x, t, contexts[m]).sample for m in contexts}
    total = raw["text"] + raw["mask"]
    want = (raw["text"] * each["text"] + raw["mask"] * each["mask"]) / total
    assert torch.allclose(found, want, atol=1e-5)
    assert torch.allclose(influence["mask"], raw["mask"] / total, atol=1e-5)

    side = system.shape[1]
    for mask, tokens in zip(masks, contexts["mask"], strict=True):  # as the original reads masks
        picture = Image.fromarray(mask.byte().numpy()).resize(
            (side, side), Image.Resampling.NEAREST
        )
        ids = torch.from_numpy(np.array(picture)).long().flatten()
        want = nets["tokens"](torch.eye(19)[ids].T)
        assert torch.allclose(tokens, want, atol=1e-5)


def test_cross_normalisation_and_the_untouched_base(config):
    controls, features = 5 + 3 * torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4) * 0.2 - 1
    out = cross_normalise(controls, features)
    for o, c, f in zip(out, controls, features, strict=True):
        assert torch.allclose(o.mean(), f.mean(), atol=1e-5)
        assert torch.allclose(o.std(), f.std(), rtol=1e-4)
        corr = torch.corrcoef(torch.stack([o.flatten(), c.flatten()]))[0, 1]
        assert corr > 0.9999, "an affine map of the controls"

    system = ControlNeXt(config)
    unet = system.networks["unet"].eval()
    x = torch.randn(2, *system.shape)
    t = torch.tensor([5, 700])
    words = torch.randn(2, 5, system.words)
    with torch.no_grad():
        base = unet(x, t, words).sample
        with_mask = system.predict(x, t, words, torch.randint(0, 19, (2, 64, 64)))
        assert not torch.allclose(with_mask, base, atol=1e-3)
        assert torch.equal(system.predict(x, t, words), base), "no hook and no increment stays"
    few = sum(p.numel() for p in system.networks["increments"].parameters())
    assert few < 0.05 * sum(p.numel() for p in unet.parameters())


# ------------------------------------------------------------------------ shared blocks


@pytest.mark.parametrize("scheduler", [unets.ldm_scheduler, pixel_scheduler])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_a_gaussian(scheduler, eta):
    """With the optimal prediction for x0 ~ N(0, s^2) every step of Eq. 12 is linear in x_t.

    So the variance of the samples follows from the coefficients alone.
    """
    s, steps, plan = 0.3, 28, scheduler()  # 28 do not divide 1000
    alphas = plan.alphas_cumprod.double()

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alphas[t].float().view(-1, 1, 1, 1)
        x0 = a.sqrt() * s**2 * x / (a * s**2 + 1 - a)
        e = (x - a.sqrt() * x0) / (1 - a).sqrt()
        if plan.config.prediction_type == "sample":
            return x0
        return a.sqrt() * e - (1 - a).sqrt() * x0

    x = unets.ddim_sample(predict, plan, (4, 8, 8), noise(24), steps, eta)
    times = [35 * k - 1 for k in range(steps, 0, -1)]
    variance = 1.0
    for t, before in zip(times, [*times[1:], None], strict=True):
        a, b = alphas[t].item(), 1.0 if before is None else alphas[before].item()
        sigma2 = eta * (1 - b) / (1 - a) * (1 - a / b)
        x0 = a**0.5 * s**2 / (a * s**2 + 1 - a)
        e = (1 - a**0.5 * x0) / (1 - a) ** 0.5
        variance = (b**0.5 * x0 + (1 - b - sigma2) ** 0.5 * e) ** 2 * variance + sigma2
    assert x.std() == pytest.approx(variance**0.5, rel=0.04)
    assert variance**0.5 == pytest.approx(s, rel=0.3) and x.mean().abs() < 0.02
    one = unets.ddim_sample(predict, plan, (4, 8, 8), noise(24)[7:8], steps, eta)
    assert torch.allclose(one[0], x[7], atol=1e-5)


def test_word_features_are_what_clip_pools(config):
    system = UaC(config)
    texts = ["a young woman with earrings", "", "he smiles"]
    words, clip = word_features(system.clip, texts), system.clip
    last = clip.tokenizer(texts).argmax(1)
    pooled = words[torch.arange(3), last] @ clip.model.text_projection
    pooled = pooled / pooled.norm(dim=1, keepdim=True)
    assert torch.allclose(pooled, clip.text_features(texts), atol=1e-5)


def test_guidance_and_dropped_texts():
    predict = lambda x, c: x + c  # noqa: E731
    x, c, none = torch.ones(2, 1), torch.full((2, 1), 3.0), torch.zeros(2, 1)
    assert torch.equal(unets.guided(predict, 2.0, (x, x), (c, none)), x + 6)
    assert torch.equal(unets.guided(predict, 1.0, (x, x), (c, none)), x + 3)
    texts = unets.drop_texts(["a"] * 1000, 0.25, torch.Generator().manual_seed(0))
    assert 190 < texts.count("") < 310
