"""Sampling a split, scoring a folder, summaries: what a number rests on, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ec2face_core.attributes import CLASSES, pixel_counts
from ec2face_core.config import Config, ConfigError, adapter_dir
from ec2face_core.data import DataError, open_dataset
from ec2face_core.metrics import accuracy_from_counts
from ec2face_lab.__main__ import main
from ec2face_lab.plots.save import COLUMNS
from ec2face_lab.study import scores as scoring
from ec2face_lab.study.intervals import summarise, summarise_difference
from ec2face_lab.study.pictures import (
    NOTICE,
    generate_split,
    load_pictures,
    picture_key,
    picture_seed,
    sample_grid,
)
from ec2face_lab.study.scores import score_folder


@pytest.fixture(scope="module")
def config(tiny_config) -> Config:
    """Two steps, 12 training faces (so small NIQE blocks), and an adapter with weights."""
    from ec2face_core.backbone import load_backbone
    from ec2face_core.mask_branch import add_mask_lora, save_mask_lora

    config = tiny_config.replace(
        sampling={"steps": 2, "batch_size": 3}, evaluation={"niqe_block": 16, "bootstrap": 50}
    )
    transformer = load_backbone(config.backbone, ("transformer",)).transformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in add_mask_lora(transformer, config.lora):
            torch.nn.init.normal_(p, std=0.2)
    folder, length = adapter_dir(config, "both"), config.backbone.text_length
    save_mask_lora(transformer, folder, config.lora, length)
    return config


@pytest.fixture(scope="module")
def faces(config):
    return open_dataset(config, "test")


@pytest.fixture(scope="module")
def pictures(config):
    return generate_split(config, "both", "test", progress=False)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """But for one grey level: sums of floats depend a little on the size of a batch."""
    return (a - b).abs().max() <= 1.01 / 127.5


def test_a_picture_depends_on_its_id_alone(config, faces, pictures, tmp_path):
    """Neither batch nor order nor process counts; a missing picture is completed."""
    images = load_pictures(pictures, faces.ids)
    single = config.replace(sampling={"batch_size": 1})
    for rank in (1, 0):
        generate_split(single, "both", "test", tmp_path / "again", 0, (rank, 2), progress=False)
    assert same(load_pictures(tmp_path / "again", faces.ids), images)

    lost, kept = (pictures / f"{name}.png" for name in faces.ids[1:3])
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert generate_split(config, "both", "test", progress=False) == pictures
    assert same(load_pictures(pictures, faces.ids), images) and kept.stat().st_mtime_ns == before

    seeds = {picture_seed(c, n) for c in (config, Config()) for n in faces.ids}
    assert len(seeds) == len(faces.ids), "equal sampling.seed, equal noise"
    other = config.replace(sampling={"seed": 43})
    assert picture_seed(other, faces.ids[0]) not in seeds
    assert not same(images[0], images[1])


def test_a_picture_says_that_it_is_synthetic(config, faces, pictures):
    text = Image.open(pictures / f"{faces.ids[0]}.png").text
    assert text["Disclaimer"] == NOTICE and "both" in text["Model"]
    assert text["Seed"] == str(picture_seed(config, faces.ids[0]))
    assert len(text["Prompt-SHA256"]) == 16
    assert faces.manifest_caption(faces.ids[0]) not in str(text)


def test_folders_are_never_stale(config, faces, pictures):
    """Other weights or settings: another folder; a folder of other pictures is refused."""
    key = picture_key(config, "both", faces)
    assert key in pictures.name
    assert picture_key(config.replace(sampling={"steps": 3}), "both", faces) != key
    assert picture_key(config.replace(evaluation={"limit": 1}), "both", faces) == key
    with pytest.raises(ConfigError, match="other weights or settings"):
        generate_split(config.replace(sampling={"steps": 3}), "both", "test", pictures)
    with pytest.raises(ConfigError, match="unknown origin"):
        generate_split(config, "both", "test", faces.root / "image")
    with pytest.raises(ConfigError, match="known: without_ltal"):
        generate_split(config, "boht", "test")


def test_references(config, faces):
    """Real images are the faces; the round trip is another picture of the same face."""
    real = generate_split(config, "real", "test", progress=False)
    want = torch.stack([faces.image(name) for name in faces.ids])
    assert same(load_pictures(real, faces.ids), want)
    trip = generate_split(config, "vae_round_trip", "test", limit=2, progress=False)
    assert sorted(f.stem for f in trip.glob("*.png")) == faces.ids[:2]


def test_scores_against_a_second_computation(config, faces, pictures):
    """Every column from the critics directly, for one picture."""
    table = score_folder(pictures, faces, config, progress=False)
    assert list(table["id"]) == faces.ids
    name, row, critics = faces.ids[2], table.iloc[2], scoring.load_critics(config)
    image, target = load_pictures(pictures, [name]), faces.label_map(name)[None]
    text = critics.clips["guiding"].score(image, [faces.manifest_caption(name)])
    assert row["text_guiding"] == pytest.approx(float(text), abs=1e-3)
    lpips = critics.lpips(image, faces.image(name)[None])
    assert row["lpips"] == pytest.approx(float(lpips), abs=1e-5)
    right = critics.parsers["independent"].parse(image) == target
    support = pixel_counts(target)[0].tolist()
    for i, c in enumerate(CLASSES):
        assert row[f"support_{c}"] == support[i]
        assert row[f"correct_independent_{c}"] == int((right & (target == i)).sum())
    real = score_folder(generate_split(config, "real", "test", progress=False), faces, config)
    assert real["lpips"].abs().max() < 1e-6


def test_scores_are_kept_by_content(config, faces, pictures, monkeypatch, tmp_path):
    """The same pictures are read, a changed one is scored again."""
    first = score_folder(pictures, faces, config, progress=False)
    copy = tmp_path / pictures.name
    copy.mkdir()
    for name in faces.ids:
        (copy / f"{name}.png").write_bytes((pictures / f"{name}.png").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "load_critics", None)
        again = score_folder(copy, faces, config, progress=False)
    assert again.equals(first)
    Image.new("RGB", (64, 64), "red").save(copy / f"{faces.ids[0]}.png")
    changed = score_folder(copy, faces, config, progress=False)
    assert changed.iloc[1:].equals(first.iloc[1:]) and not changed.iloc[:1].equals(first.iloc[:1])


def test_one_report_names_every_bad_picture(config, faces, pictures, tmp_path, capsys):
    folder, ids = tmp_path / "pictures", faces.ids
    folder.mkdir()
    (folder / f"{ids[1]}.png").write_bytes(b"no picture")
    Image.new("RGB", (32, 32)).save(folder / f"{ids[2]}.png")
    Image.new("RGB", (64, 64)).save(folder / "stranger.png")
    with pytest.raises(DataError) as caught:
        score_folder(folder, faces, config)
    reasons = dict(caught.value.report.problems)
    assert set(reasons) == {*(f"{n}.png" for n in ids), "stranger.png"}
    for name, reason in zip(
        ids, ("missing", "unreadable", "wrong size 32", "missing"), strict=True
    ):
        assert reason in reasons[f"{name}.png"]
    assert "no face stranger" in reasons["stranger.png"]

    config.save(tmp_path / "config.yaml")
    arguments = ["evaluate", "--config", str(tmp_path / "config.yaml")]
    assert main([*arguments, "--images", str(folder)]) == 2
    assert "stranger.png" in capsys.readouterr().err
    assert main([*arguments, "--images", str(tmp_path / "nowhere")]) == 2
    assert main([*arguments, "--set", "sampling.stesp=2"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "RFA (%) ↑" in capsys.readouterr().out
    assert (config.run_dir / "evaluation" / "test-both.csv").is_file()
    assert main([*arguments, "--method", "real", "vae_round_trip"]) == 0, "several at once"
    for name in ("real", "vae_round_trip"):
        assert (config.run_dir / "evaluation" / f"test-{name}.csv").is_file()


def test_summaries_pool_over_images(config, faces, pictures):
    table = score_folder(pictures, faces, config, progress=False)
    rows = summarise(table, "table1", "EC2Face", "faces", config, "42")
    assert list(rows.columns) == list(COLUMNS)
    assert not rows.duplicated(["method", "metric", "critic"]).any()
    correct, support = scoring.counts(table, "independent")
    want = accuracy_from_counts(torch.tensor(correct), torch.tensor(support)).as_dict()
    found = rows[rows["critic"] == "independent"].set_index("metric")
    for metric, value in want.items():
        assert found.loc[metric, "value"] == pytest.approx(value, nan_ok=True)
    assert found.loc["Text", "n"] == len(table)
    assert (found["ci_low"].fillna(0) <= found["value"].fillna(0) + 1e-9).all()

    nothing = summarise_difference(table, table, "d", "both - both", "faces", config)
    assert np.allclose(nothing[["value", "ci_low", "ci_high"]].fillna(0), 0)
    with pytest.raises(ValueError, match="same faces"):
        summarise_difference(table, table.iloc[::-1], "d", "x", "faces", config)


def test_grids_keep_their_pictures(config, faces):
    """Rows differ in condition, columns in noise; a second call reads the same pictures."""
    maps = [faces.label_map(name) for name in faces.ids[:2]]
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
