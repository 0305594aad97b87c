"""Converters: masks painted, splits, captions; all or nothing, and resumable."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from face_files import label_map, save_image
from PIL import Image

from ec2face_core.attributes import CLASS_ID, PALETTE
from ec2face_core.data import FaceDataset
from ec2face_core.io.report import DataError
from ec2face_lab.prepare.captions import celeba_attributes
from ec2face_lab.prepare.convert import from_celebamask_hq, from_merged, paint_parts
from ec2face_lab.prepare.validate import validate

PARTS = ["skin", "hair", "l_eye", "r_eye", "mouth", "nose", "l_brow", "r_brow", "neck"]


@pytest.fixture
def raw(tmp_path) -> Path:
    """Raw CelebAMask-HQ: 32 px images, 16 px part files that overlap; ids 0, 1 and 2001."""
    folder = tmp_path / "CelebAMask-HQ"
    (folder / "CelebA-HQ-img").mkdir(parents=True)
    for k in (0, 1, 2001):
        save_image(folder / "CelebA-HQ-img" / f"{k}.jpg", 32, k)
        annotation = folder / "CelebAMask-HQ-mask-anno" / str(k // 2000)
        annotation.mkdir(parents=True, exist_ok=True)
        for name in PARTS:
            part = label_map() == CLASS_ID[name]
            if name == "skin":  # the real skin part lies under eyes and mouth
                part[4:14, 3:13] = True
            rgb = np.repeat((part * 255).astype(np.uint8)[..., None], 3, -1)
            Image.fromarray(rgb).save(annotation / f"{k:05d}_{name}.png")
    return folder


def test_celebamask_hq(raw, tmp_path):
    texts = raw / "text"
    texts.mkdir()
    for k in (0, 1, 2001):
        (texts / f"{k}.txt").write_text(f"Face {k}.\nAnother.\n")
    out = tmp_path / "out"
    from_celebamask_hq(raw, out, size=16, train=2000, progress=False)
    train, test = FaceDataset(out, "train"), FaceDataset(out, "test")
    assert train.ids == ["0", "1"] and test.ids == ["2001"]
    # painted in id order: eyes, nose and mouth lie on the skin
    assert np.array_equal(test[0].label_map, label_map())
    assert test[0].captions == ("Face 2001.", "Another.")
    assert test.manifest_caption("2001") == "Face 2001."
    assert Image.open(out / "mask" / "0.png").getpalette()[3:6] == list(PALETTE[1])
    assert sorted(p.name for p in out.iterdir()) == ["image", "manifest.csv", "mask", "text"]
    assert not validate(out).problems
    with pytest.raises(DataError, match="exists already"):
        from_celebamask_hq(raw, out, size=16)


def test_later_parts_paint_over_earlier(tmp_path):
    for name in ("eye_g", "l_eye", "neck_l", "neck"):
        Image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / f"{name}.png")
    paths = {name: tmp_path / f"{name}.png" for name in ("neck", "eye_g", "neck_l", "l_eye")}
    assert (paint_parts(paths) == CLASS_ID["neck"]).all()
    del paths["neck"], paths["neck_l"]
    assert (paint_parts(paths) == CLASS_ID["l_eye"]).all()


def test_conversion_reports_all_then_resumes(raw, tmp_path):
    images = raw / "CelebA-HQ-img"
    annotation = raw / "CelebAMask-HQ-mask-anno"
    good = (images / "1.jpg").read_bytes()
    (images / "1.jpg").write_bytes(b"nothing")
    shutil.move(annotation / "1" / "02001_hair.png", annotation / "1" / "02001_hare.png")
    (images / "7.jpg").write_bytes(good)
    out = tmp_path / "out"
    with pytest.raises(DataError) as caught:
        from_celebamask_hq(raw, out, size=16, train=2000, progress=False)
    for problem in (
        "1.jpg: unreadable",
        "02001_hare.png: is no part",
        "00007_skin.png: no mask part",
    ):
        assert problem in str(caught.value)
    assert not out.exists()
    before = (tmp_path / ".out.partial" / "image" / "0.png").stat().st_mtime_ns
    (images / "1.jpg").write_bytes(good)
    (images / "7.jpg").unlink()
    shutil.move(annotation / "1" / "02001_hare.png", annotation / "1" / "02001_hair.png")
    from_celebamask_hq(raw, out, size=16, train=2000, progress=False)
    assert FaceDataset(out, "train").ids == ["0", "1"]
    assert (out / "image" / "0.png").stat().st_mtime_ns == before  # was not converted again
    assert not (tmp_path / ".out.partial").exists()
    caption = FaceDataset(out, "train").manifest_caption("0")  # composed from the mask
    assert caption.endswith(".") and "earrings" not in caption


def test_a_conversion_takes_up_other_captions_and_sizes(raw, tmp_path):
    out = tmp_path / "out"
    texts = tmp_path / "texts"
    texts.mkdir()
    for k in (0, 1, 9, 2001):
        (texts / f"{k}.txt").write_text(f"Face {k}.\n")
    (raw / "CelebA-HQ-img" / "9.jpg").write_bytes(b"nothing")
    for size in (32, 16):  # first the images' own bytes are kept, then they are not
        with pytest.raises(DataError, match="no mask part"):
            from_celebamask_hq(raw, out, texts, size, 2000, progress=False)
    (raw / "CelebA-HQ-img" / "9.jpg").unlink()
    (texts / "0.txt").write_text("A new one.\n")
    from_celebamask_hq(raw, out, texts, 16, 2000, progress=False)
    faces = FaceDataset(out, None)
    assert faces.captions("0") == ("A new one.",) and faces[0].image.shape == (3, 16, 16)


def test_celeba_attributes_become_captions(raw, tmp_path):
    names = (
        "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips "
        "Big_Nose Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin "
        "Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open "
        "Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline "
        "Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat "
        "Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young"
    )
    true = {"Male", "Goatee", "Blond_Hair", "Wavy_Hair", "Wearing_Hat"}
    values = " ".join("1" if name in true else "-1" for name in names.split())
    table = raw / "CelebAMask-HQ-attribute-anno.txt"
    table.write_text(f"3\n{names}\n" + "".join(f"{k}.jpg  {values}\n" for k in (0, 1, 2001)))
    face = celeba_attributes(table)["2001"]
    assert {k for k, v in face.items() if v} == {
        "male", "beard", "hair_colour", "hair_style", "hat",
    }  # fmt: skip
    assert (face["hair_colour"], face["hair_style"], face["young"]) == ("blond", "wavy", False)
    out = tmp_path / "out"
    from_celebamask_hq(raw, out, size=16, progress=False)
    joined = " ".join(FaceDataset(out, "train").captions("0"))
    assert "hat" in joined and "beard" in joined and "woman" not in joined


@pytest.mark.parametrize("colours", [False, True])
def test_merged_folders(tmp_path, colours):
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    (source / "masks").mkdir()
    for name in ("b", "a", "10", "9"):
        save_image(source / "images" / f"{name}.jpg", 16, 1)
        ids = label_map()
        picture = Image.fromarray(np.array(PALETTE, np.uint8)[ids] if colours else ids)
        picture.save(source / "masks" / f"{name}.png")
    out = tmp_path / "out"
    from_merged(source, out, size=16, train=3, progress=False)
    assert FaceDataset(out, "train").ids == ["9", "10", "a"]  # natural order
    face = FaceDataset(out, "test")[0]
    assert face.id == "b" and len(face.captions) == 10
    assert np.array_equal(face.label_map, label_map())
    jpeg = (source / "images" / "a.jpg").read_bytes()
    assert (out / "image" / "a.jpg").read_bytes() == jpeg  # not compressed twice


def test_exchanged_sides_are_not_converted(tmp_path):
    source = tmp_path / "source"
    (source / "face").mkdir(parents=True)
    (source / "mask").mkdir()
    save_image(source / "face" / "0.png", 16, 0)
    Image.fromarray(label_map()[:, ::-1].copy()).save(source / "mask" / "0.png")
    with pytest.raises(DataError, match="exchanged"):
        from_merged(source, tmp_path / "out", size=16, progress=False)
    assert not (tmp_path / "out").exists()
    Image.fromarray(label_map()).save(source / "mask" / "0.png")
    from_merged(source, tmp_path / "out", size=16, progress=False)
    assert np.array_equal(FaceDataset(tmp_path / "out", None)[0].label_map, label_map())
