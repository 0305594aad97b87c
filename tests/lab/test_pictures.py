"""Pictures of a split: what one rests on, how a stopped run is completed, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from ec2face_core.config import Config, ConfigError
from ec2face_lab.study import pictures as module
from ec2face_lab.study.painters import NOTICE, picture_seed
from ec2face_lab.study.pictures import PictureSet, generate_missing, sample_grid
from ec2face_lab.study.png import load_pictures


@pytest.fixture(scope="module")
def config(sampled_config) -> Config:
    return sampled_config


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for one grey level: sums of floats depend a little on the size of a batch."""
    return (a - b).abs().max() <= 1.01 / 127.5


def test_a_picture_depends_on_its_id_alone(config, sampled, tmp_path):
    """Neither batch nor order nor process counts; a missing picture is completed."""
    ids = sampled.ids
    images = sampled.load(ids)
    single = config.replace(sampling={"batch_size": 1})
    again = PictureSet(single, "both", "test", folder=tmp_path / "again")
    for rank in (1, 0):
        again.generate((rank, 2), progress=False)
    assert same(load_pictures(tmp_path / "again", ids), images)

    lost, kept = (sampled.folder / f"{name}.png" for name in ids[1:3])
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert sampled.missing == [ids[1]]
    assert sampled.generate(progress=False) == sampled.folder and sampled.missing == []
    assert same(sampled.load(ids), images) and kept.stat().st_mtime_ns == before

    seeds = {picture_seed(c, n) for c in (config, Config()) for n in ids}
    assert len(seeds) == len(ids), "equal sampling.seed, equal noise"
    other = config.replace(sampling={"seed": 43})
    assert picture_seed(other, ids[0]) not in seeds
    assert not same(images[0], images[1])


def test_a_picture_says_that_it_is_synthetic(config, sampled):
    name = sampled.ids[0]
    text = Image.open(sampled.folder / f"{name}.png").text
    assert text["Disclaimer"] == NOTICE and "both" in text["Model"]
    assert text["Seed"] == str(picture_seed(config, name))
    assert len(text["Prompt-SHA256"]) == 16
    assert sampled.dataset.manifest_caption(name) not in str(text)


def test_folders_are_never_stale(config, sampled):
    """Other weights or settings: another folder; a folder of other pictures is refused."""
    assert sampled.key in sampled.folder.name
    other = config.replace(sampling={"steps": 3})
    assert PictureSet(other, "both", "test").key != sampled.key
    limited = config.replace(evaluation={"limit": 1})
    assert PictureSet(limited, "both", "test").key == sampled.key
    with pytest.raises(ConfigError, match="other weights or settings"):
        PictureSet(other, "both", "test", folder=sampled.folder).generate((0, 1))
    with pytest.raises(ConfigError, match="unknown origin"):
        faces = sampled.dataset.root / "image"
        PictureSet(config, "both", "test", folder=faces).generate((0, 1))
    with pytest.raises(ConfigError, match="known: without_ltal"):
        PictureSet(config, "boht", "test")


def test_pictures_under_consistency_guidance_are_others(config, sampled):
    led = config.replace(sampling={"consistency": 0.3, "consistency_below": 0.9})
    other = config.replace(sampling={"consistency": 0.3, "consistency_below": 0.1})
    sets = [PictureSet(c, "both", "test", limit=1) for c in (led, other)]
    assert len({sampled.key, *(pictures.key for pictures in sets)}) == 3
    (name,) = sets[0].ids
    assert not same(sets[0].load([name]), sampled.load([name]))


def test_references(config, sampled, tmp_path):
    """Real images are the faces; the round trip is another picture of the same face."""
    dataset = sampled.dataset
    real = PictureSet(config, "real", "test").load(dataset.ids)
    assert same(real, torch.stack([dataset.image(name) for name in dataset.ids]))
    fresh = config.replace(profile=str(tmp_path / "run"))
    trip = PictureSet(fresh, "vae_round_trip", "test", limit=2).generate(progress=False)
    assert sorted(f.stem for f in trip.glob("*.png")) == dataset.ids[:2]


def test_one_start_generates_what_several_sets_lack(config, sampled, monkeypatch):
    started = []
    monkeypatch.setattr(module, "run", lambda *words, **options: started.append(words))
    parallel = config.replace(sampling={"num_processes": 2})
    more = parallel.replace(sampling={"seed": 43})
    sets = [PictureSet(c, m, "test") for c in (parallel, more) for m in ("both", "real", "base")]
    generate_missing(sets)
    methods = [words[words.index("--method") + 1 : words.index("--split")] for words in started]
    assert methods == [("base",), ("both", "base")], "the pictures of `sampled` are there"
    missing = PictureSet(parallel, "none", "test")
    with pytest.raises(ConfigError, match="TRAIN=1"):
        generate_missing([missing])


def test_grids_keep_their_pictures(config, sampled):
    """Rows differ in condition, columns in noise; a second call reads the same pictures."""
    maps = [sampled.dataset.label_map(name) for name in sampled.ids[:2]]
    images = sample_grid(config, "both", "trial", ["", "a man"], maps, seeds=2, progress=False)
    assert images.shape == (2, 2, 3, 64, 64)
    flat = images.flatten(0, 1)
    assert all(not same(flat[i], flat[j]) for i in range(4) for j in range(i))
    again = sample_grid(config, "both", "trial", ["", "a man"], maps, seeds=2, progress=False)
    assert torch.equal(again, images)
    folder = next((config.run_dir / "images").glob("trial-*"))
    assert json.loads((folder / "about.json").read_text())["grid"] == "trial"
    assert Image.open(folder / "00_01.png").text["Disclaimer"] == NOTICE
    with pytest.raises(ConfigError, match="no mask branch"):
        sample_grid(config, "base", "trial", ["", ""], maps, seeds=1, progress=False)
