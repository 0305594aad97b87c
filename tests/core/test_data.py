"""The data contract: loading, one report of everything bad, converters, nothing half-written."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ec2face_core.attributes import CLASS_ID, PALETTE, pixel_counts
from ec2face_core.config import load_profile
from ec2face_core.data import DataError, FaceDataset, collate, labels_from_palette, open_dataset
from ec2face_lab.__main__ import main
from ec2face_lab.prepare.captions import celeba_attributes
from ec2face_lab.prepare.convert import from_celebamask_hq, from_merged, paint_parts
from ec2face_lab.prepare.validate import validate


def label_map(size: int = 16) -> np.ndarray:
    """A schematic face, sides as CelebAMask-HQ has them: l_eye at image right."""
    unit = size // 16
    ids = np.zeros((16, 16), np.uint8)
    ids[3:15, 3:13] = CLASS_ID["skin"]
    ids[0:4, 2:14] = CLASS_ID["hair"]
    ids[6, 4:7] = CLASS_ID["r_eye"]
    ids[6, 9:12] = CLASS_ID["l_eye"]
    ids[11, 6:10] = CLASS_ID["mouth"]
    return ids.repeat(unit, 0).repeat(unit, 1)


def save_mask(path: Path, ids: np.ndarray) -> None:
    picture = Image.fromarray(ids)
    picture.putpalette([value for rgb in PALETTE for value in rgb])
    picture.save(path)


def save_image(path: Path, size: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """Six faces of 16 px, written by hand: four of train, two of test."""
    folder = tmp_path / "faces"
    for kind in ("image", "mask", "text"):
        (folder / kind).mkdir(parents=True)
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "caption_index", "caption"])
        for i in range(6):
            save_image(folder / "image" / f"{i}.png", 16, i)
            save_mask(folder / "mask" / f"{i}.png", np.roll(label_map(), i % 2, axis=1))
            (folder / "text" / f"{i}.txt").write_text(f"First, {i}.\nSecond of {i}.\n")
            caption = f"Second of {i}." if i % 2 else f"First, {i}."
            writer.writerow([i, "train" if i < 4 else "test", i % 2, caption])
    return folder


def test_items(root):
    faces = FaceDataset(root, "train")
    assert faces.ids == ["0", "1", "2", "3"] and len(faces) == 4
    face = faces[1]
    pixels = np.array(Image.open(root / "image" / "1.png"))
    assert face.image.dtype == torch.float32
    assert torch.equal(
        ((face.image + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels)
    )
    assert face.label_map.dtype == torch.int64
    assert np.array_equal(face.label_map, np.roll(label_map(), 1, axis=1))
    assert face.captions == ("First, 1.", "Second of 1.")
    assert faces.caption("1", 0) == "First, 1." and faces.manifest_caption("1") == "Second of 1."
    assert FaceDataset(root, "test").ids == ["4", "5"]
    assert len(FaceDataset(root, None)) == 6 and FaceDataset(root, None, limit=3).ids == [
        "0",
        "1",
        "2",
    ]


def test_resizing_and_batches(root):
    faces = FaceDataset(root, "train", size=8)
    batch = collate([faces[0], faces[1]])
    assert batch["image"].shape == (2, 3, 8, 8) and batch["label_map"].shape == (2, 8, 8)
    assert batch["id"] == ["0", "1"] and batch["captions"][0] == ("First, 0.", "Second of 0.")
    assert set(batch["label_map"].unique().tolist()) <= set(np.unique(label_map()).tolist())
    assert batch["image"].abs().max() <= 1
    # antialiased: halving noise averages it, subsampling would keep its spread
    assert batch["image"].std() < 0.75 * FaceDataset(root, "train")[0].image.std()
    larger = FaceDataset(root, "train", size=32)[0]
    assert np.array_equal(larger.label_map, label_map(32))


def test_label_counts(root):
    faces = FaceDataset(root, "train")
    expected = pixel_counts(torch.stack([face.label_map for face in faces])).sum(0)
    counts = faces.label_counts()
    assert counts.dtype == torch.int64 and torch.equal(counts, expected)
    counts += 1  # the cache is not handed out
    assert torch.equal(faces.label_counts(), expected)


def test_opening_names_what_is_missing(root):
    with pytest.raises(DataError, match=r"'val'.*'train': 4"):
        FaceDataset(root, "val")
    (root / "image" / "2.png").unlink()
    (root / "text" / "3.txt").unlink()
    with pytest.raises(DataError) as caught:
        FaceDataset(root, "train")
    assert [where for where, _ in caught.value.report.problems] == ["image/2.png", "text/3.txt"]
    assert FaceDataset(root, "test")[0].id == "4"


def damage_all(root: Path) -> dict[str, str]:
    """Break one file after another; returns what the report must say of each."""
    wrong = label_map()
    wrong[0, 0] = 19
    save_mask(root / "mask" / "0.png", wrong)
    (root / "image" / "0.png").write_bytes((root / "image" / "0.png").read_bytes()[:200])
    save_mask(root / "mask" / "1.png", np.full((16, 16), 13, np.uint8))
    (root / "text" / "1.txt").write_bytes("Café".encode("latin-1"))
    save_mask(root / "mask" / "2.png", label_map(32))
    (root / "text" / "2.txt").write_text(" \n")
    save_image(root / "image" / "3.png", 32, 3)
    save_mask(root / "mask" / "3.png", label_map(32))
    (root / "text" / "3.txt").unlink()
    (root / "image" / "4.png").unlink()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(root / "mask" / "4.png")
    Image.fromarray(np.zeros((16, 8, 3), np.uint8)).save(root / "image" / "5.png")
    save_image(root / "image" / "77.png", 16, 7)
    save_image(root / "image" / "1.jpg", 16, 7)
    with open(root / "manifest.csv", "a") as file:
        file.write("4,train,0,again\n5,test,1,again\n9,test,0,Nobody.\n,test,0,x\n")
    return {
        "mask/0.png": "label 19 above 18",
        "image/0.png": "unreadable image",
        "mask/1.png": "constant mask",
        "text/1.txt": "not UTF-8",
        "mask/2.png": "mask 32x32, image 16x16",
        "text/2.txt": "empty caption",
        "image/3.png": "wrong size 32, the others 16",
        "text/3.txt": "missing text",
        "image/4.png": "missing image",
        "mask/4.png": "mask is RGB",
        "image/5.png": "wrong size 8x16",
        "image/77.png": "no row in manifest",
        "image/1.png": "duplicate id: 1.jpg",
        "image/9.png": "missing image",
        "mask/9.png": "missing mask",
        "text/9.txt": "missing text",
        "manifest.csv row 8": "overlapping splits: id 4 is test",
        "manifest.csv row 9": "duplicate id 5",
        "manifest.csv row 11": "id ''",
    }


def test_one_report_of_everything(root, capsys):
    assert not validate(root).problems
    assert main(["prepare", "validate", str(root)]) == 0
    expected = damage_all(root)
    report = validate(root)
    found = dict(report.problems)
    assert found.keys() == expected.keys()
    for where, reason in expected.items():
        assert reason in found[where], (where, found[where])
    with pytest.raises(DataError) as caught:
        report.raise_if_bad()
    assert caught.value.report is report
    capsys.readouterr()
    assert main(["prepare", "validate", str(root)]) == 2
    printed = capsys.readouterr().err
    assert all(where in printed for where in expected)


def test_other_reports(root):
    text = (root / "text" / "0.txt").read_text()
    (root / "text" / "0.txt").write_text("Changed.\n" + text)
    assert validate(root).problems == [("text/0.txt", "manifest caption 0 is not its line")]
    (root / "text" / "0.txt").write_text(text)
    for path in (root / "mask").iterdir():  # mirrored without exchanging the sides
        save_mask(path, np.array(Image.open(path))[:, ::-1].copy())
    (where, reason), *others = validate(root).problems
    assert where == "mask" and "left and right are exchanged" in reason and not others
    (root / "manifest.csv").write_text("id,caption\n")
    assert "columns" in validate(root).problems[0][1]
    (root / "manifest.csv").unlink()
    assert "unreadable" in validate(root).problems[0][1]


def test_a_bad_item_names_its_file(root):
    save_mask(root / "mask" / "0.png", np.full((16, 16), 3, np.uint8))
    with pytest.raises(DataError, match=r"mask.0\.png: constant mask"):
        FaceDataset(root)[0]


PARTS = ["skin", "hair", "l_eye", "r_eye", "mouth"]


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
                part[3:15, 3:13] = True
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
    # painted in id order: eyes and mouth lie on the skin; hair (13) lies on the skin too
    assert np.array_equal(test[0].label_map, label_map())
    assert (
        test[0].captions == ("Face 2001.", "Another.")
        and test.manifest_caption("2001") == "Face 2001."
    )
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


def test_conversion_reports_all_then_resumes(raw, tmp_path, capsys):
    images, annotation = raw / "CelebA-HQ-img", raw / "CelebAMask-HQ-mask-anno"
    good = (images / "1.jpg").read_bytes()
    (images / "1.jpg").write_bytes(b"nothing")
    shutil.move(annotation / "1" / "02001_hair.png", annotation / "1" / "02001_hare.png")
    (images / "7.jpg").write_bytes(good)
    out = tmp_path / "out"
    arguments = ["convert-celebamask", str(raw), str(out), "--size", "16", "--train", "2000"]
    assert main(["prepare", *arguments]) == 2
    printed = capsys.readouterr().err
    for words in (
        "1.jpg: unreadable",
        "02001_hare.png: is no part",
        "00007_skin.png: no mask part",
    ):
        assert words in printed
    assert not out.exists()
    finished = tmp_path / ".out.partial" / "image" / "0.png"
    before = finished.stat().st_mtime_ns
    (images / "1.jpg").write_bytes(good)
    (images / "7.jpg").unlink()
    shutil.move(annotation / "1" / "02001_hare.png", annotation / "1" / "02001_hair.png")
    assert main(["prepare", *arguments]) == 0
    assert "'train': 2, 'test': 1" in capsys.readouterr().out
    assert (out / "image" / "0.png").stat().st_mtime_ns == before  # was not converted again
    assert not (tmp_path / ".out.partial").exists()
    caption = FaceDataset(out, "train").manifest_caption("0")  # composed from the mask
    assert caption.endswith(".") and "earrings" not in caption


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
        "male",
        "beard",
        "hair_colour",
        "hair_style",
        "hat",
    }
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
    assert (
        face.id == "b" and np.array_equal(face.label_map, label_map()) and len(face.captions) == 10
    )
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
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_colours_near_and_far():
    ids = label_map()
    rgb = np.array(PALETTE)[ids]
    noisy = (
        (rgb + np.random.default_rng(0).integers(-8, 9, rgb.shape)).clip(0, 255).astype(np.uint8)
    )
    assert np.array_equal(labels_from_palette(noisy), ids)
    rgb[ids == CLASS_ID["mouth"]] = (51, 255, 255)  # another CelebAMask-HQ tool's r_brow
    with pytest.raises(DataError, match=r"\(51, 255, 255\).*another palette"):
        labels_from_palette(rgb.astype(np.uint8))


def test_open_dataset(tmp_path):
    data = {
        "root": str(tmp_path / "first"),
        "zero_shot_root": str(tmp_path / "second"),
        "train": 3,
        "test": 2,
        "zero_shot": 2,
        "validation": 2,
        "size": 32,
    }
    config = load_profile("smoke", data=data)
    train, test = open_dataset(config, "train"), open_dataset(config, "test")
    zero_shot = open_dataset(config, "zero_shot")
    assert (len(train), len(test), len(zero_shot)) == (3, 2, 2)
    assert not set(train.ids) & set(test.ids)
    assert train[0].image.shape == (3, 32, 32) and len(train[0].captions) == 10
    assert len(zero_shot[0].captions) == 9
    assert not validate(tmp_path / "first").problems
    validation = open_dataset(config, "validation")
    assert len(validation) == 2 and not validation[0].image.equal(train[0].image)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "first-validation", "second"]
    with pytest.raises(DataError, match=r"data\.train asks for 4"):
        open_dataset(config.replace(**{"data.train": 4}), "train")
    with pytest.raises(DataError, match=r"--help.*data\.root"):
        open_dataset(load_profile("paper", **{"data.root": str(tmp_path / "none")}), "train")
    with pytest.raises(DataError, match="'val'"):
        open_dataset(config, "val")
