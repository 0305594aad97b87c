"""What the notebooks call: choices made by masks alone, weights, fits, and true sentences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ec2face_core.attributes import CLASS_ID, CLASSES, pixel_counts
from ec2face_core.config import Config, ConfigError, load_config
from ec2face_core.data import FaceDataset
from ec2face_core.losses import beta
from ec2face_lab.study import tables as experiments
from ec2face_lab.study.foundation_quality import bundle_provenance
from ec2face_lab.study.long_tail import reduction_table, weight_table, weighting_effect
from ec2face_lab.study.reliability import fitted_beta, gradient_weights, scaled_curves
from ec2face_lab.study.scores import CRITICS


def frame(ids: list[str], text: float, correct: int) -> pd.DataFrame:
    """Scores of pictures that all have 10 pixels of every class, `correct` of them right."""
    table = pd.DataFrame({"id": ids, "lpips": 0.5, "niqe": 4.0})
    for critic in CRITICS:
        table[f"text_{critic}"] = text
        table = table.assign(**{f"correct_{critic}_{c}": correct for c in CLASSES})
    return table.assign(**{f"support_{c}": 10 for c in CLASSES})


@pytest.fixture
def scores(monkeypatch, tiny_faces, tmp_path) -> Config:
    """Pictures that need not be drawn: their scores depend on variant and seed only."""
    config = Config(profile=str(tmp_path)).replace(
        data={"root": str(tiny_faces), "size": 64}, evaluation={"bootstrap": 20}
    )
    level = {"both": 8, "none": 6, "real": 9}

    def score_folder(folder, dataset, seeded):
        variant, seed = folder
        return frame(dataset.ids, 20.0 + seed, level[variant] - (seed - 42))

    monkeypatch.setattr(
        experiments, "_pictures", lambda c, variant, split: (variant, c.sampling.seed)
    )
    monkeypatch.setattr(experiments, "score_folder", score_folder)
    monkeypatch.setattr(experiments, "draw_missing", lambda c, variants, split: None)
    return config


def test_a_table_s_pictures_are_drawn_in_one_start_a_seed(scores, monkeypatch, tmp_path):
    monkeypatch.undo()
    config = scores.replace(adapters=str(tmp_path / "adapters"), sampling={"num_processes": 2})
    started, there = [], {"none", "ControlNeXt"}
    monkeypatch.setattr(experiments, "run", lambda *words, **options: started.append(words))
    for name in ("missing_pictures", "missing_system_pictures"):
        lacks = lambda c, variant, split: [] if variant in there else ["0"]  # noqa: E731
        monkeypatch.setattr(experiments, name, lacks)
    monkeypatch.setattr(experiments, "scored", lambda *a: frame(["0"], 20.0, 8))
    with pytest.raises(ConfigError, match="TRAIN=1"):
        experiments.table_rows(config, "table1", {"EC2Face": "both"})
    for name in ("both", "none", "both-seed43", "none-seed43"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    methods = dict.fromkeys(("UaC", "ControlNeXt", "both", "none", "real"))
    experiments.table_rows(config, "table1", {name: name for name in methods}, seeds=2)
    drawn = [words[words.index("--variant") + 1 : words.index("--split")] for words in started]
    assert drawn == [("UaC", "both"), ("both",)]
    settings = [load_config(Path(words[words.index("--config") + 1])) for words in started]
    assert [c.seed for c in settings] == [42, 43]


def test_seeds_are_pooled(scores):
    """Scores of a face are averaged over its seeds, pixels are summed; references have one."""
    two = experiments.scored(scores, "both", seeds=2)
    assert list(two["id"]) == experiments.open_dataset(scores, "test").ids
    assert (two["text_independent"] == 20.5 + 42).all()
    assert (two["correct_independent_hair"] == 8 + 7).all() and (two["support_hair"] == 20).all()
    assert (experiments.scored(scores, "real", seeds=2)["support_hair"] == 10).all()


def test_tables_and_their_sentences(scores):
    rows = experiments.table_rows(
        scores, "table3", {"EC2Face": "both", "real": "real"}, metrics=("OAA", "RFA")
    )
    assert set(rows["metric"]) == {"OAA", "RFA", *CLASSES}
    assert set(rows.loc[rows["method"] == "real", "seeds"]) == {""}
    assert "OAA 80.0 of 90.0 (89 %)" in experiments.describe_ceiling(rows, "EC2Face")

    pairs = {"both - none": ("both", "none"), "none - none": ("none", "none")}
    lines = experiments.describe_differences(experiments.difference_rows(scores, "d", pairs))
    assert "both - none, RFA: +20.00 [+20.00, +20.00]: higher" in lines
    assert "none - none, OAA: +0.00 [+0.00, +0.00]: no difference" in lines
    assert experiments.seed_label(scores, 3) == "42-44"


def test_each_seed_alone(scores):
    """A seed is a training and its noise: rows of seed 43 are those of a config of seed 43."""
    pairs = {"both - none": ("both", "none")}
    each = experiments.seed_rows(scores, "d", pairs, 2)
    assert set(each["method"]) == {"both - none, seed 42", "both - none, seed 43"}
    second = experiments.difference_rows(experiments.with_seed(scores, 1), "d", pairs)
    rows = each[each["method"].str.endswith("43")]
    assert rows["value"].tolist() == second["value"].tolist() and set(rows["seeds"]) == {"43"}


def test_an_adapter_that_is_not_there_is_named(tiny_faces, tmp_path):
    config = Config(profile=str(tmp_path), adapters=str(tmp_path), seed=44).replace(
        data={"root": str(tiny_faces), "size": 64}
    )
    with pytest.raises(ConfigError, match=r"both-seed44.*SEEDS=3"):
        experiments.scored(config, "both")


def test_faces_are_chosen_by_their_masks(tiny_faces):
    """Each wanted class is there, at its median area or more; nothing is chosen twice."""
    dataset = FaceDataset(tiny_faces, "train")
    areas = torch.stack([pixel_counts(dataset.label_map(n)[None])[0] for n in dataset.ids])
    wanted = ["hair", "nose", "hair", "ear_r"]
    ids = experiments.pick_faces(dataset, wanted, skip=dataset.ids[:1])
    assert len(set(ids)) == 4 and dataset.ids[0] not in ids
    for name, c in zip(ids, wanted, strict=True):
        column = areas[:, CLASS_ID[c]]
        assert column[dataset.ids.index(name)] >= (
            column[column > 0].median() if c != "ear_r" else 0
        )
    captions, maps, images = experiments.faces(dataset, ids)
    assert len(captions) == len(maps) == len(images) == 4


def test_weights_and_what_reductions_lose(tiny_faces):
    """Normalised weights have mean square 1; the maximum never lowers a class's weight."""
    dataset = FaceDataset(tiny_faces, "train")
    maps = torch.stack([dataset.label_map(name) for name in dataset.ids])
    counts = dataset.label_counts()
    table = weight_table(counts, clip=5.0)
    share = table["pixels"] / table["pixels"].sum()
    for column in ("normalised", "clipped at 5"):
        assert (share * table[column] ** 2).sum() == pytest.approx(1)
    assert table["squared_share"].sum() == pytest.approx(100)
    clipped = table["clipped at 5"]
    assert clipped.max() / clipped.min() <= 5 / table["raw"].min() + 1e-9

    config = Config().replace(backbone={"path": "nowhere"}, data={"size": 64})
    kept = reduction_table(maps, counts, config).set_index(["reduction", "class"])
    assert (
        np.allclose(kept.loc["max", "kept"], 100, atol=1e-3)
        and (kept.loc["max", "lost"] == 0).all()
    )
    assert kept.loc[("mean", "skin"), "kept"] > kept.loc[("mean", "l_brow"), "kept"]

    effect = weighting_effect(maps, counts, config, clips=(5.0,)).set_index("weights")
    assert effect.loc["normalised", "factor"] == pytest.approx(1)
    same = ["largest", "rare_share", "effective_cells"]  # a common factor changes none of these
    assert np.allclose(effect.loc["raw", same], effect.loc["normalised", same])
    assert (
        effect.iloc[2][["largest", "rare_share"]] < effect.iloc[1][["largest", "rare_share"]]
    ).all()


def test_curves_are_scaled_and_fitted():
    """A curve that is a logistic gives its own steepness and center, rising or falling."""
    t = torch.linspace(0, 1, 11)
    falling = 30 * beta(t, 12.0, 0.45) + 3
    curves = pd.concat(
        [pd.DataFrame({"t": t, "metric": "PSNR (dB)", "value": falling}),
         pd.DataFrame({"t": t, "metric": "LPIPS", "value": 1 - falling / 40})]
    )  # fmt: skip
    scaled = scaled_curves(curves)
    assert scaled.groupby("metric")["value"].agg(["min", "max"]).to_numpy().tolist() == [[0, 1]] * 2
    assert (scaled.loc[scaled["t"] == 0, "value"] == 1).all()
    fits = fitted_beta(curves, Config())
    assert fits.iloc[0][["steepness", "center"]].tolist() == [10.0, 0.4]
    assert np.allclose(fits.iloc[1:]["center"], 0.45, atol=0.02)
    assert len(gradient_weights([(10.0, 0.4), (20.0, 0.4)]).axes) == 2


def test_profile_names_its_substitutes():
    from ec2face_core.config import load_profile

    said = experiments.substitutes(load_profile("mini"))
    for words in (
        "randomly initialised AlexNet",
        "refitted on the training faces, block 32",
        "mini",
    ):
        assert words in said
    assert experiments.substitutes(load_profile("paper")) == ""


def test_provenance_of_a_bundle(tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "config.json").write_text('{"model": 1}')
    about = '{"seconds": 120, "commit": "0123456789", "parameters": {"samples": 5, "role": "x"}}'
    (tmp_path / "flux" / "provenance.json").write_text(about)
    (tmp_path / "parser.json").write_text(about)
    (tmp_path / "parser.pt").write_bytes(b"0" * 2**20)
    table = bundle_provenance(str(tmp_path)).set_index("part")
    assert table.loc["parser.pt", "MB"] == 1 and table.loc["flux", "minutes"] == 2
    assert table.loc["flux", "samples"] == 5 and table.loc["flux", "commit"] == "0123456"
