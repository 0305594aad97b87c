"""Folders written in each official repository's naming: what is mapped, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from ec2face_core.data import open_dataset
from ec2face_core.io.report import DataError
from ec2face_core.io.texts import MANIFEST_COLUMNS, Row
from ec2face_lab.__main__ import main
from ec2face_lab.baselines.official import LAYOUTS, adopt, find_pictures

SIZE = 16
FACES = [str(i) for i in range(12)]
TEST = FACES[8:]
CAPTIONS = ["She smiles.", "He has a hat: a big one.", "She smiles.", "A man."]
# "10" and "11" come before "8" and "9", "10.jpg" before "8.jpg"
ALPHABETICAL = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]
ROWS = {name: Row("train", 0, "A face.") for name in FACES[:8]} | {
    name: Row("test", i, caption)
    for i, (name, caption) in enumerate(zip(TEST, CAPTIONS, strict=True))
}
ORDINARY = {"8": "8.png", "9": "9.jpg", "10": "10.png", "11": "11.png"}
PICTURES = {
    "tedigan": ORDINARY,
    "controlnext": ORDINARY,
    "mm2latent": ORDINARY,
    "face-mogle": {name: f"{name}.jpg" for name in TEST},
    "mditface": ORDINARY,
    "plain": ORDINARY,
    "uac": {
        "8": " She smiles./1.png", "9": " He has a hat/0.png",
        "10": " She smiles./0.png", "11": " A man./0.png",
    },
    "pixelface": {
        "8": "100_000007.png", "9": "111_000002.png", "10": "22_000003.png", "11": "33_000004.png",
    },
    "codiffusion": {n: f"{n}.png/{ROWS[n].caption}/000000_x_0.png" for n in TEST},
}  # fmt: skip
BESIDE = {
    "tedigan": ["inverted_codes.pt", "inverted_codes.npy"],
    "plain": ["about.json"],
    "pixelface": ["101_000009.png", "2_000008.png", "text/100_000007.txt"],
    "codiffusion": [
        "8.png/She smiles./000003_x_0.png", "8.png/She smiles./8.png",
        "8.png/She smiles./000000_mixed.png",
        "8.png/She smiles./000001_seg_mask_influence_function.png",
    ],
}  # fmt: skip


def colour(name: str) -> tuple[int, int, int]:
    return (20 * int(name), 255 - 20 * int(name), 7)


def write(path: Path, name: str = "0", size: int = SIZE, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour(name)).convert(mode).save(path)


def official(root: Path, layout: str) -> Path:
    """A folder as the official repository leaves it, its other files included."""
    for name, place in PICTURES[layout].items():
        write(root / place.replace(".jpg", ".png"), name)
        if place.endswith(".jpg"):
            (root / place.replace(".jpg", ".png")).rename(root / place)  # the content decides
    for place in BESIDE.get(layout, ()):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(b"not read")
    return root


def test_uac_s_whole_results_folder_is_taken(tmp_path):
    """`results/face` holds every picture twice: alone, and in a grid with its conditions."""
    root = tmp_path / "face"
    official(root / "non_grid" / "Face_Hair_Text", "uac")
    official(root / "grid" / "Face_Hair_Text", "uac")
    files, report = find_pictures(root, "uac", ROWS, TEST)
    assert not report.problems
    alone = root / "non_grid" / "Face_Hair_Text"
    assert files == {name: alone / PICTURES["uac"][name] for name in TEST}
    official(root / "non_grid" / "Text", "uac")
    assert "duplicate" in str(find_pictures(root, "uac", ROWS, TEST)[1]), "two modalities"


def test_pixelface_s_random_captions_are_named_as_the_cause(tmp_path):
    root = official(tmp_path / "theirs", "pixelface")
    (root / PICTURES["pixelface"]["9"]).unlink()
    report = str(find_pictures(root, "pixelface", ROWS, TEST)[1])
    assert "missing: the picture of face 9" in report
    assert "2 pictures are of other captions" in report and "at random" in report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_naming_finds_its_faces(layout, tmp_path):
    root = official(tmp_path / "theirs", layout)
    for ids in (TEST, TEST[2:]):  # also where the first faces only are asked for
        files, report = find_pictures(root, layout, ROWS, ids)
        assert not report.problems
        want = {name: root / PICTURES[layout][name] for name in ids}
        assert files == want and list(files) == ids
    folder = adopt(root, layout, ROWS, TEST, SIZE, tmp_path / "work")
    assert folder.parent == tmp_path / "work"
    for name in TEST:
        assert Image.open(folder / f"{name}.png").getpixel((0, 0)) == colour(name)
    assert adopt(folder, "plain", ROWS, TEST, SIZE, tmp_path / "work") == folder, "nothing to do"
    small = adopt(folder, "plain", ROWS, TEST, 8, tmp_path / "work")
    assert small != folder and Image.open(small / "8.png").size == (8, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gap_and_a_stranger_are_named(layout, tmp_path):
    root = official(tmp_path, layout)
    (root / PICTURES[layout]["9"]).unlink()
    write(root / "elsewhere.webp.png")
    (root / "notes.txt").write_text("x")
    files, report = find_pictures(root, layout, ROWS, TEST)
    assert list(files) == ["8", "10", "11"]
    reasons = dict(report.problems)
    assert set(reasons) - {"elsewhere.webp.png", "notes.txt"} and len(reasons) == 3
    assert any("face 9" in reason for _, reason in report.problems)


def test_duplicates_by_each_way_to_make_them(tmp_path):
    cases = {
        "plain": "8.jpg",
        "uac": "She smiles./0.png",  # beside " She smiles./0.png"
        "pixelface": "100_000011.png",
        "codiffusion": "8.png/she smiles./000000_x_0.png",
    }
    for layout, extra in cases.items():
        root = official(tmp_path / layout, layout)
        write(root / extra)
        _, report = find_pictures(root, layout, ROWS, TEST)
        (problem,) = report.problems
        assert "duplicate of face" in problem[1], layout


def test_pictures_of_no_face(tmp_path):
    cases = {
        "plain": ("3.png", "no face 3 of this split"),
        "uac": ("She smiles./2.png", "only 2 face"),
        "pixelface": ("120_000001.png", "beyond the 12|beyond 12"),
        "codiffusion": ("8.png/A man./000000_x_0.png", "caption of face 8 is 'She smiles.'"),
    }
    for layout, (extra, reason) in cases.items():
        root = official(tmp_path / layout, layout)
        write(root / extra)
        with pytest.raises(DataError, match=reason):
            adopt(root, layout, ROWS, TEST, SIZE, tmp_path / "work")
    gaps = {name: row for name, row in ROWS.items() if name != "3"}
    with pytest.raises(DataError, match="the manifest has gaps"):
        adopt(tmp_path / "pixelface", "pixelface", gaps, TEST, SIZE, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_one_report_of_every_bad_picture(tmp_path):
    root = official(tmp_path, "plain")
    for name, mode in (("8", "L"), ("10", "RGBA")):
        write(root / f"{name}.png", name, mode=mode)
    (root / "9.jpg").write_bytes(b"no picture")
    more = {f"{n}": Row("test", 0, "") for n in range(12, 20)}
    for name in more:
        write(root / f"{name}.png", size=SIZE if name != "12" else 2 * SIZE)
    Image.new("RGB", (SIZE, 9)).save(root / "13.png")
    write(root / "14.png", mode="P")
    with pytest.raises(DataError) as caught:
        adopt(root, "plain", ROWS | more, [*TEST, *more], SIZE, tmp_path / "work")
    reasons = dict(caught.value.report.problems)
    want = {
        "8.png": "grey", "10.png": "transparent", "9.jpg": "unreadable", "14.png": "palette",
        "12.png": f"wrong size {2 * SIZE}, the others {SIZE}", "13.png": "16x9",
    }  # fmt: skip
    assert set(reasons) == set(want)
    assert all(text in reasons[name] for name, text in want.items())


def test_the_lost_last_batch_of_tedigan_is_explained(tmp_path):
    root = official(tmp_path, "tedigan")
    for name in ("8.png", "9.jpg"):  # the last two in alphabetical order
        (root / name).unlink()
    with pytest.raises(DataError, match="test_batch_size"):
        adopt(root, "tedigan", ROWS, TEST, SIZE, tmp_path / "work")


def test_command_line(tiny_config, tmp_path, monkeypatch, capsys):
    """The pictures arrive under their ids; a manifest restricts and is compared."""
    faces = open_dataset(tiny_config, "test")
    config, seen = tmp_path / "config.yaml", []
    tiny_config.save(config)
    for name in faces.ids[1:]:
        text = faces.manifest_caption(name)
        place = tmp_path / "out" / f"{name}.png" / text / "000000_x_0.png"
        write(place, str(faces.ids.index(name)), tiny_config.data.size)

    def score_folder(folder, dataset, config, limit):
        seen.append((folder, dataset.ids))
        raise DataError("seen")

    monkeypatch.setattr("ec2face_lab.commands.evaluate.score_folder", score_folder)
    arguments = ["evaluate", "--config", str(config), "--images", str(tmp_path / "out"), "--layout"]
    assert main([*arguments, "codiffusion"]) == 2
    assert f"{faces.ids[0]}.png" in capsys.readouterr().err and not seen
    assert main([*arguments, "plain"]) == 2 and not seen

    def manifest(captions: dict[str, str]) -> list[str]:
        with open(tmp_path / "list.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(MANIFEST_COLUMNS)
            indices = {n: faces._rows[n].caption_index for n in captions}
            rows.writerows([n, "test", indices[n], text] for n, text in captions.items())
        return ["--manifest", str(tmp_path / "list.csv")]

    own = {name: faces.manifest_caption(name) for name in faces.ids[1:]}
    assert main([*arguments, "codiffusion", *manifest(own)]) == 2
    ((folder, ids),) = seen
    assert ids == faces.ids[1:]
    assert Image.open(folder / f"{ids[1]}.png").getpixel((0, 0)) == colour("2")
    wrong = own | {ids[0]: "Another."}
    capsys.readouterr()
    assert main([*arguments, "codiffusion", *manifest(wrong)]) == 2
    assert "Another." in capsys.readouterr().err and len(seen) == 1
    assert main(["evaluate", "--config", str(config), "--layout", "uac"]) == 2
    assert "--images" in capsys.readouterr().err
