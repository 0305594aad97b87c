"""The miniature's perception models: their data, their losses and measures, and short trainings."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ec2face_core.attributes import CLASS_ID, NUM_CLASSES, flip_labels, one_hot, palette_image
from ec2face_core.perception import ClipScorer, FaceParser
from ec2face_core.runs import read_metrics
from ec2face_lab.world import perception_training, pretrain_perception, training
from ec2face_lab.world.augmentation import disturb, moved, renamed, soften
from ec2face_lab.world.facts import load_facts
from ec2face_lab.world.perception_training import RecentFaces, Recipe
from ec2face_lab.world.pretrain_perception import (
    ROLES,
    dice_loss,
    facts_quality,
    parsing_quality,
    shared_errors,
    train_clip,
    train_facts,
    train_parser,
)
from ec2face_lab.world.retrieval import (
    best_scores,
    contrastive_loss,
    mentioned_facts,
    retrieval,
    sigmoid_loss,
)
from ec2face_lab.world.sources import ProceduralFaces


class SmallFaces(ProceduralFaces):
    size = 32


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def faces():
    return SmallFaces().faces(5, 0, 12)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Recipes of two or three short steps, a checkpoint at each, in a temporary folder."""
    recipe = Recipe(block=24, blocks=2, batch=8, updates=2, lr=1e-3)
    for kind in pretrain_perception.RECIPES:
        monkeypatch.setitem(pretrain_perception.RECIPES, kind, recipe)
    monkeypatch.setattr(perception_training, "ROOT", tmp_path)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr("ec2face_lab.world.sources.HELD_OUT", 24)
    return SmallFaces()


# ----------------------------------------------------------------------------------------- data


def test_recent_faces_are_those_of_the_newest_blocks():
    read = []

    def block(number: int) -> tuple[torch.Tensor, ...]:
        read.append(number)
        return (torch.full((2,), number), torch.full((2, 3), 10 * number))

    faces = RecentFaces(block, blocks=3)
    for number in range(5):
        faces.advance(number)
        numbers, others = faces.draw(200)
        assert set(numbers.tolist()) == set(range(max(0, number - 2), number + 1))
        assert torch.equal(others[:, 0], 10 * numbers)
    assert read == [0, 1, 2, 3, 4], "every block is read once"
    resumed = RecentFaces(block, blocks=3)
    resumed.advance(4)
    assert read[5:] == [2, 3, 4]
    assert torch.equal(resumed.kept[0], faces.kept[0]), "places do not depend on the beginning"


def test_faces_and_labels_move_together(faces):
    """Pictures that show nothing but the label map stay that, whatever is mirrored and shifted."""
    both = torch.cat([palette_image(faces.label_map), faces.label_map[:, None]], 1)
    both, mirrored = moved(both, 3)
    labels = renamed(both[:, 3].long(), mirrored)
    assert 0 < mirrored.sum() < 12
    for i, (before, after) in enumerate(zip(faces.label_map, labels, strict=True)):
        in_a_mirror = flip_labels(after[None]).flip(-1)  # the subject's left is right there
        shown = palette_image(in_a_mirror if mirrored[i] else after[None])[0]
        assert torch.equal(both[i, :3], shown)
        middle = after[3:-3, 3:-3]
        candidates = [
            face[3 + dy : 29 + dy, 3 + dx : 29 + dx]
            for face in (before, flip_labels(before[None])[0])
            for dy in range(-3, 4)
            for dx in range(-3, 4)
        ]
        assert any(torch.equal(middle, candidate) for candidate in candidates)


@pytest.mark.parametrize("augmentation", [soften, disturb])
def test_augmentation_changes_every_face_a_little(faces, augmentation):
    changed = augmentation(faces.image, 1.0)
    assert changed.shape == faces.image.shape and changed.abs().max() <= 1
    difference = (changed - faces.image).abs().mean((1, 2, 3))
    assert difference.min() > 1e-3 and difference.median() < 0.4
    again = augmentation(faces.image, 1.0)
    assert not torch.equal(changed, again)


# --------------------------------------------------------------------------- losses and measures


def test_dice_loss_is_zero_where_all_is_right_and_counts_only_what_occurs(faces):
    perfect = 40 * one_hot(faces.label_map)
    assert dice_loss(perfect, faces.label_map) < 1e-4
    two = torch.zeros(1, 2, 2).long()
    two[0, 0] = CLASS_ID["hat"]
    logits = 40 * one_hot(torch.zeros(1, 2, 2).long())  # the hat is missed
    assert dice_loss(logits, two).item() == pytest.approx(1 - (2 * 2 / 6 + 0) / 2, abs=1e-4)


def test_parsing_quality_of_known_mistakes():
    target = torch.zeros(1, 4, 4).long()
    target[0, :2] = 1
    predicted = target.clone()
    predicted[0, 0] = 0  # half of the skin is missed
    quality = parsing_quality(predicted, target)
    assert quality["recall"] == {"background": 100.0, "skin": 50.0}
    assert quality["OAA"] == 75.0
    assert quality["f1"]["skin"] == pytest.approx(66.67)
    assert quality["f1"]["background"] == 80.0


def test_shared_errors():
    target = torch.zeros(1, 2, 2).long()
    evaluator = torch.tensor([[[1, 1], [1, 0]]])
    guide = torch.tensor([[[2, 0], [0, 3]]])
    assert shared_errors(guide, evaluator, target) == pytest.approx(100 / 3)
    assert shared_errors(evaluator, evaluator, target) == 100
    assert math.isnan(shared_errors(guide, target, target))


def test_sigmoid_loss_is_a_question_for_every_pair():
    logits = torch.randn(3, 3)
    pairs = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()  # the first two are equal
    expected = -F.logsigmoid(torch.where(pairs, logits, -logits)).sum() / 3
    torch.testing.assert_close(sigmoid_loss(logits, torch.tensor([7, 7, 9])), expected)


def test_equal_captions_are_not_negatives():
    """Two faces with one caption: perfect features of it reach the entropy of the tie, no more."""
    text = F.normalize(torch.eye(3)[[0, 0, 1, 2]], dim=-1)
    loss = contrastive_loss(100 * text @ text.T, torch.tensor([4, 4, 5, 6]))
    torch.testing.assert_close(loss, torch.log(torch.tensor(2.0)) / 2)


def test_a_reader_who_knows_all_facts_is_a_ceiling():
    names = ["hat", "male", "hair_colour=red"]
    texts = ["The man wears a hat.", "The man wears a hat.", "He has red hair.", "This is a man."]
    truth = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool()
    mentions = mentioned_facts(texts, names)
    assert mentions.tolist() == [[1, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0]]
    scores = best_scores(mentions, truth)
    false = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert (scores[false] < -50).all() and (scores[~false] > -50).all()
    assert scores[0, 0] > scores[0, 3], "a caption that says more fits better"
    features = torch.eye(4)[[0, 0, 1, 2]]
    found = retrieval(features, features, texts, mentions, truth)
    assert found["top1"] == 100 and found["true1"] == 100, "equal captions count as right"
    wrong = retrieval(features, features[[2, 2, 0, 0]], texts, mentions, truth)
    assert wrong["top1"] == 25 and wrong["true1"] == 25
    assert wrong["top1_ceiling"] == found["top1_ceiling"] <= 100


def test_facts_quality_leaves_out_what_cannot_be_measured():
    truth = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 0]]).bool()
    predicted = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1]]).bool()
    quality = facts_quality(("always", "hat"), predicted, truth)
    assert quality["facts"] == {"always": None, "hat": pytest.approx(83.33)}
    assert quality["mean"] == quality["worst"] == pytest.approx(83.33)


# -------------------------------------------------------------------------------- short trainings


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_a_parser_is_trained_and_opens_in_the_core(small, tmp_path, role):
    path = tmp_path / f"parser_{role}.pt"
    train_parser(ROLES[role], path, 48, small)
    logits = FaceParser(path, 32).logits(small.faces(5, 0, 12).image)
    assert logits.shape == (12, NUM_CLASSES, 32, 32)
    assert not list(tmp_path.rglob("checkpoints")), "a complete training keeps none"
    assert (tmp_path / f"parser_{role}.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_a_clip_is_trained_and_opens_in_the_core(small, tmp_path, role):
    train_clip(ROLES[role], tmp_path / "clip", 24, small)
    clip = ClipScorer(f"local-dir:{tmp_path / 'clip'}")
    assert clip.tokenizer(["A man."]).shape == (1, 64)
    faces = small.faces(5, 0, 12)
    assert clip.score(faces.image, faces.captions).abs().max() <= 100
    assert (tmp_path / "clip" / "open_clip_model.safetensors").stat().st_size < 3.1e6


@pytest.mark.slow
def test_resuming_any_training_is_bitwise_identical(small, tmp_path, monkeypatch):
    original = small.faces

    def run(name: str, stop: int) -> dict[str, torch.Tensor]:
        def faces(seed, start, count, mixture=()):
            if start == stop * 24:
                raise Killed
            return original(seed, start, count, mixture)

        monkeypatch.setattr(small, "faces", faces)
        train_facts(tmp_path / f"{name}.safetensors", 72, small)
        return load_facts(tmp_path / f"{name}.safetensors").state_dict()

    straight = run("straight", -1)
    with pytest.raises(Killed):
        run("killed", 2)
    (folder,) = (tmp_path / "runs" / "critics").glob("killed-*")
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]
    resumed = run("killed", -1)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.slow
def test_a_time_limit_ends_a_training(small, tmp_path):
    train_facts(tmp_path / "facts.safetensors", 0, small, seconds=0.01)
    net = load_facts(tmp_path / "facts.safetensors")
    assert net.holds(small.faces(5, 0, 12).image).shape == (12, len(net.names))
