"""The miniature's networks, their tokenizers and files, and the losses that train them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ec2face_core.attributes import NUM_CLASSES
from ec2face_core.backbone import Backbone
from ec2face_core.config import load_profile
from ec2face_core.perception import FACER_CHANNEL, ClipScorer, FaceParser
from ec2face_lab.prepare.captions import captions
from ec2face_lab.world.networks import (
    DilatedParserNet,
    MiniParserNet,
    save_parser,
    tiny_backbone,
)
from ec2face_lab.world.rendering import render
from ec2face_lab.world.scenes import sample_scenes

CORPUS = [
    f"The {who} has {hair} hair and wears {what}."
    for who in ("man", "woman", "person")
    for hair in ("black", "blond", "wavy brown")
    for what in ("earrings", "a hat", "glasses", "a necklace")
]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return tiny_backbone(CORPUS, seed=1)


def test_tokenizers_spell_the_corpus_and_know_where_it_ends(tiny):
    clip, t5 = tiny.tokenizer, tiny.tokenizer_2
    assert clip.eos_token_id == len(clip) - 1
    for caption in CORPUS[:3]:
        ids = clip(caption).input_ids
        assert ids[-1] == clip.eos_token_id and clip.eos_token_id not in ids[:-1]
        spelt = clip.decode(ids, skip_special_tokens=True)
        assert spelt.replace(" ", "") == caption.lower().replace(" ", "")
        assert len(ids) == len(caption.split()) + 3  # one token a word, full stop, start and end
        assert t5.decode(t5(caption).input_ids, skip_special_tokens=True) == caption


def test_same_seed_same_weights_and_the_global_generator_is_left_alone(tiny):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    again, other = tiny_backbone(CORPUS, seed=1), tiny_backbone(CORPUS, seed=2)
    assert torch.equal(torch.rand(1), expected)
    weight = tiny.transformer.x_embedder.weight
    assert torch.equal(again.transformer.x_embedder.weight, weight)
    assert not torch.equal(other.transformer.x_embedder.weight, weight)


@pytest.mark.slow
def test_a_tokenizer_is_the_same_in_every_process():
    code = (
        "from ec2face_lab.world.networks import clip_tokenizer;"
        "print(sorted(clip_tokenizer(['A woman smiles.', 'Ein ñandú.'] * 9).get_vocab().items()))"
    )
    vocabularies = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(vocabularies) == 1


@pytest.mark.parametrize(
    "net",
    [
        lambda: MiniParserNet((8, 16), 32),
        lambda: DilatedParserNet((8, 8, 16), 32, dilations=(1, 2)),
    ],
)
def test_saved_parser_computes_what_the_net_computes(tmp_path, net):
    """Half-precision file, float32 network: the logits agree to the precision of the file."""
    torch.manual_seed(0)
    net = net()
    net(torch.rand(4, 3, 32, 32))  # a BatchNorm sees a few images
    net.eval()
    save_parser(net, tmp_path / "parser.pt")
    parser = FaceParser(tmp_path / "parser.pt", size=32)
    assert all(p.dtype == torch.float32 for p in parser.net.parameters())
    assert not any("running" in name for name, _ in parser.net.named_buffers())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = net((images + 1) / 2)[0][:, FACER_CHANNEL]
    logits = parser.logits(images)
    assert logits.shape == (2, NUM_CLASSES, 32, 32)
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(parser.logits(images[:1]), logits[:1])  # no statistics of the batch


def test_kept_perception_models_read_procedural_faces():
    """The bundle's own networks, both roles, as the profile names them."""
    config = load_profile("mini").perception
    scenes = sample_scenes(5, range(64))
    faces = render(scenes, 64)
    texts = [captions(row, 1)[0] for row in scenes.attributes]
    for scoring in (False, True):
        try:
            parser = FaceParser.from_config(config, scoring)
            clip = ClipScorer.from_config(config, scoring)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        assert (parser.parse(faces.image) == faces.label_map).float().mean() > 0.9
        similarity = clip.image_features(faces.image) @ clip.text_features(texts).T
        assert similarity.diagonal().mean() > similarity.mean() + 0.05
