"""Keys by content, kept files with their hashes, recipes of procedural faces, one table's LoRAs."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ec2face_core.config import ConfigError, load_profile
from ec2face_core.data import FaceDataset, open_dataset
from ec2face_core.latents import cache_key
from ec2face_lab.cache import claim, data_digest, is_whole, read_note, record_hash, write_frame
from ec2face_lab.study.loras import check_one_training


@pytest.fixture
def root(tiny_faces, tmp_path):
    return shutil.copytree(tiny_faces, tmp_path / "faces")


def rewrite(path, content: bytes) -> None:
    """Other content of equal size and times."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# ---------------------------------------------------------------------------------------- the keys


def test_a_caption_edited_in_place_is_another_cache(root, tiny_config):
    config = tiny_config.replace(data={"root": str(root)})
    before = cache_key(FaceDataset(root, "train", 64), config)
    text = root / "text" / "0.txt"
    rewrite(text, text.read_bytes().swapcase())
    assert cache_key(FaceDataset(root, "train", 64), config) != before


def test_exchanged_lips_of_equal_size_are_another_cache_and_other_pictures(root, tiny_config):
    config = tiny_config.replace(data={"root": str(root)})
    keys = [cache_key(FaceDataset(root, "train", 64), config), *_digests(root)]
    path = root / "mask" / "0.png"
    ids = np.array(Image.open(path))
    swapped = np.arange(256, dtype=np.uint8)
    swapped[[11, 12]] = 12, 11
    mask = Image.open(path)
    palette = mask.getpalette()
    mask = Image.fromarray(swapped[ids])
    mask.putpalette(palette)
    mask.save(path, compress_level=1)
    after = [cache_key(FaceDataset(root, "train", 64), config), *_digests(root)]
    assert after[0] != keys[0] and after[1] != keys[1]
    assert after[2] == keys[2]  # face 0 is no test face


def _digests(root):
    return [data_digest(FaceDataset(root, split, 64)) for split in ("train", "test")]


def test_the_manifest_counts_for_pictures_and_not_for_latents(root, tiny_config):
    config = tiny_config.replace(data={"root": str(root)})
    before = cache_key(FaceDataset(root, "train", 64), config), _digests(root)
    path = root / "manifest.csv"
    path.write_text(path.read_text().replace(",0,", ",0,Look: ", 1))
    after = cache_key(FaceDataset(root, "train", 64), config), _digests(root)
    assert after[0] == before[0] and after[1] != before[1]


def test_a_copy_has_the_same_keys(root, tiny_faces, tiny_config):
    assert _digests(root) == _digests(tiny_faces)
    keys = {cache_key(FaceDataset(r, "train", 64), tiny_config) for r in (root, tiny_faces)}
    assert len(keys) == 1


# --------------------------------------------------------------------------------- procedural faces


@pytest.fixture
def smoke(tmp_path):
    data = {"root": str(tmp_path / "faces"), "zero_shot_root": str(tmp_path / "other")}
    return load_profile("smoke", data={**data, "train": 3, "test": 2, "zero_shot": 2})


def test_procedural_faces_know_their_recipe(smoke, tmp_path):
    open_dataset(smoke, "test")
    recipe = json.loads((tmp_path / "faces" / "faces.json").read_text())
    assert recipe["seed"] == 42 and recipe["splits"] == {"train": 3, "test": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]
    open_dataset(smoke, "train")
    for change, message in (
        ({"seed": 7}, "seed 42 instead of 7"),
        ({"train": 4}, "splits"),
        ({"size": 128}, "size 64 instead of 128"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_dataset(smoke.replace(data=change), "test")
    (tmp_path / "faces" / "faces.json").write_text("{")
    with pytest.raises(ConfigError, match=r"faces\.json is damaged"):
        open_dataset(smoke, "test")
    (tmp_path / "faces" / "faces.json").unlink()  # as former versions made it
    open_dataset(smoke, "test")


@pytest.mark.parametrize("maker", ["nothing", "no.such:maker", "json:maker", ":", "json:"])
def test_a_maker_that_is_none(smoke, maker):
    with pytest.raises(ConfigError, match=r"data\.maker"):
        open_dataset(smoke.replace(data={"maker": maker}), "test")


# --------------------------------------------------------------------------------------- kept files


def test_a_kept_table_is_read_as_it_was_written_or_made_again(tmp_path):
    path = tmp_path / "scores.csv"
    assert not is_whole(path)
    write_frame(path, pd.DataFrame({"id": ["0012"], "niqe": [4.25]}))
    assert is_whole(path)  # a former version wrote no hash
    record_hash(path)
    assert is_whole(path)
    rewrite(path, path.read_bytes().replace(b"4.25", b"4.35"))
    with pytest.warns(UserWarning, match=r"scores\.csv was changed or damaged"):
        assert not is_whole(path)
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"scores\.csv was changed or damaged"):
        assert not is_whole(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"5", b"\xff", b"[" * 5000])
def test_a_damaged_note_is_named(tmp_path, content):
    claim(tmp_path, {"key": "a"})
    claim(tmp_path, {"key": "a"})
    (tmp_path / "about.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"about\.json is damaged"):
        claim(tmp_path, {"key": "a"})
    with pytest.raises(ConfigError, match=r"about\.json is damaged"):
        read_note(tmp_path / "about.json")


# ----------------------------------------------------------------------------------- one table


def lora(folder, steps: int | None) -> None:
    folder.mkdir(parents=True)
    (folder / "pytorch_lora_weights.safetensors").touch()
    if steps:
        parameters = {"steps": steps, "samples": 16 * steps}
        record = {"parameters": parameters, "inputs": {"data/mini/flux": "a"}}
        (folder / "provenance.json").write_text(json.dumps(record))


def test_loras_of_different_trainings_are_not_mixed_in_a_table(tmp_path):
    kept = tmp_path / "kept"
    config = load_profile("mini", profile=str(tmp_path / "run"), adapters=str(kept))
    for name in ("none", "both", "none-seed43", "both-seed43"):
        lora(kept / name, 1200)
    check_one_training(config, ["none", "both", "real", "UaC"], seeds=2)
    lora(tmp_path / "run" / "adapters" / "both", 4)
    with pytest.raises(ConfigError, match=r"cannot mix.*none.*1200 steps.*both.*4 steps"):
        check_one_training(config, ["none", "both"])
    check_one_training(config, ["both", "base"])
    with pytest.raises(ConfigError, match="cannot mix"):  # of one variant
        check_one_training(config, ["both"], seeds=2)
    lora(tmp_path / "run" / "adapters" / "none", 8)
    with pytest.raises(ConfigError, match=r"4 steps.*8 steps|8 steps.*4 steps"):
        check_one_training(config, ["none", "both"])
