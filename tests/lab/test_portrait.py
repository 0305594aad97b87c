"""Portraits: determinism, the long tail, agreement of picture, labels and facts."""

import numpy as np
import pytest
import torch

from ec2face_core.attributes import CLASS_ID, pixel_counts
from ec2face_lab.prepare.captions import HAIR_WORDS, captions
from ec2face_lab.world.portrait import canvas, rendering
from ec2face_lab.world.portrait.rendering import render
from ec2face_lab.world.portrait.scenes import sample_scenes
from ec2face_lab.world.portrait.uniforms import Uniforms
from ec2face_lab.world.scenes import FLAGS

WORN = (("earrings", "ear_r"), ("necklace", "neck_l"), ("eyeglasses", "eye_g"), ("hat", "hat"),
        ("mouth_open", "mouth"))  # fmt: skip


@pytest.fixture(scope="module")
def faces():
    """Pixel counts and facts of 1,024 natural faces at 64 px."""
    counts = []
    for start in range(0, 1024, 128):
        scenes = sample_scenes(42, range(start, start + 128))
        counts.append(pixel_counts(render(scenes, 64).label_map))
    return torch.cat(counts), sample_scenes(42, range(1024)).facts


@pytest.mark.parametrize("look", ["first", "second"])
def test_a_face_depends_on_seed_index_and_look_alone(look):
    batch = sample_scenes(3, range(10, 20), look)
    alone = sample_scenes(3, [14], look)
    assert all((batch[name][4] == value[0]).all() for name, value in alone.values.items())
    assert batch.attributes[4] == alone.attributes[0]
    many = render(batch, 48)
    one = render(alone, 48)
    assert torch.equal(many.label_map[4], one.label_map[0])
    torch.testing.assert_close(many.image[4], one.image[0], atol=1e-5, rtol=0)
    other = sample_scenes(4, [14], look)
    assert not np.array_equal(other["roll"], alone["roll"])


def test_uniform_numbers_are_uniform_and_independent():
    d = Uniforms(0, 0, np.arange(50_000))
    columns = np.stack([d.uniform() for _ in range(6)])
    assert columns.min() >= 0 and columns.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in columns])
    expected = 50_000 / 20
    chi_squared = ((counts - expected) ** 2 / expected).sum(1)
    assert (chi_squared < 45).all()  # 19 degrees of freedom: p = 0.0007
    rows = np.corrcoef(columns) - np.eye(6)
    assert np.abs(rows).max() < 0.02
    lagged = np.corrcoef(columns[:, 1:], columns[:, :-1])[:6, 6:]  # of neighbouring faces
    assert np.abs(lagged).max() < 0.02
    other = Uniforms(1, 0, np.arange(50_000)).uniform()
    assert abs(np.corrcoef(columns[0], other)[0, 1]) < 0.02


@pytest.mark.parametrize("look", ["first", "second"])
def test_ranges_and_shapes(look):
    r = render(sample_scenes(0, range(12), look, "balanced"), 48)
    assert r.image.shape == (12, 3, 48, 48) and r.depth.shape == (12, 1, 48, 48)
    assert r.label_map.shape == (12, 48, 48) and r.label_map.dtype == torch.int64
    for picture in (r.image, r.albedo, r.normals, r.depth):
        assert torch.isfinite(picture).all()
        assert picture.min() >= -1 and picture.max() <= 1
    assert (r.image >= 1).float().mean() < 0.03  # hardly anything is overexposed
    torch.testing.assert_close(r.normals.norm(dim=1), torch.ones(12, 48, 48))


def test_the_second_look_is_darker():
    """Its backgrounds and light are, whatever the faces."""
    images = {
        look: render(sample_scenes(0, range(64), look, "balanced"), 32).image.mean().item()
        for look in ("first", "second")
    }
    assert images["second"] < images["first"] - 0.05
    with pytest.raises(ValueError, match="look 'third'"):
        sample_scenes(0, [0], "third")


def test_sizes_show_the_same_scene():
    scenes = sample_scenes(5, range(16), frequencies="balanced")
    labels = {size: render(scenes, size).label_map for size in (64, 128, 192, 256)}
    assert (labels[192][:, 1::3, 1::3] == labels[64]).float().mean() > 0.995  # the same points
    shares = {size: pixel_counts(x).sum(0) / x.numel() for size, x in labels.items()}
    for size in (64, 256):
        tolerance = 0.1 * shares[128] + 3e-4
        assert ((shares[size] - shares[128]).abs() < tolerance).all()


def test_windows_do_not_crop(monkeypatch):
    """Painting every part on the whole picture gives the same picture."""
    scenes = sample_scenes(8, range(96), frequencies="balanced")
    windowed = render(scenes, 64)
    whole = [part._replace(box=(0.0, 1.0, 0.0, 1.0)) for part in rendering._PARTS]
    monkeypatch.setattr(rendering, "_PARTS", whole)
    free = render(scenes, 64)
    assert torch.equal(windowed.label_map, free.label_map)
    assert (windowed.image - free.image).abs().max() < 0.02


@pytest.mark.slow
def test_rendering_stays_on_its_device_and_never_waits_for_it():
    """On `meta`, a tensor of another device and reading a value are both errors."""
    r = render(sample_scenes(0, range(40), frequencies="balanced"), 32, "meta")
    assert {x.device.type for x in vars(r).values()} == {"meta"}
    assert r.image.shape == (40, 3, 32, 32)


def test_picture_and_labels_agree_to_the_pixel():
    """Repainting one part changes the flat colours exactly where the label map has the part."""
    scenes = sample_scenes(6, range(64), frequencies="balanced")
    before = render(scenes, 64)
    scenes.values["earring_rgb"] = 1 - scenes.values["earring_rgb"]
    change = (render(scenes, 64).albedo - before.albedo).abs().amax(1)
    inside = before.label_map == CLASS_ID["ear_r"]
    assert inside.sum() > 200
    assert (change[inside] > 0.02).float().mean() > 0.97
    # Outside, only the antialiased rim: coverage below one half changes less than the inside.
    assert change[~inside].mean() < 0.05 * change[inside].mean()


def test_frequencies_follow_the_measured_long_tail(faces):
    """Shares of images and of pixels against 1,000 real pairs of CelebAMask-HQ."""
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
    assert 45 < images[CLASS_ID["l_ear"]] < 60 and 45 < images[CLASS_ID["r_ear"]] < 60
    assert 50 < images[CLASS_ID["mouth"]] < 62
    shares = {"hair": 31.0, "skin": 25.5, "background": 28.8, "cloth": 3.4, "neck": 4.1}
    for name, share in shares.items():
        assert abs(pixels[CLASS_ID[name]].item() - share) < 0.35 * share, name
    assert pixels[CLASS_ID["neck_l"]] < pixels[CLASS_ID["ear_r"]] < pixels[CLASS_ID["hat"]]


@pytest.mark.parametrize(("look", "frequencies"), [("first", "balanced"), ("second", "second")])
def test_facts_are_what_the_labels_show(look, frequencies):
    scenes = sample_scenes(9, range(240), look, frequencies)
    counts = torch.cat([
        pixel_counts(render(sample_scenes(9, range(a, a + 120), look, frequencies), 128).label_map)
        for a in range(0, 240, 120)
    ])  # fmt: skip
    facts = scenes.facts
    for fact, name in WORN:
        claimed = torch.from_numpy(facts[fact])
        shown = counts[:, CLASS_ID[name]]
        assert claimed.any()
        assert (shown[claimed] > 10).float().mean() >= 0.995, fact
        assert (shown[~claimed] == 0).all(), fact
    assert (counts[facts["bald"], CLASS_ID["hair"]] == 0).all()
    for word in HAIR_WORDS:  # what is said of hair can be seen
        assert (counts[facts[word] >= 0, CLASS_ID["hair"]] > 60).all(), word


def test_what_a_hat_or_sunglasses_hide_is_not_a_fact():
    scenes = sample_scenes(2, range(4000), frequencies="balanced")
    facts = scenes.facts
    hat = facts["hat"]
    for fact in ("bald", "bangs", "receding_hairline"):
        assert facts[fact].any() and not facts[fact][hat].any()
    sunglasses = scenes["sunglasses"] > 0
    for fact in ("narrow_eyes", "bags_under_eyes", "heavy_makeup"):
        assert facts[fact].any() and not facts[fact][sunglasses].any()
    assert (facts["hair_colour"][scenes["bald"] > 0] == -1).all()
    assert not (facts["lipstick"] & facts["beard"]).any()


def test_attributes_are_the_facts_in_words():
    scenes = sample_scenes(7, range(300), frequencies="balanced")
    facts = scenes.facts
    rows = scenes.attributes
    assert set(rows[0]) == {*FLAGS, *HAIR_WORDS} and len({tuple(row) for row in rows}) == 1
    for i, row in enumerate(rows):
        assert all(row[name] is bool(facts[name][i]) for name in FLAGS)
        for name, words in HAIR_WORDS.items():
            assert row[name] == ("" if facts[name][i] < 0 else words[facts[name][i]])
        for text in captions(row, 3, i):
            assert 3 <= len(text.split()) <= 28
            assert "bangs" not in text or row["bangs"]
            assert "earrings" not in text or row["earrings"]


def test_every_fact_has_both_values(faces):
    _, facts = faces
    for name in FLAGS:
        assert 0.01 < facts[name].mean() < 0.99, name
    for name, words in HAIR_WORDS.items():
        assert set(np.unique(facts[name])) == {*range(-1, len(words))}, name


def test_flags_change_the_picture_where_they_should():
    """Each flag has a gap: the distributions of its parameter do not touch."""
    scenes = sample_scenes(1, range(4000))
    for flag, parameter in (("big_nose", "nose_w"), ("narrow_eyes", "eye_h"),
                            ("big_lips", "lip_l"), ("bushy_eyebrows", "brow_h"),
                            ("arched_eyebrows", "brow_arch"), ("smiling", "smile")):  # fmt: skip
        has = scenes[flag] > 0
        low, high = sorted((scenes[parameter][has], scenes[parameter][~has]), key=np.mean)
        assert high.min() - low.max() > 0.5 * (low.max() - low.min()), flag


def test_left_is_the_subjects_left():
    labels = render(sample_scenes(42, range(64)), 64).label_map
    columns = torch.arange(64.0)
    for part in ("eye", "brow", "ear"):
        left, right = ((labels == CLASS_ID[f"{side}_{part}"]).float().sum((0, 1)) for side in "lr")
        assert (left * columns).sum() / left.sum() > (right * columns).sum() / right.sum() + 8


def test_ellipse_is_a_distance_near_its_edge():
    angle = torch.linspace(0, 6.28, 50)
    for step in (-0.004, 0.0, 0.004):  # outwards from points of the edge
        x = 0.3 * angle.cos()
        y = 0.1 * angle.sin()
        nx = x / 0.09
        ny = y / 0.01
        length = (nx**2 + ny**2).sqrt()
        got = canvas.ellipse(x + step * nx / length, y + step * ny / length, 0.3, 0.1)
        assert (got - step).abs().max() < 6e-4
