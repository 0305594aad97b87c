"""The equations of TediGAN, PixelFace+, MM2Latent and of the style-based generator."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ec2face_core.attributes import PALETTE
from ec2face_core.config import Config
from ec2face_core.data import open_dataset
from ec2face_lab.baselines import build, mm2latent, pixelface, style, tedigan
from ec2face_lab.baselines.encoders import word_features

PROMPTS = ["A woman with black hair.", "The man has eyeglasses."]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def masks(tiny_config: Config) -> torch.Tensor:
    faces = open_dataset(tiny_config, "test")
    return torch.stack([faces[i].label_map for i in range(2)])


def generators(first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(2)]


# ----------------------------------------------------------------------- style-based generator


def test_modulation_is_that_of_the_weights():
    """Eq. 1-3 of StyleGAN2, sample by sample with weights of its own."""
    torch.manual_seed(0)
    conv, x, w = style.ModulatedConv(5, 7, width=6), torch.randn(3, 5, 8, 8), torch.randn(3, 6)
    for i in range(3):
        s = conv.style(w[i])
        weight = conv.weight * s[None, :, None, None] / math.sqrt(5 * 9)
        weight = weight / torch.stack([part.norm() for part in weight])[:, None, None, None]
        y = F.conv2d(x[i : i + 1], weight, conv.bias, padding=1)
        expected = torch.where(y > 0, y, 0.2 * y) * math.sqrt(2)
        assert torch.allclose(conv(x, w)[i : i + 1], expected, atol=1e-4)


def test_the_gradient_penalty_of_a_plane_is_its_slope():
    slope = torch.randn(3, 4, 4)
    penalty = style.r1_penalty(
        lambda x: ((x * slope).sum((1, 2, 3)), None), torch.randn(5, 3, 4, 4)
    )
    assert torch.allclose(penalty, slope.square().sum())


@pytest.mark.parametrize(("size", "layers"), [(64, 10), (128, 13)])
def test_later_layers_change_finer_structure_only(size, layers):
    """Codes from a layer on leave what lower resolutions drew: layer order is coarse to fine."""
    torch.manual_seed(1)
    net = style.StyleGenerator(size)
    codes = net.random_codes(generators(), 1.0).clone()
    assert codes.shape == (2, layers, style.WIDTH)
    other = codes.clone()
    other[:, 7:] = codes.flip(0)[:, 7:]
    seen = []
    for conv in net.convs:
        conv.register_forward_hook(lambda m, i, y: seen.append(y))
    with torch.no_grad():
        net(codes), net(other)
    same = [torch.equal(a, b) for a, b in zip(seen[:layers], seen[layers:], strict=True)]
    assert same == [True] * 7 + [False] * (layers - 7)


def test_perceptual_distance_is_a_mean_over_layers_of_unit_features():
    """Layers that see the pixels, the pixels five times as large, and nothing of them."""

    def layers(x: torch.Tensor, indices: list[int], intermediates_only: bool) -> dict:
        assert indices == [0, 1, 2] and intermediates_only
        return {"image_intermediates": [x, 5 * x[..., ::2, ::2], torch.ones_like(x)]}

    visual = SimpleNamespace(forward_intermediates=layers)
    clip = SimpleNamespace(model=SimpleNamespace(visual=visual), mean=0.0, std=1.0, size=8)
    red, other = torch.full((2, 3, 8, 8), -1.0), torch.full((2, 3, 8, 8), -1.0)
    red[:, 0] = 1.0
    other[0, 1] = 1.0  # green; the second picture is red in its upper half
    other[1, 0, :4] = other[1, 1, 4:] = 1.0
    # unit vectors at right angles lie sqrt 2 apart
    expected = torch.tensor([(2 + 2 + 0) / 3, (1 + 1 + 0) / 3])
    assert torch.allclose(style.perceptual(clip, red, other), expected, atol=1e-6)


# -------------------------------------------------------------------------- equations of each


def test_tedigan_the_layer_index_chooses_the_modality(tiny_config, masks):
    system = build("TediGAN", tiny_config)
    codes = system.codes(PROMPTS, masks, generators())
    other_mask = system.codes(PROMPTS, masks.flip(0), generators())
    other_text = system.codes(PROMPTS[::-1], masks, generators())
    moved = (codes != other_mask).any(2).any(0), (codes != other_text).any(2).any(0)
    assert moved[0].tolist() == [True] * 6 + [False] * 4
    assert moved[1].tolist() == [False] * 6 + [True] * 4


def test_tedigan_optimisation_serves_the_sentence_in_its_layers(tiny_config, masks):
    """A CLIP whose feature is the mean colour; one sentence means red, the other blue."""
    system = build("TediGAN", tiny_config)
    system.clip_steps = 8
    system.networks.requires_grad_(False)
    start = system.codes(PROMPTS, masks, generators())

    def colour(images: torch.Tensor) -> torch.Tensor:
        return F.normalize(images.mean((2, 3)), dim=1)

    text = F.normalize(torch.tensor([[1.0, -1, -1], [-1, -1, 1]]), dim=1)
    system.clip = SimpleNamespace(image_features=colour)
    end = system._optimise(start, 6, text)
    assert torch.equal(end[:, :6], start[:, :6])
    before, after = (
        (colour(system.networks["generator"](codes)) * text).sum(1) for codes in (start, end)
    )
    assert (after > before + 0.01).all()


def test_tedigan_ranking_against_every_other_face():
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    expected = []
    for i in range(4):
        own = torch.cosine_similarity(a[i], b[i], 0)
        for j in range(4):
            if i != j:
                gap = 0.2 - own + torch.cosine_similarity(a[i], b[j], 0)
                expected.append(max(0.0, gap.item()))
    loss = tedigan.ranking_loss(a, b, 0.2).item()
    assert loss == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_pixelface_each_pixel_attends_to_the_words_of_its_sentence():
    torch.manual_seed(2)
    query, key, value = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    answer = pixelface.cross_attention(query, key, value, real)
    for b, n in ((0, 5), (1, 2)):
        for y in range(3):
            for x in range(3):
                scores = torch.stack([query[b, :, y, x] @ key[b, i] / 2 for i in range(n)])
                expected = (scores.exp() / scores.exp().sum()) @ value[b, :n]
                assert torch.allclose(answer[b, :, y, x], expected, atol=1e-5)


def test_pixelface_a_closed_gate_silences_the_words(tiny_config, masks):
    system = build("PixelFace+", tiny_config)
    net = system.networks["generator"]
    with torch.no_grad():
        open_gate = system.generate(PROMPTS, masks, generators())
        assert not torch.equal(open_gate, system.generate(PROMPTS[::-1], masks, generators()))
        for words in net.words.values():
            words.gate.bias.fill_(-torch.inf)
    closed = system.generate(PROMPTS, masks, generators())
    assert torch.equal(closed, system.generate(PROMPTS[::-1], masks, generators()))
    assert not torch.equal(closed, system.generate(PROMPTS, masks.flip(0), generators()))


@pytest.mark.parametrize("name", ["PixelFace+", "ControlNeXt"])
def test_a_published_mask_is_seen_in_palette_colours(name, tiny_config):
    config = tiny_config.replace(baselines={"published_masks": True}, sampling={"steps": 1})
    masks = torch.tensor([[[0, 1], [3, 15]]])
    system = build(name, config)
    assert system.generate(PROMPTS[:1], masks.repeat(1, 32, 32), generators()[:1]).shape[1] == 3
    colours = system.see(masks) * 127.5 + 127.5
    assert [tuple(c) for c in colours[0].flatten(1).T.round().int().tolist()] == [
        PALETTE[i] for i in (0, 1, 3, 15)
    ]


def test_pixelface_matching_is_a_binary_decision():
    real, fake, sentence = torch.randn(3, 3, 4)
    pairs = [
        (real, sentence, 1.0, 1.0),
        (real, sentence.roll(1, 0), 0.0, 0.5),
        (fake, sentence, 0.0, 0.5),
    ]
    expected = sum(
        weight * F.binary_cross_entropy((f * s).sum(1).div(2).sigmoid(), torch.full((3,), truth))
        for f, s, truth, weight in pairs
    )
    assert torch.allclose(pixelface.matching_loss(real, fake, sentence), expected, atol=1e-5)


def test_pixelface_words_after_the_end_are_not_read(tiny_config):
    system = build("PixelFace+", tiny_config)
    clip, words, real = system.clip, word_features(system.clip, PROMPTS), system.real(PROMPTS)
    assert words.shape[:2] == real.shape == (2, clip.model.context_length)
    ends = real.sum(1)
    assert (ends < clip.model.context_length).all()
    # the last word that is read is the one that CLIP's sentence feature is projected from
    last = words[torch.arange(2), ends - 1] @ clip.model.text_projection
    assert torch.allclose(F.normalize(last, dim=1), clip.text_features(PROMPTS), atol=1e-5)


def test_mm2latent_pseudo_text_lies_around_the_pictures_embedding(tiny_config):
    system = build("MM2Latent", tiny_config)
    picture = torch.rand(1, 3, 64, 64).expand(256, -1, -1, -1) * 2 - 1
    clean = system.clip.image_features(picture[:1])
    pseudo = system.pseudo_text(picture, torch.Generator().manual_seed(3))
    cosine = (pseudo * clean).sum(1)
    # noise of length s at right angles, as nearly all noise is: cos = 1 / sqrt(1 + s^2)
    assert cosine.mean() == pytest.approx(1 / math.sqrt(1 + mm2latent.NOISE**2), abs=0.03)
    assert torch.allclose(pseudo.norm(dim=1), torch.ones(256))


def test_mm2latent_loss_of_absolute_error_and_angle():
    a, w = torch.randn(3, 4), torch.randn(3, 4)
    rows = []
    for p, q in zip(a.tolist(), w.tolist(), strict=True):
        dot = sum(x * y for x, y in zip(p, q, strict=True))
        cosine = dot / math.hypot(*p) / math.hypot(*q)
        rows.append(sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 4 + 1 - cosine)
    assert mm2latent.mapping_loss(a, w).item() == pytest.approx(sum(rows) / 3, abs=1e-5)


def test_mm2latent_is_deterministic_given_text_and_mask(tiny_config, masks):
    system = build("MM2Latent", tiny_config)
    pictures = system.generate(PROMPTS, masks, generators())
    assert torch.equal(pictures, system.generate(PROMPTS, masks, generators(7)))
