"""What people bring to the converters, to `validate` and to scoring: right, or named in a line."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from face_files import convert, label_map, merged, refusal, save_image, save_mask, write_root
from PIL import Image, PngImagePlugin

from ec2face_core.attributes import NUM_CLASSES, PALETTE
from ec2face_core.data import FaceDataset
from ec2face_core.io.masks import read_mask
from ec2face_core.io.pictures import ORIENTATION
from ec2face_core.io.report import DataError, Report
from ec2face_core.io.texts import Row, read_manifest
from ec2face_lab.__main__ import main
from ec2face_lab.baselines.official import adopt, find_pictures
from ec2face_lab.prepare.captions import celeba_attributes
from ec2face_lab.prepare.convert import LEFT_OUT, celebamask_files, from_celebamask_hq, from_merged
from ec2face_lab.prepare.inventory import FFHQ_TEXT, ffhq_text_files
from ec2face_lab.prepare.validate import validate

SIZE = 16


@pytest.fixture
def source(tmp_path) -> Path:
    return merged(tmp_path / "source")


# ------------------------------------------------------------------------------------- pictures


def test_turned_photos_are_written_upright(source, tmp_path):
    face = Image.open(source / "images" / "0.png").convert("RGB")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = face.transpose(Image.Transpose.ROTATE_90)
    turned.save(source / "images" / "0.jpg", exif=exif, quality=100, subsampling=0)
    (source / "images" / "0.png").unlink()
    convert(source)
    with Image.open(tmp_path / "out" / "image" / "0.png") as written:  # so for every other reader
        assert not written.getexif()
        assert np.abs(np.asarray(written, int) - np.asarray(face, int)).max() < 40
    assert (tmp_path / "out" / "image" / "1.png").read_bytes() == (
        source / "images" / "1.png"
    ).read_bytes()  # a plain one is copied


def test_cut_outs_and_other_modes_are_written_as_plain_rgb(source, tmp_path):
    face = Image.open(source / "images" / "0.png")
    layer = face.convert("RGBA")
    layer.putalpha(Image.fromarray((label_map() > 0).astype(np.uint8) * 255))
    layer.save(source / "images" / "0.png")
    face.save(source / "images" / "1.webp", lossless=True)
    (source / "images" / "1.png").unlink()
    Image.fromarray(np.asarray(face.convert("L")).astype(np.uint16) * 257).save(
        source / "images" / "2.png"
    )
    convert(source)
    for name, path in ((n, tmp_path / "out" / "image" / f"{n}.png") for n in "012"):
        with Image.open(path) as written:
            assert written.mode == "RGB", name
    pixels = np.asarray(Image.open(tmp_path / "out" / "image" / "0.png"))
    assert (pixels[label_map() == 0] == 255).all()
    assert (np.asarray(Image.open(tmp_path / "out" / "image" / "1.png")) == np.asarray(face)).all()


def test_a_picture_with_a_large_text_is_read(source, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    path = source / "images" / "0.png"
    Image.open(path).save(path, pnginfo=info)
    convert(source)
    assert len(FaceDataset(tmp_path / "out", None)) == 4
    assert not validate(tmp_path / "out").problems


def test_droppings_are_no_faces(source, tmp_path):
    for folder in ("images", "masks"):
        for name in ("._1.png", ".DS_Store", "Thumbs.db", "._1.jpg"):
            (source / folder / name).write_bytes(b"\0\5\x16\7")
        shutil.copytree(source / folder, source / folder / ".ipynb_checkpoints")
    convert(source)
    out = tmp_path / "out"
    for kind in ("image", "mask", "text"):
        (out / kind / "._0.png").write_bytes(b"\0\5\x16\7")
    assert not validate(out).problems and len(FaceDataset(out, None)) == 4


def test_droppings_among_the_parts_and_photos(tmp_path):
    parts = tmp_path / "raw" / "CelebAMask-HQ-mask-anno" / "0"
    parts.mkdir(parents=True)
    save_mask(parts / "00000_skin.png", label_map())
    (parts / "._00000_skin.png").write_bytes(b"\0\5\x16\7")
    report = Report(tmp_path)
    _, found = celebamask_files(tmp_path / "raw", report)
    assert not report.problems and found == {"0": {"skin": parts / "00000_skin.png"}}
    for name in ("Image/1.png", "Image/._1.png", "Image/__MACOSX/1.png", "Text/001.txt"):
        path = tmp_path / FFHQ_TEXT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("A face.")
    photos, texts = ffhq_text_files(tmp_path)
    assert photos == {"1": tmp_path / FFHQ_TEXT / "Image" / "1.png"} and list(texts) == ["1"]


def test_droppings_in_a_scored_folder(tmp_path):
    root = write_root(tmp_path / "faces")
    rows = read_manifest(root)
    (root / "image" / "._4.png").write_bytes(b"\0")
    (root / "image" / ".DS_Store").write_bytes(b"\0")
    files, report = find_pictures(root / "image", "plain", rows, ["4", "5"])
    assert list(files) == ["4", "5"]
    assert not [where for where, _ in report.problems if where.startswith(".")]
    shutil.rmtree(root / "mask")
    for name in "0123":
        (root / "image" / f"{name}.png").unlink()
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    path = root / "image" / "4.png"
    face = Image.open(path).convert("RGB")
    face.transpose(Image.Transpose.ROTATE_180).save(path, exif=exif)
    folder = adopt(root / "image", "plain", rows, ["4", "5"], SIZE * 2, tmp_path / "work")
    expected = face.resize((SIZE * 2, SIZE * 2), Image.Resampling.BICUBIC)
    assert (np.asarray(Image.open(folder / "4.png")) == np.asarray(expected)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>", "HTML"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", ""),
    ],
)
def test_unreadable_pictures_are_named(source, content, reason):
    (source / "images" / "2.png").write_bytes(content)
    text = refusal(source)
    assert f"images/2.png: unreadable image ({reason}" in text and len(text.splitlines()) == 2


def test_files_of_other_formats_are_told_instead_of_missing(source):
    for kind in ("images", "masks"):
        (source / kind / "0.png").rename(source / kind / "0.tif")
    with Image.open(source / "masks" / "1.png") as mask:
        mask.convert("RGB").save(source / "masks" / "1.jpg")
    (source / "masks" / "1.png").unlink()
    (source / "images" / "2.png").unlink()
    text = refusal(source)
    assert "images/0" not in text  # neither an image nor a mask of 0 is there
    assert "masks/1.png: missing mask: 1.jpg is there, but its loss changes ids; export PNG" in text
    assert "images/2.jpg: missing image" in text


def test_an_image_of_another_format_is_told(source):
    (source / "images" / "0.png").rename(source / "images" / "0.heic")
    assert "missing image: 0.heic is there, but only .png, .jpg" in refusal(source)


# ----------------------------------------------------------------------------------------- masks


def test_masks_of_every_kind_convert_to_the_same_ids(source, tmp_path):
    ids = label_map()
    order = np.random.default_rng(0).permutation(NUM_CLASSES)
    shuffled = Image.fromarray(np.argsort(order)[ids].astype(np.uint8))
    shuffled.putpalette(np.array(PALETTE, np.uint8)[order].ravel().tolist())
    forms = {
        "0": shuffled,
        "1": Image.fromarray(ids.astype(np.uint16)),
        "2": Image.fromarray(np.array(PALETTE, np.uint8)[ids]),
        "3": Image.fromarray(np.dstack([ids] * 3)),
    }
    for name, image in forms.items():
        image.save(source / "masks" / f"{name}.png")
    convert(source)
    for name in forms:
        assert (read_mask(tmp_path / "out" / "mask" / f"{name}.png") == ids).all()
        assert Image.open(tmp_path / "out" / "mask" / f"{name}.png").mode == "P"


def test_lossy_and_foreign_masks_are_named(source):
    with Image.open(source / "masks" / "0.png") as mask:
        mask.convert("L").save(source / "masks" / "0.png", "JPEG")
    foreign = Image.fromarray(label_map())
    foreign.putpalette([(7 * i + 3) % 256 for i in range(768)])
    foreign.save(source / "masks" / "1.png")
    text = refusal(source)
    assert "masks/0.png: mask is JPEG: its loss changes ids; export PNG" in text
    assert "masks/1.png: another palette" in text


def test_smooth_edges_are_told_then_snapped(tmp_path):
    source = merged(tmp_path / "source", ["0"], 256)
    ids = label_map(64)
    smooth = Image.fromarray(np.array(PALETTE, np.uint8)[ids])
    smooth.resize((256, 256), Image.Resampling.BILINEAR).save(source / "masks" / "0.png")
    with pytest.raises(DataError, match=r"smooth .*--snap-edges"):
        from_merged(source, tmp_path / "out", size=256, progress=False)
    from_merged(source, tmp_path / "out", size=256, progress=False, snap_edges=True)
    snapped = read_mask(tmp_path / "out" / "mask" / "0.png")
    expected = ids.repeat(4, 0).repeat(4, 1)
    assert (snapped == expected).mean() > 0.98
    assert set(np.unique(snapped)) == set(np.unique(expected))


# ----------------------------------------------------------------------------------------- pairs


def test_names_that_differ_by_zeros_are_one_face(source, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "0123":
        (source / "masks" / f"{name}.png").rename(source / "masks" / f"{int(name):05d}.png")
        (texts / f"{int(name):03d}.txt").write_text(f"Face {name}.\n")
    convert(source, captions=texts)
    faces = FaceDataset(tmp_path / "out", None)
    assert faces.ids == ["0", "1", "2", "3"] and faces.captions("3") == ("Face 3.",)
    assert np.array_equal(faces[1].label_map, label_map(shift=1))


def test_celebamask_images_may_be_padded(tmp_path):
    raw = tmp_path / "raw"
    (raw / "CelebA-HQ-img").mkdir(parents=True)
    parts = raw / "CelebAMask-HQ-mask-anno" / "0"
    parts.mkdir(parents=True)
    for k in (0, 7):
        save_image(raw / "CelebA-HQ-img" / f"{k:05d}.jpg", SIZE, k)
        for name, i in (("skin", 1), ("hair", 13)):
            part = (label_map() == i).astype(np.uint8) * 255
            Image.fromarray(part).save(parts / f"{k:05d}_{name}.png")
    from_celebamask_hq(raw, tmp_path / "out", size=SIZE, train=5, progress=False)
    assert FaceDataset(tmp_path / "out", "train").ids == ["00000"]
    assert FaceDataset(tmp_path / "out", "test").ids == ["00007"]


@pytest.mark.parametrize("form", ["{}_segmentation", "mask_{}", "{}-mask"])
def test_masks_named_otherwise_are_told_in_one_line(source, form):
    for name in "0123":
        (source / "masks" / f"{name}.png").rename(source / "masks" / f"{form.format(name)}.png")
    text = refusal(source)
    assert len(text.splitlines()) == 1
    assert f"masks are named {form.format('{id}')}.png, images {{id}}.png: rename them" in text


def test_one_mistake_of_many_faces_is_twenty_lines(tmp_path):
    source = merged(tmp_path / "source", [f"{i:03d}" for i in range(60)])
    for path in (source / "masks").iterdir():
        path.unlink()
    save_mask(source / "masks" / "x.png", label_map())
    text = refusal(source)
    assert len(text.splitlines()) == 22 and text.endswith("... and 41 more")


def test_names_of_other_scripts_and_forms(tmp_path):
    source = merged(tmp_path / "source", ["Am\u00e9lie", "漢字", "a b"])
    (source / "masks" / "Am\u00e9lie.png").rename(source / "masks" / "Ame\u0301lie.png")
    convert(source)
    assert set(FaceDataset(tmp_path / "out", None).ids) == {"Am\u00e9lie", "漢字", "a b"}


# --------------------------------------------------------------------------------- skipping, notes


def test_bad_faces_can_be_skipped(source, tmp_path):
    (source / "images" / "1.png").write_bytes(b"")
    save_mask(source / "masks" / "2.png", np.full((SIZE, SIZE), 1, np.uint8))
    assert "2 problem(s)" in refusal(source)
    report = convert(source, skip_bad=True)
    assert report.faces == 2 and len(report.problems) == 2
    out = tmp_path / "out"
    assert FaceDataset(out, None).ids == ["0", "3"] and not validate(out).problems
    assert sorted(path.name for path in (out / "image").iterdir()) == ["0.png", "3.png"]
    rows = list(csv.reader((out / LEFT_OUT).open()))
    assert rows == [
        ["where", "reason"],
        ["images/1.png", "unreadable image (the file is empty)"],
        ["masks/2.png", "constant mask (every pixel is 1)"],
    ]


def test_a_missing_half_of_a_face_can_be_skipped(source, tmp_path):
    (source / "masks" / "0.png").unlink()
    (source / "images" / "3.png").unlink()
    convert(source, skip_bad=True)
    assert FaceDataset(tmp_path / "out", None).ids == ["1", "2"]


def test_skipping_every_face_is_refused(source):
    for path in (source / "images").iterdir():
        path.write_bytes(b"")
    assert "4 problem(s)" in refusal(source, skip_bad=True)


def test_a_good_conversion_leaves_no_list(source, tmp_path):
    assert not convert(source, skip_bad=True).problems
    assert not (tmp_path / "out" / LEFT_OUT).exists()


def test_the_same_picture_in_two_splits_is_told(source, tmp_path):
    for name in "123":
        shutil.copyfile(source / "images" / "0.png", source / "images" / f"{name}.png")
    with Image.open(source / "images" / "3.png") as image:
        image.save(source / "images" / "3.png", compress_level=1)  # other bytes, same pixels
    report = convert(source, train=2)
    note, composed = report.notes
    assert composed == "captions were composed from the masks"
    assert "several splits" in note and "0 (train)" in note and "3 (test)" in note
    assert validate(tmp_path / "out").notes == [note] and note in str(report)
    again = convert(merged(tmp_path / "other" / "source"), train=2)
    assert again.notes == [composed]


def test_command_line_skips_and_lists(source, tmp_path, monkeypatch, capsys):
    (source / "images" / "1.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    command = ["prepare", "convert-merged", "source", "out", "--size", str(SIZE)]
    assert main(command) == 2
    assert "images/1.png: unreadable image" in capsys.readouterr().err
    assert main([*command, "--skip-bad", "--snap-edges"]) == 0
    printed = capsys.readouterr().out
    assert "images/1.png: unreadable" in printed and "{'train': 2, 'test': 1}" in printed
    assert (tmp_path / "out" / LEFT_OUT).is_file()
    assert main(["prepare", "validate", "./out"]) == 0


# ---------------------------------------------------------------------------------- other tables

CELEBA = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose "
    "Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee "
    "Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard "
    "Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair "
    "Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young"
)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_attribute_table_of_any_editor(tmp_path, end, encoding):
    table = tmp_path / "table.txt"
    lines = ["2", CELEBA, "0.jpg " + " 1" * 40, "7.jpg  " + " -1" * 40, ""]
    table.write_bytes(end.join(lines).encode(encoding))
    faces = celeba_attributes(table)
    assert list(faces) == ["0", "7"] and faces["0"]["male"] and not faces["7"]["male"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["1"], "line 2 has no column"),
        (["1", CELEBA.replace("Male ", "")], "line 2 has no column Male"),
        (["1", CELEBA, "0.jpg " + " 1" * 39], "line 3 is no file and 40 times 1 or -1"),
        (["1", CELEBA, "", "0.jpg " + " 2" * 40], "line 4 is no file"),
        (["1", CELEBA, "0.jpg\0" + " 1" * 40], "NUL byte in line 3"),
    ],
)
def test_a_damaged_attribute_table_is_named(tmp_path, lines, reason):
    table = tmp_path / "table.txt"
    table.write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"table.txt: .*{reason}"):
        celeba_attributes(table)


@pytest.mark.parametrize(("length", "told"), [(24, True), (400, False)])
def test_validate_counts_captions_that_are_cut(tmp_path, length, told):
    from ec2face_core.config import load_profile
    from ec2face_lab.prepare.validate import note_long_captions
    from ec2face_lab.world.networks import _t5_tokenizer

    root = write_root(tmp_path / "faces")
    (root / "text" / "3.txt").write_text("She wears a hat. " * 9 + "A red one.\nSecond of 3.\n")
    tokenizer = _t5_tokenizer(["she wears a hat.", "first second of 1234"], length=length)
    tokenizer.save_pretrained(tmp_path / "flux" / "tokenizer_2")
    backbone = {"path": str(tmp_path / "flux"), "text_length": length}
    config = load_profile("mini", backbone=backbone)
    report = validate(root)
    note_long_captions(root, config, report)
    assert bool(report.notes) == told and not report.problems
    if told:
        assert "1 of 12 texts are longer than the T5 of mini (24 tokens)" in str(report)
        assert "A red one." in str(report)
    note_long_captions(
        root, config.replace(**{"backbone.path": str(tmp_path)}), report
    )  # none there


@pytest.mark.parametrize("size", [0, -5, 1])
def test_a_size_without_pixels_is_refused(source, size):
    with pytest.raises(DataError, match=f"size {size}: faces have 16 pixels or more"):
        from_merged(source, source.parent / "out", size=size, progress=False)


def test_scored_pictures_may_be_padded(tmp_path):
    rows = {"4": Row("test", 0, "A."), "5": Row("test", 0, "B."), "05": Row("test", 0, "C.")}
    for name in ("0004", "5", "05", "005"):
        save_image(tmp_path / f"{name}.png", SIZE, 0)
    files, report = find_pictures(tmp_path, "plain", rows, ["4", "5", "05"])
    assert {name: path.name for name, path in files.items()} == {
        "4": "0004.png", "5": "5.png", "05": "05.png",
    }  # fmt: skip
    assert report.problems == [("005.png", "no face 005 of this split")]
