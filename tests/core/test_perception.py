"""The perception models against networks with known outputs: class order, ranges, gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from ec2face_core.attributes import CLASS_ID, NUM_CLASSES, pixel_counts
from ec2face_core.config import PerceptionConfig
from ec2face_core.perception import ClipScorer, FaceParser
from ec2face_lab.world.networks import (
    MiniParserNet,
    build_mini_clip,
    clip_tokenizer,
    mini_clip_config,
    save_mini_clip,
    save_parser,
)

SENTENCES = ["The woman wears earrings.", "He has gray hair and a beard.", "A man with a hat."]

# facer's channel of a class, by what FaRL painted into it (its *names* swap left and right)
FACER = {"background": 0, "neck": 1, "skin": 2, "l_ear": 4, "r_ear": 5, "l_brow": 6, "r_brow": 7,
         "l_eye": 8, "r_eye": 9, "mouth": 11, "l_lip": 12, "u_lip": 13, "hair": 14, "eye_g": 15,
         "ear_r": 17, "neck_l": 18}  # fmt: skip


class Known(nn.Module):
    """facer's contract, in [0, 1]: red r means channel round(18 r)."""

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        channels = torch.arange(19, dtype=image.dtype).view(1, 19, 1, 1)
        aux: dict[str, Tensor] = {}
        return -50 * (18 * image[:, :1] - channels) ** 2, aux


def script(net: nn.Module, path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def mini_parser(tmp_path_factory):
    torch.manual_seed(0)
    net = MiniParserNet((8, 16), 32).eval()
    path = tmp_path_factory.mktemp("parser") / "parser.pt"
    save_parser(net, path)
    return net, path


@pytest.fixture(scope="module")
def mini_clip(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(SENTENCES, vocab_size=600)
    config = mini_clip_config(
        len(tokenizer), width=4, layers=(1, 1, 1, 1), text_width=32, text_layers=1, embed_dim=16
    )
    model = build_mini_clip(config).eval()
    folder = tmp_path_factory.mktemp("clip")
    save_mini_clip(folder, model, config, tokenizer)
    return model, folder


def test_classes_come_in_our_order(tmp_path):
    """Every facer channel lands on the class that FaRL painted into it; the net sees [0, 1]."""
    parser = FaceParser(script(Known(), tmp_path / "known.pt"), size=8)
    for name, channel in FACER.items():
        images = torch.full((1, 3, 8, 8), 2 * channel / 18 - 1)
        assert (parser.parse(images) == CLASS_ID[name]).all(), name
    counts = pixel_counts(
        parser.parse(torch.linspace(-1, 1, 19).view(19, 1, 1, 1).expand(19, 3, 8, 8))
    )
    assert (counts.sum(0) == 64).all()  # a permutation: each class once


def test_parser_gradients_reach_the_image_and_not_the_weights(mini_parser):
    parser = FaceParser(mini_parser[1], size=32)
    images = torch.zeros(2, 3, 48, 48, requires_grad=True)
    probabilities = parser.probabilities(images)
    assert probabilities.shape == (2, NUM_CLASSES, 48, 48)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 48, 48))
    probabilities[:, 0].sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in parser.net.parameters())


def test_missing_weights_name_the_setting_and_the_remedy():
    with pytest.raises(FileNotFoundError, match=r"perception\.parser.*make foundation"):
        FaceParser("data/none.pt", size=64)
    with pytest.raises(FileNotFoundError, match=r"perception\.clip.*make foundation"):
        ClipScorer("local-dir:data/none")


def test_from_config_chooses_the_role(mini_parser, mini_clip, tmp_path):
    known = script(Known(), tmp_path / "known.pt")
    config = PerceptionConfig(
        parser=str(mini_parser[1]), scoring_parser=known, parser_size=32,
        clip=f"local-dir:{mini_clip[1]}", scoring_clip="local-dir:data/none",
    )  # fmt: skip
    dark = -torch.ones(1, 3, 32, 32)
    assert (FaceParser.from_config(config, scoring=True).parse(dark) == 0).all()
    assert sum(p.numel() for p in FaceParser.from_config(config).net.parameters()) > 0
    assert ClipScorer.from_config(config).name.endswith(str(mini_clip[1]))
    with pytest.raises(FileNotFoundError):
        ClipScorer.from_config(config, scoring=True)


def test_clip_folder_round_trip(mini_clip):
    """The folder gives back the model: same features up to half precision, same convention."""
    model, folder = mini_clip
    clip = ClipScorer(f"local-dir:{folder}")
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = model.encode_image(((images + 1) / 2 - mean) / std, normalize=True)
    torch.testing.assert_close(clip.image_features(images), expected, atol=0.01, rtol=0.01)
    tokens = clip.tokenizer(SENTENCES)
    assert tokens.shape == (3, 32)
    assert (tokens[:, 0] == tokens.max() - 1).all()  # start, then words, then the highest id
    decoded = clip.tokenizer.tokenizer.decode(tokens[1], skip_special_tokens=True)
    assert decoded.strip().rstrip(".").strip() == "he has gray hair and a beard"
    torch.testing.assert_close(
        clip.text_features(SENTENCES), model.encode_text(tokens, normalize=True),
        atol=0.01, rtol=0.01,
    )  # fmt: skip


def test_clip_score_is_a_cosine_in_percent(mini_clip):
    clip = ClipScorer(f"local-dir:{mini_clip[1]}")
    images = torch.rand(3, 3, 96, 96) * 2 - 1
    score = clip.score(images, SENTENCES)
    a, b = clip.image_features(images), clip.text_features(SENTENCES)
    expected = 100 * torch.nn.functional.cosine_similarity(a, b)
    torch.testing.assert_close(score, expected)
    assert score.shape == (3,) and score.abs().max() <= 100
    assert not score.requires_grad


def test_clip_gradients_reach_the_image_and_not_the_weights(mini_clip):
    clip = ClipScorer(f"local-dir:{mini_clip[1]}")
    images = torch.rand(2, 3, 96, 96).requires_grad_()
    (clip.image_features(images) * clip.text_features(SENTENCES[:2])).sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in clip.model.parameters())


def test_words_that_clip_cuts_are_told(mini_clip):
    scorer = ClipScorer(f"local-dir:{mini_clip[-1]}")
    long = "a woman with a hat. " * 12 + "She wears a necklace."
    lost = scorer.lost_texts(["a hat.", long])
    assert list(lost) == [long] and lost[long].endswith("She wears a necklace.")
    kept = long.removesuffix(lost[long])
    assert torch.equal(scorer.tokenizer([long]), scorer.tokenizer([kept]))
    assert not torch.equal(scorer.tokenizer([long]), scorer.tokenizer([kept.rstrip()[:-1]]))


def test_words_that_openai_s_tokenizer_cuts_are_told(mini_clip):
    import open_clip

    scorer = ClipScorer(f"local-dir:{mini_clip[-1]}")
    scorer.tokenizer = open_clip.get_tokenizer("ViT-B-32")  # 77 tokens, no tokenizer inside
    long = "a man " * 37 + "with a hat. She wears a red necklace."
    lost = scorer.lost_texts(["a hat.", long])
    assert lost == {long: "a hat . she wears a red necklace ."}
    kept = "a man " * 37 + "with"
    assert torch.equal(scorer.tokenizer([long]), scorer.tokenizer([kept]))
