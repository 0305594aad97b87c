"""Procedural faces: determinism, the long tail, agreement of picture, labels and attributes."""

import csv

import pytest
import torch

from ec2face_core.attributes import CLASS_ID, pixel_counts
from ec2face_lab.world.rendering import render
from ec2face_lab.world.scenes import sample_scenes
from ec2face_lab.world.sources import write_dataset


@pytest.fixture(scope="module")
def faces():
    """Rows of pixel counts and attributes of 1,024 natural faces at 64 px."""
    counts, rows = [], []
    for start in range(0, 1024, 128):
        scenes = sample_scenes(42, range(start, start + 128))
        counts.append(pixel_counts(render(scenes, 64).label_map))
        rows += scenes.attributes
    return torch.cat(counts), rows


def test_a_face_depends_on_seed_and_index_alone():
    batch = render(sample_scenes(3, range(10, 20)), 64)
    alone = render(sample_scenes(3, [14]), 64)
    assert torch.equal(batch.image[4], alone.image[0])
    assert torch.equal(batch.label_map[4], alone.label_map[0])
    other = render(sample_scenes(4, [14]), 64)
    assert not torch.equal(other.label_map[0], alone.label_map[0])


@pytest.mark.parametrize("look", ["first", "second"])
def test_ranges_and_shapes(look):
    r = render(sample_scenes(0, range(6), look), 48)
    assert r.image.shape == (6, 3, 48, 48) and r.label_map.shape == (6, 48, 48)
    for picture in (r.image, r.albedo, r.normals, r.depth):
        assert picture.min() >= -1 and picture.max() <= 1
    assert r.label_map.dtype == torch.int64 and r.label_map.max() <= 18


def test_the_second_look_shows_the_same_world_otherwise():
    first, second = (render(sample_scenes(0, range(8), look), 64) for look in ("first", "second"))
    assert not torch.equal(first.image, second.image)
    with pytest.raises(ValueError, match="look 'third'"):
        sample_scenes(0, [0], "third")


def test_resolutions_show_the_same_scene():
    """Every second pixel centre of the fine map lies within half a coarse pixel."""
    scenes = sample_scenes(5, range(16))
    coarse, fine = render(scenes, 64).label_map, render(scenes, 192).label_map
    assert (fine[:, 1::3, 1::3] == coarse).float().mean() > 0.995  # the very same points


def test_picture_and_labels_agree_to_the_pixel():
    """Repainting one part changes the flat colours exactly where the label map has the part."""
    scenes = sample_scenes(6, range(64), frequencies="balanced")
    before = render(scenes, 64)
    scenes.values["earring_rgb"] = 1 - scenes.values["earring_rgb"]
    change = (render(scenes, 64).albedo - before.albedo).abs().amax(1)
    inside = before.label_map == CLASS_ID["ear_r"]
    hat_free = torch.tensor(scenes["hat"]) == 0
    assert inside[hat_free].any()
    assert (change[hat_free][inside[hat_free]] > 0.02).float().mean() > 0.97
    # Outside, only the antialiased rim: coverage below one half changes less than the inside.
    assert change[~inside].mean() < 0.05 * change[inside].mean()


def test_frequencies_follow_the_measured_long_tail(faces):
    """Shares of images and of pixels against 1,000 real pairs (shared data's README)."""
    counts, _ = faces
    images = 100 * (counts > 0).double().mean(0)
    pixels = 100 * counts.sum(0) / counts.sum()
    real = {"ear_r": (23.4, 0.204), "neck_l": (4.5, 0.009), "eye_g": (5.8, 0.325),
            "hat": (5.3, 1.11)}  # fmt: skip
    for name, (image_share, pixel_share) in real.items():
        got = images[CLASS_ID[name]].item()
        three_sigma = 3 * (image_share * (100 - image_share) / len(counts)) ** 0.5
        assert abs(got - image_share) < three_sigma + 0.5, name
        assert 0.4 < pixels[CLASS_ID[name]].item() / pixel_share < 2.7, name
    assert 45 < images[CLASS_ID["l_ear"]] < 58 and 45 < images[CLASS_ID["r_ear"]] < 58
    assert 50 < images[CLASS_ID["mouth"]] < 62
    shares = {"hair": 31.0, "skin": 25.5, "background": 28.8, "cloth": 3.4, "neck": 4.1}
    for name, share in shares.items():
        assert abs(pixels[CLASS_ID[name]].item() - share) < 0.3 * share + 0.2, name
    assert pixels[CLASS_ID["neck_l"]] < pixels[CLASS_ID["ear_r"]] < pixels[CLASS_ID["hat"]]


def test_attributes_are_what_the_labels_show(faces):
    counts, rows = faces
    for attribute, name in (("earrings", "ear_r"), ("eyeglasses", "eye_g"), ("hat", "hat"),
                            ("necklace", "neck_l"), ("mouth_open", "mouth")):  # fmt: skip
        claimed = torch.tensor([row[attribute] for row in rows])
        shown = counts[:, CLASS_ID[name]] > 0
        assert (claimed == shown).float().mean() > 0.98, attribute
    bald = torch.tensor([row["bald"] for row in rows])
    assert (counts[bald, CLASS_ID["hair"]] == 0).all()


def test_left_is_the_subjects_left():
    labels = render(sample_scenes(42, range(64)), 64).label_map
    columns = torch.arange(64.0)
    for part in ("eye", "brow", "ear"):
        left, right = ((labels == CLASS_ID[f"{side}_{part}"]).float().sum((0, 1)) for side in "lr")
        assert (left * columns).sum() / left.sum() > (right * columns).sum() / right.sum() + 8


def test_balanced_frequencies_show_rare_parts_often():
    rows = sample_scenes(1, range(256), frequencies="balanced").attributes
    assert sum(row["necklace"] for row in rows) > 80 and sum(row["hat"] for row in rows) > 30


def test_written_layout(tmp_path):
    root = tmp_path / "faces"
    write_dataset(root, 9, {"train": 5, "test": 2}, 64, "second", progress=False)
    with open(root / "manifest.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train"] * 5 + ["test"] * 2
    for row in rows:
        lines = (root / "text" / f"{row['id']}.txt").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 9 and lines[int(row["caption_index"])] == row["caption"]
        assert (root / "image" / f"{row['id']}.png").exists()
        assert (root / "mask" / f"{row['id']}.png").exists()
    assert not list(tmp_path.glob(".*"))  # nothing half-written stays
