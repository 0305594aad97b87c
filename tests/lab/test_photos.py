"""Photos without masks: alignment, parsing, one report of what is wrong, resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from face_files import canonical_points, coloured, detect, label_map, save_colour_parser
from PIL import Image

from ec2face_core.data import FaceDataset
from ec2face_core.io.report import DataError
from ec2face_core.perception import FaceParser, WeightsError
from ec2face_lab.prepare import photos
from ec2face_lab.prepare.validate import validate

SIZE = 32


@pytest.fixture
def parser(tmp_path) -> FaceParser:
    return FaceParser(save_colour_parser(tmp_path / "colours.pt"), SIZE)


@pytest.fixture
def turned() -> tuple[Image.Image, np.ndarray]:
    """A face turned by 25 degrees and enlarged by 1.5 in a larger photo, and its five points."""
    angle = np.deg2rad(25)
    offset = np.array([60.0, 20.0])
    turn = 1.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    back = np.linalg.inv(turn)
    inverse = np.column_stack([back, -back @ offset]).ravel().tolist()
    face = coloured(label_map(SIZE))
    photo = face.transform((180, 150), Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)
    points = canonical_points(64) + 0.5  # to the coordinates in which a pixel's corner is whole
    return photo, points @ turn.T + offset - 0.5


def test_a_photo_is_cropped_along_its_face(turned, parser):
    crop = photos.align(*turned)
    assert abs(crop.width - 64 * 1.5) <= 1 and crop.width == crop.height
    pixels = np.array(crop.resize((SIZE, SIZE), Image.Resampling.NEAREST))
    ids = parser.parse(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0].numpy()
    assert (ids == label_map(SIZE)).mean() > 0.9


def test_a_photo_that_fills_its_frame_is_kept(parser):
    face = coloured(label_map(SIZE))
    assert photos.align(face, canonical_points(64)) is face


def test_mirrored_and_cut_off_faces_are_refused(turned):
    photo, points = turned
    with pytest.raises(DataError, match="mirrored"):
        photos.align(photo, points[[1, 0, 2, 4, 3]])
    with pytest.raises(DataError, match="cut off"):
        photos.align(photo, points - [60, 0])


def detect_most(images):
    """Misses the face in black photos and in those of 65 px."""
    faces = detect(images)
    missed = images.shape[-1] == 65 or not images.any()
    return {key: value[:0] for key, value in faces.items()} if missed else faces


@pytest.fixture
def source(tmp_path) -> Path:
    """A good photo and four bad ones, each with a caption."""
    folder = tmp_path / "source"
    folder.mkdir()
    pictures = {
        "good": coloured(label_map(SIZE)),
        "mirrored": coloured(label_map(SIZE)[:, ::-1]),
        "nobody": Image.new("RGB", (64, 64)),
        "wide": coloured(label_map(SIZE)).resize((65, 64)),
    }
    for name, image in pictures.items():
        image.save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    for name in (*pictures, "broken"):
        (folder / f"{name}.txt").write_text("A woman.\n")
    return folder


def test_photos_report_all_that_is_wrong_then_resume(source, tmp_path, parser):
    shots = {p.stem: p for p in source.glob("*.png")}
    texts = {p.stem: p for p in source.glob("*.txt")}
    out = tmp_path / "out"
    with pytest.raises(DataError) as caught:
        photos.from_photos(shots, texts, out, parser, detect_most, SIZE, progress=False)
    reasons = {Path(where).stem: reason for where, reason in caught.value.report.problems}
    assert reasons.keys() == {"mirrored", "nobody", "wide", "broken"} and not out.exists()
    assert "left and right are exchanged" in reasons["mirrored"]
    assert "no face" in reasons["nobody"] and "no face" in reasons["wide"]
    assert "unreadable" in reasons["broken"]

    def not_again(images):
        raise AssertionError("parsed already")

    good = {"good": shots["good"]}
    photos.from_photos(good, texts, out, parser, not_again, SIZE, progress=False)
    assert not validate(out).problems
    assert sorted(p.name for p in out.iterdir()) == ["image", "manifest.csv", "mask", "text"]
    assert not (tmp_path / ".out.parsed").exists()


@pytest.mark.parametrize("changed", ["photo", "parser", "nothing"])
def test_a_parsed_photo_of_another_file_or_parser_is_parsed_anew(source, tmp_path, parser, changed):
    shots = {name: source / f"{name}.png" for name in ("good", "broken")}
    texts = dict.fromkeys(shots, source / "good.txt")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="unreadable"):
        photos.from_photos(shots, texts, out, parser, detect, SIZE, progress=False)
    if changed == "photo":
        coloured(label_map(SIZE, 1)).save(shots["good"])
    if changed == "parser":
        with torch.no_grad():
            next(parser.net.buffers()).mul_(0.999)
    calls = []

    def count(images):
        calls.append(1)
        return detect(images)

    coloured(label_map(SIZE)).save(shots["broken"])
    photos.from_photos(shots, texts, out, parser, count, SIZE, progress=False)
    assert len(calls) == (1 if changed == "nothing" else 2)
    good = FaceDataset(out, "test")[1]
    expected = label_map(SIZE, 1 if changed == "photo" else 0)
    assert good.id == "good" and (good.label_map.numpy() == expected).mean() > 0.99


def test_a_photo_of_a_phone_is_parsed_upright(source, tmp_path, parser):
    """Its pixels lie, its EXIF says so; a portrait is neither lost nor learned sideways."""
    good = Image.open(source / "good.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    phone = source / "phone.png"
    good.transpose(Image.Transpose.ROTATE_90).save(phone, exif=exif)
    out = tmp_path / "out"
    shots = {"good": source / "good.png", "phone": phone}
    texts = dict.fromkeys(shots, source / "good.txt")
    photos.from_photos(shots, texts, out, parser, detect, SIZE, progress=False)
    upright, turned = FaceDataset(out, "test")
    assert torch.equal(turned.label_map, upright.label_map)
    assert torch.equal(turned.image, upright.image)
    assert (turned.label_map.numpy() == label_map(SIZE)).mean() > 0.8
    with Image.open(out / "image" / "phone.png") as written:
        assert not written.getexif()


def test_the_detector_is_opened_from_tensors_only(tmp_path):
    from facer.face_detection.retinaface import RetinaFace, cfg_mnet

    path = tmp_path / "mobilenet0.25_Final.pth"
    with pytest.raises(WeightsError, match="missing"):
        photos.face_detector(path)
    torch.save(RetinaFace(cfg_mnet, "test").state_dict(), path)
    faces = photos.face_detector(path)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert {"rects", "points", "scores", "image_ids"} <= faces.keys()
