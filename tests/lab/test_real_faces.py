"""Real CelebAMask-HQ faces through the same code. Skipped where they are absent: see FACES."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ec2face_core.attributes import CLASS_ID, NUM_CLASSES, flip_labels
from ec2face_core.data import FaceDataset
from ec2face_core.io.masks import read_mask
from ec2face_core.io.paths import ROOT
from ec2face_core.runs import parallel
from ec2face_lab.prepare.convert import from_merged
from ec2face_lab.prepare.validate import validate

FACES = Path(
    os.environ.get("EC2FACE_REAL_FACES", ROOT.parent / "shared" / "data" / "celebamask-hq-1000")
)
pytestmark = pytest.mark.skipif(
    not (FACES / "images").is_dir(),
    reason=f"no real faces: put images/*.jpg and masks/*.png (CelebAMask-HQ) into {FACES}, "
    "or name their folder in EC2FACE_REAL_FACES",
)
CONVERTED = 40  # faces that go through conversion, loading, caches and training


@pytest.fixture(scope="module")
def real_root(tmp_path_factory) -> Path:
    """The first faces, converted to 64 px: 36 train, 4 test, captions composed from the masks."""
    source = tmp_path_factory.mktemp("real") / "source"
    for kind in ("images", "masks"):
        (source / kind).mkdir(parents=True)
        for path in sorted((FACES / kind).iterdir())[:CONVERTED]:
            (source / kind / path.name).symlink_to(path)
    out = source.parent / "faces"
    from_merged(source, out, size=64, progress=False)
    return out


@pytest.fixture(scope="module")
def counts() -> torch.Tensor:
    """Pixels of each class in each of all masks, `(n, 19)`, at the files' 512 px."""

    def count(path: Path) -> torch.Tensor:
        ids = torch.from_numpy(read_mask(path)).flatten()
        return torch.bincount(ids, minlength=NUM_CLASSES)

    return torch.stack(list(parallel(count, sorted((FACES / "masks").glob("*.png")))))


def test_conversion_and_loading(real_root):
    assert not validate(real_root).problems
    train, test = FaceDataset(real_root, "train"), FaceDataset(real_root, "test", size=32)
    assert (len(train), len(test)) == (36, 4)
    face = train[0]
    assert face.image.shape == (3, 64, 64) and face.label_map.shape == (64, 64)
    assert -1 <= face.image.min() < -0.5 < 0.3 < face.image.max() <= 1
    assert test[0].label_map.shape == (32, 32)
    original = read_mask(FACES / "masks" / f"{face.id}.png")
    assert torch.equal(face.label_map[0], torch.from_numpy(original).long()[4, 4::8])  # nearest
    with Image.open(FACES / "images" / f"{face.id}.jpg") as picture:
        box = picture.convert("RGB").reduce(8)  # mean of 8 x 8 pixels
    pixels = torch.from_numpy(np.array(box)).permute(2, 0, 1) / 127.5 - 1
    assert (pixels - face.image).abs().mean() < 0.05


def test_captions_say_what_the_masks_show(real_root):
    faces = FaceDataset(real_root, None)
    words = {"earrings": "ear_r", "necklace": "neck_l", "eyeglasses": "eye_g", "hat": "hat"}
    mentions = 0
    for face in faces:
        text = " ".join(face.captions).lower()
        for word, name in words.items():
            if re.search(rf"\b{word}\b", text):
                mentions += 1
                assert (face.label_map == CLASS_ID[name]).any(), (face.id, text)
    assert mentions >= 5


def test_frequencies_are_the_known_ones(counts):
    """Measured values of the folder: share of pixels / of images, in percent."""
    pixels = 100 * counts.sum(0) / counts.sum()
    images = 100 * (counts > 0).float().mean(0)
    known = {  # class: (share of pixels, share of images)
        "ear_r": (0.204, 23.4),
        "neck_l": (0.009, 4.5),
        "eye_g": (0.325, 5.8),
        "hat": (1.11, 5.3),
    }
    for name, (pixel_share, image_share) in known.items():
        assert float(pixels[CLASS_ID[name]]) == pytest.approx(pixel_share, rel=0.15), name
        assert float(images[CLASS_ID[name]]) == pytest.approx(image_share, abs=1.5), name
    for name, pixel_share in {"hair": 31.0, "skin": 25.5, "background": 28.8, "neck": 4.1}.items():
        assert float(pixels[CLASS_ID[name]]) == pytest.approx(pixel_share, abs=1.5), name


def test_the_subjects_left_is_image_right(real_root):
    maps = torch.stack([face.label_map for face in FaceDataset(real_root, None)])
    for labels in (maps, flip_labels(maps)):
        left, right = (
            (labels == CLASS_ID[name]).nonzero()[:, 2].float().mean() for name in ("l_eye", "r_eye")
        )
        assert left - right > 8


@pytest.mark.slow
def test_real_faces_are_cached_and_trained_on(real_root, tiny_config, tmp_path):
    from ec2face_core.runs import read_metrics
    from ec2face_core.trainer import Trainer

    config = tiny_config.replace(
        data={"root": str(real_root), "procedural": False},
        trainer={"steps": 3, "batch_size": 4},
    )
    trainer = Trainer(config, "both", tmp_path / "run")
    final = trainer.fit()
    faces = FaceDataset(real_root, "train")
    assert torch.equal(trainer.cache.label_counts(), faces.label_counts())
    ids = [faces.ids[5], faces.ids[1]]
    maps = torch.stack([faces[5].label_map, faces[1].label_map])
    assert torch.equal(trainer.cache.label_maps(ids), maps)
    assert all(trainer.cache.captions(id)[0] == faces.captions(id)[0] for id in ids)
    rows = read_metrics(final.parent)
    assert len(rows) == 3 and all(row["text"] > 0 and row["mask"] > 0 for row in rows)
