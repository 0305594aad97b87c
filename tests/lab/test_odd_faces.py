"""A conversion keeps no face of another source, loses no finished one, and finds all captions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from face_files import convert, label_map, merged, refusal, save_image, save_mask
from PIL import Image

from ec2face_core.attributes import CLASS_ID, PALETTE
from ec2face_core.data import FaceDataset
from ec2face_core.io.masks import read_mask
from ec2face_core.io.pictures import read_image
from ec2face_core.io.report import DataError
from ec2face_core.io.texts import MAX_CAPTION
from ec2face_lab.__main__ import main
from ec2face_lab.prepare.convert import LEFT_OUT, from_celebamask_hq, from_merged
from ec2face_lab.prepare.validate import validate

SIZE = 16
COMPOSED = "captions were composed from the masks"


@pytest.fixture
def source(tmp_path) -> Path:
    return merged(tmp_path / "source")


def break_last(source: Path) -> bytes:
    """Empty a mask, so that a conversion stops with the other faces written; returns the mask."""
    path = source / "masks" / "3.png"
    content = path.read_bytes()
    path.write_bytes(b"")
    return content


# ----------------------------------------------------------------------------------- resuming


def test_a_resumed_conversion_keeps_no_face_of_another_source(source, tmp_path):
    break_last(source)
    assert "the file is empty" in refusal(source)
    other = merged(tmp_path / "other", seed=100)
    (other / "masks" / "0.png").write_bytes((other / "masks" / "1.png").read_bytes())
    from_merged(other, tmp_path / "out", size=SIZE, progress=False)
    for name in "0123":
        written = np.asarray(read_image(tmp_path / "out" / "image" / f"{name}.png"))
        assert (written == np.asarray(read_image(other / "images" / f"{name}.png"))).all()
        mask = read_mask(tmp_path / "out" / "mask" / f"{name}.png")
        assert (mask == read_mask(other / "masks" / f"{name}.png")).all()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "image", "manifest.csv", "mask", "text",
    ]  # fmt: skip


def new_image(source: Path) -> None:
    save_image(source / "images" / "0.png", SIZE, 77)


def new_mask(source: Path) -> None:
    save_mask(source / "masks" / "0.png", label_map(SIZE, 1))


def image_of_the_old_time(source: Path) -> None:
    path = source / "images" / "0.png"
    times = path.stat()
    new_image(source)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def new_suffix(source: Path) -> None:
    path = source / "images" / "0.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()


def new_captions(source: Path) -> None:
    (source / "captions").mkdir()
    for name in "0123":
        (source / "captions" / f"{name}.txt").write_text(f"Face {name}.\n")


@pytest.mark.parametrize(
    "change", [new_image, new_mask, image_of_the_old_time, new_suffix, new_captions]
)
def test_a_resumed_conversion_is_the_one_from_the_start(source, tmp_path, change):
    content = break_last(source)
    refusal(source)
    kept = tmp_path / ".out.partial" / "image" / "1.png"
    before = kept.stat().st_mtime_ns
    change(source)
    (source / "masks" / "3.png").write_bytes(content)
    convert(source)
    from_merged(source, tmp_path / "anew", size=SIZE, progress=False)
    for path in (p for p in (tmp_path / "anew").rglob("*") if p.is_file()):
        again = tmp_path / "out" / path.relative_to(tmp_path / "anew")
        assert again.read_bytes() == path.read_bytes(), path
    if change is not new_captions:
        kept = tmp_path / "out" / "image" / "1.png"
        assert kept.stat().st_mtime_ns == before  # was not made again


def test_composed_captions_do_not_outlive_those_of_files(source, tmp_path):
    new_captions(source)
    content = break_last(source)
    refusal(source)
    shutil.rmtree(source / "captions")
    (source / "masks" / "3.png").write_bytes(content)
    assert COMPOSED in convert(source).notes
    assert "Face 0." not in FaceDataset(tmp_path / "out", None).captions("0")


def test_snapped_masks_are_not_those_that_were_read(source, tmp_path):
    rgb = np.array(PALETTE, np.uint8)[label_map()]
    for column, red in ((4, 226), (6, 228), (8, 230), (10, 232)):
        rgb[12, column] = (red, 0, 0)  # between u_lip and skin, which surrounds it
    Image.fromarray(rgb).save(source / "masks" / "0.png")
    content = break_last(source)
    refusal(source)
    assert read_mask(tmp_path / ".out.partial" / "mask" / "0.png")[12, 8] != CLASS_ID["skin"]
    (source / "masks" / "3.png").write_bytes(content)
    convert(source, snap_edges=True)
    assert read_mask(tmp_path / "out" / "mask" / "0.png")[12, 8] == CLASS_ID["skin"]


def test_parts_of_another_download_are_painted_anew(tmp_path):
    raw = tmp_path / "raw"
    (raw / "CelebA-HQ-img").mkdir(parents=True)
    parts = raw / "CelebAMask-HQ-mask-anno" / "0"
    parts.mkdir(parents=True)
    for k in (0, 1):
        save_image(raw / "CelebA-HQ-img" / f"{k}.jpg", SIZE, k)
        for name in ("skin", "hair"):
            part = (label_map() == CLASS_ID[name]).astype(np.uint8) * 255
            Image.fromarray(part).save(parts / f"{k:05d}_{name}.png")
    whole = (parts / "00001_hair.png").read_bytes()
    (parts / "00001_hair.png").write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        from_celebamask_hq(raw, tmp_path / "out", size=SIZE, progress=False)
    (parts / "00001_hair.png").write_bytes(whole)
    (parts / "00000_hair.png").rename(parts / "00000_hat.png")
    report = from_celebamask_hq(raw, tmp_path / "out", size=SIZE, progress=False)
    ids = read_mask(tmp_path / "out" / "mask" / "0.png")
    assert CLASS_ID["hat"] in ids and CLASS_ID["hair"] not in ids
    assert report.notes == [COMPOSED, "every face (2) is of the split train: none is left to test"]


# ---------------------------------------------------------------------------------- odd faces


def renamed(source: Path, name: str) -> None:
    for kind in ("images", "masks"):
        path = os.fsencode(source / kind)
        os.rename(os.path.join(path, b"0.png"), os.path.join(path, os.fsencode(name) + b".png"))


@pytest.mark.parametrize(
    "name", ["0 ", "0\u200b", "a\\b", "a\nb", "a\tb", "\udcff\udcfe", "a\u00a0b", "9" * 200]
)
def test_a_face_of_an_odd_name_is_one_bad_face(source, tmp_path, name):
    renamed(source, name)
    text = refusal(source)
    text.encode()  # any terminal shows it
    assert len(text.splitlines()) == 2 and "rename the files of this face" in text
    written = tmp_path / ".out.partial" / "image" / "1.png"
    before = written.stat().st_mtime_ns
    report = convert(source, skip_bad=True)
    out = tmp_path / "out"
    assert report.faces == 3 and FaceDataset(out, None).ids == ["1", "2", "3"]
    assert (out / "image" / "1.png").stat().st_mtime_ns == before
    assert "rename the files" in (out / LEFT_OUT).read_text("utf-8")
    assert not validate(out).problems


@pytest.mark.parametrize("name", ["²", "٣", "Ⅻ", "①", 'a, "b"', "=1+1", "NA", "é ü", "9" * 160])
def test_a_face_of_a_rare_name_is_converted(source, tmp_path, name):
    renamed(source, name)
    convert(source)
    assert set(FaceDataset(tmp_path / "out", None).ids) == {name, "1", "2", "3"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a" * (MAX_CAPTION + 1), "131,073 characters are no caption"),
        ('["She smiles."]', "holds JSON"),
        ("0,She smiles.", "holds a table"),
        ("", "empty caption file"),
    ],
)
def test_a_face_of_an_odd_caption_is_one_bad_face(source, tmp_path, content, reason):
    new_captions(source)
    (source / "captions" / "0.txt").write_text(content)
    text = refusal(source)
    assert f"captions/0.txt: {reason}" in text.replace("line 1: ", "")
    convert(source, skip_bad=True)
    assert FaceDataset(tmp_path / "out", None).ids == ["1", "2", "3"]


@pytest.mark.parametrize("side", [1, 2, 15])
def test_a_tiny_picture_is_one_bad_face(source, tmp_path, side):
    save_image(source / "images" / "0.png", side, 0)
    assert f"images/0.png: {side}x{side}: faces have 16 pixels or more" in refusal(source)
    assert convert(source, skip_bad=True).faces == 3


def test_wrong_sides_of_all_faces_keep_the_finished_ones(source, tmp_path):
    for name in "0123":
        save_mask(source / "masks" / f"{name}.png", label_map()[:, ::-1].copy())
    assert "exchanged" in refusal(source)
    assert len(list((tmp_path / ".out.partial" / "image").iterdir())) == 4


# ----------------------------------------------------------------------------------- captions


def beside(path: str, content: str):
    def write(source: Path) -> None:
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_text(content)

    return write


@pytest.mark.parametrize(
    "path",
    [
        "captions.csv", "captions.json", "Captions.TSV", "caption_list.txt", "text.json",
        "celeba-caption.txt", "images/captions.jsonl", "prompts.yaml", "my_captions.xlsx",
    ],
)  # fmt: skip
def test_a_table_of_captions_is_named(source, path):
    beside(path, "0,hello\n")(source)
    text = refusal(source)
    assert len(text.splitlines()) == 1
    assert f"{source / path} looks like captions" in text and "--captions" in text


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("faces.csv", "id,caption\n0,hello\n"),
        ("images/metadata.jsonl", '{"file_name": "0.png", "text": "hello"}\n'),
        ("metadata.csv", "file_name,text\n0.png,hello\n"),
        ("labels.json", '{"0": "She smiles at you."}'),
        ("list.txt", "0.png\tShe smiles.\n1.png\tA man.\n"),
        ("faces.tsv", "00\tShe smiles.\n"),
    ],
)
def test_a_table_of_captions_is_told_by_its_content(source, path, content):
    beside(path, content)(source)
    assert f"{source / path} looks like captions" in refusal(source)


@pytest.mark.parametrize("folder", ["images", "masks", "descr", "labels", "."])
def test_texts_in_other_folders_are_named_then_read(source, tmp_path, folder):
    for name in "0123":
        beside(f"{folder}/{name}.txt", f"Face {name} smiles.\n")(source)
    text = refusal(source)
    assert len(text.splitlines()) == 1
    assert "0.txt looks like a caption: name the folder of the 4 captions" in text
    report = convert(source, captions=source / folder)
    assert not report.notes
    assert FaceDataset(tmp_path / "out", None).captions("2") == ("Face 2 smiles.",)


@pytest.mark.parametrize("folder", ["caption", "Captions", "TEXT", "texts", "prompts", "captions"])
def test_folders_of_captions_are_found_by_name(source, tmp_path, folder):
    for name in "0123":
        beside(f"{folder}/{name}.TXT", f"Face {name}.\n")(source)
    assert not convert(source).notes
    assert FaceDataset(tmp_path / "out", None).captions("2") == ("Face 2.",)


def test_two_folders_of_captions_are_named(source):
    for folder in ("captions", "text"):
        beside(f"{folder}/0.txt", "Face 0.\n")(source)
    assert "holds several folders of captions, captions, text" in refusal(source)


@pytest.mark.parametrize("suffix", [".json", ".caption", ".csv", ".TXT.txt.bak"])
def test_captions_of_another_format_are_told(source, suffix):
    for name in "0123":
        beside(f"captions/{name}{suffix}", "A face.")(source)
    text = refusal(source)
    if suffix.count(".") == 1:
        expected = f"captions/0.txt: missing text: 0{suffix} is there, but only .txt is read"
        assert expected in text
    assert text.count("missing text") == 4


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("README.txt", "Faces of 2024, 0 to 3, with captions to come: none yet"),
        ("CelebA-HQ-to-CelebA-mapping.txt", "idx orig_idx orig_file\n0 119613 119614.jpg\n"),
        ("boxes.csv", "id,x,y\n0,3,4\n"),
        ("labels/0.txt", "0 0.5 0.5 1e-05 0.25\n"),
        ("landmarks/0.txt", "1.0, 2.0\n3.0, 4.0\n"),
        ("checksums.txt", "d41d8cd98f00b204e9800998ecf8427e  images/0.png\n"),
    ],
)
def test_what_is_no_caption_does_not_hinder(source, path, content):
    beside(path, content)(source)
    assert convert(source).notes == [COMPOSED]


def test_captions_that_are_no_folder_are_named(source):
    beside("c.csv", "x")(source)
    assert "is a file: captions are read from a folder" in refusal(
        source, captions=source / "c.csv"
    )
    assert "no such captions folder" in refusal(source, captions=source / "none")


# ----------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", ["size", "train"])
@pytest.mark.parametrize("value", ["64", "2", 64.5, 2.5, True, [2], float("nan")])
def test_numbers_are_whole(source, name, value):
    with pytest.raises(TypeError, match=f"{name}: expected a whole number"):
        convert(source, **{name: value})
    with pytest.raises(TypeError, match=f"{name}: expected a whole number"):
        from_celebamask_hq(source, source.parent / "out", progress=False, **{name: value})


@pytest.mark.parametrize("options", [{"train": -1}, {"size": 10**6}, {"size": 15}])
def test_numbers_out_of_range_are_refused(source, options):
    with pytest.raises(ValueError, match=r"train must be|size must be|size 15"):
        convert(source, **options)


def test_no_face_to_test_is_told(source):
    assert "train 100: " in refusal(source, train=100)
    assert "has 4 faces; give fewer" in refusal(source, train=5)
    notes = convert(source, train=np.int64(4)).notes
    assert notes == [COMPOSED, "every face (4) is of the split train: none is left to test"]


# ----------------------------------------------------------------------------------- folders


def test_a_file_where_a_folder_is_meant_is_told(source, tmp_path, capsys):
    convert(source)
    file = str(tmp_path / "out" / "manifest.csv")
    new = str(tmp_path / "new")
    for command in (
        ["validate", file],
        ["convert-merged", file, new],
        ["convert-celebamask", file, new],
        ["convert-merged", str(source), f"{file}/new"],
        ["--downloads", file, "--dry-run"],
        ["export-parser", file],
    ):
        assert main(["prepare", *command]) == 2
        error = capsys.readouterr().err
        assert f"{file} is a file: name the folder" in error and "Traceback" not in error, command
    (tmp_path / "new").symlink_to(tmp_path / "nowhere")
    assert main(["prepare", "convert-merged", str(source), new]) == 2
    assert "new exists already" in capsys.readouterr().err
    assert main(["prepare", "convert-merged", str(tmp_path / "none"), new]) == 2
    assert "none does not exist" in capsys.readouterr().err
