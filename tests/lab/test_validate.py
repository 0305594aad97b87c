"""One report of everything that is wrong with a folder of faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from face_files import label_map, save_image, save_mask, write_root
from PIL import Image

from ec2face_core.io.report import DataError
from ec2face_lab.prepare.validate import validate


@pytest.fixture
def root(tmp_path) -> Path:
    return write_root(tmp_path / "faces")


def damage_all(root: Path) -> dict[str, str]:
    """Break one file after another; returns the expected reason for each."""
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


def test_a_good_folder_has_no_problems(root):
    report = validate(root)
    assert not report.problems and report.faces == 6


def test_one_report_of_everything(root):
    expected = damage_all(root)
    report = validate(root)
    reasons = dict(report.problems)
    assert reasons.keys() == expected.keys()
    for where, reason in expected.items():
        assert reason in reasons[where], (where, reasons[where])
    with pytest.raises(DataError) as caught:
        report.raise_if_bad()
    assert caught.value.report is report
    assert all(where in str(caught.value) for where in expected)


def test_a_manifest_caption_that_is_not_in_its_file(root):
    text = (root / "text" / "0.txt").read_text()
    (root / "text" / "0.txt").write_text("Changed.\n" + text)
    assert validate(root).problems == [("text/0.txt", "manifest caption 0 is not its line")]
    (root / "text" / "1.txt").write_text("One line.\n")
    assert ("text/1.txt", "manifest caption 1 is not its line") in validate(root).problems


def test_mirrored_masks(root):
    for path in (root / "mask").iterdir():  # mirrored without an exchange of the sides
        save_mask(path, np.array(Image.open(path))[:, ::-1].copy())
    ((where, reason),) = validate(root).problems
    assert where == "mask" and "left and right are exchanged" in reason


def test_a_manifest_that_cannot_be_used(root):
    (root / "manifest.csv").write_text("id,caption\n")
    assert "columns" in validate(root).problems[0][1]
    (root / "manifest.csv").unlink()
    assert "unreadable" in validate(root).problems[0][1]
