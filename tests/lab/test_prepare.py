"""`python -m ec2face_lab prepare`: from raw downloads to verified data roots."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from face_files import label_map
from PIL import Image

from ec2face_core.config import Config
from ec2face_core.data import FaceDataset
from ec2face_lab.__main__ import main
from ec2face_lab.prepare.validate import validate

SIZE = 32


def run(config: Config, downloads: Path, *options: str) -> int:
    """The command with a saved configuration; its exit code."""
    path = downloads.parent / "config.yaml"
    config.save(path)
    return main(["prepare", "--config", str(path), "--downloads", str(downloads), *options])


def times(root: Path) -> dict[str, int]:
    """Every file under a folder, but for the configuration, with its time of writing."""
    files = [p for p in root.rglob("*") if p.is_file() and p.name != "config.yaml"]
    return {str(p): p.stat().st_mtime_ns for p in files}


def test_the_dry_run_reports_and_writes_nothing(paper_config, downloads, tmp_path, capsys):
    before = times(tmp_path)
    assert run(paper_config, downloads, "--dry-run") == 0
    assert times(tmp_path) == before
    output = capsys.readouterr().out
    assert "10 of 10 there" in output and "without --dry-run" in output


def test_downloads_become_verified_roots(paper_config, downloads, tmp_path, capsys):
    data = paper_config.data
    assert run(paper_config, downloads) == 0
    assert not validate(data.root).problems and not validate(data.zero_shot_root).problems
    assert sorted(p.name for p in (tmp_path / "roots").iterdir()) == ["faces", "foreign"]
    train = FaceDataset(data.root, "train")
    test = FaceDataset(data.root, "test")
    assert (train.ids, test.ids) == (["0", "1", "2"], ["3", "4"])
    assert np.array_equal(test[0].label_map, label_map(SIZE, 1))
    assert train[0].captions[0] == "Face 0."
    foreign = FaceDataset(data.zero_shot_root, None)
    assert foreign.ids == ["00007", "01234", "69999"] and len(foreign[0].captions) == 2
    assert np.array_equal(foreign[0].label_map, label_map(SIZE))
    shutil.rmtree(downloads)  # no longer needed
    capsys.readouterr()
    assert run(paper_config, downloads, "--dry-run") == 0 and run(paper_config, downloads) == 0
    assert "7 of 7 there" in capsys.readouterr().out


def test_incomplete_downloads_are_not_converted(paper_config, downloads):
    (downloads / "CelebAMask-HQ" / "CelebA-HQ-img" / "3.jpg").unlink()
    (downloads / "FFHQ-Text" / "Text" / "01234.txt").unlink()
    assert run(paper_config, downloads) == 2
    data = paper_config.data
    assert not Path(data.root).exists() and not Path(data.zero_shot_root).exists()


def test_a_root_with_missing_files_is_refused(paper_config, downloads, capsys):
    assert run(paper_config, downloads) == 0
    (Path(paper_config.data.root) / "mask" / "1.png").unlink()
    assert run(paper_config, downloads) == 2
    assert "missing mask" in capsys.readouterr().err


def test_a_conversion_that_filled_the_disk_resumes(
    paper_config, downloads, tmp_path, monkeypatch, capsys
):
    save = Image.Image.save

    def full(self, path, *args, **kwargs):
        if Path(path).parent.name == "mask" and Path(path).name.startswith(".2.png"):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:  # worker processes are forks and inherit it
        patch.setattr(Image.Image, "save", full)
        assert run(paper_config, downloads) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message and "make room and run the same" in message
    part = tmp_path / "roots" / ".faces.partial"
    assert not Path(paper_config.data.root).exists() and not list(part.rglob(".*"))
    assert sorted(p.name for p in (part / "mask").iterdir()) == ["0.png", "1.png"]
    first = part / "image" / "0.png"
    second = part / "image" / "1.png"
    first.write_bytes(first.read_bytes()[:100])  # the only one to convert again
    before = second.stat().st_mtime_ns
    assert run(paper_config, downloads) == 0
    root = Path(paper_config.data.root)
    assert (root / "image" / "1.png").stat().st_mtime_ns == before


def test_validate_and_the_converters_are_actions(downloads, tmp_path, capsys):
    raw = str(downloads / "CelebAMask-HQ")
    out = tmp_path / "out"
    convert = ["prepare", "convert-celebamask", raw, str(out), "--size", "16", "--train", "2"]
    assert main(convert) == 0
    assert "'train': 2, 'test': 3" in capsys.readouterr().out
    assert main(convert) == 2 and "exists already" in capsys.readouterr().err
    assert main(["prepare", "validate", str(out)]) == 0
    (out / "mask" / "0.png").unlink()
    assert main(["prepare", "validate", str(out)]) == 2
    assert "mask/0.png: missing mask" in capsys.readouterr().err


@pytest.mark.parametrize("token", ["", "a token"])
def test_a_report_of_what_is_missing(tmp_path, no_hub, monkeypatch, capsys, token):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    arguments = ["prepare", "--dry-run", "--downloads", str(tmp_path)]
    for key in ("data.root", "data.zero_shot_root", "perception.parser"):
        arguments += ["--set", f"{key}={tmp_path / 'none'}"]
    assert main(arguments) == 2
    report = capsys.readouterr().out
    for words in (
        "CelebA-HQ-img", "CelebAMask-HQ-mask-anno", "MM-CelebA-HQ captions", "FFHQ-Text",
        "FLUX.1-dev", "FaRL parser", "CLIP ViT-L-14", "AlexNet", "NIQE", "0 of 12 there",
        "0 of 30,000 faces", "switchablenorms/CelebAMask-HQ", "CC BY-NC-SA 4.0", "33.7 GB",
        "gated: accept the licence",
        "hf download timm/vit_large_patch14_clip_224.openai open_clip_config.json",
    ):  # fmt: skip
        assert words in report, words
    assert ("hf auth login" in report) == (not token)
    assert list(tmp_path.iterdir()) == []
