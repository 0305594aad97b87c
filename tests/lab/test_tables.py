"""Rows of tables and differences over seeds, and sentences that say what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ec2face_core.attributes import CLASSES
from ec2face_core.config import Config, ConfigError, load_config
from ec2face_core.data import open_dataset
from ec2face_lab.baselines import WEIGHTS
from ec2face_lab.study import pictures, tables
from ec2face_lab.study.pictures import PictureSet
from ec2face_lab.study.scores import ROLES, perception_models
from ec2face_lab.study.summary import merged


def frame(ids: list[str], text: float, correct: int) -> pd.DataFrame:
    """Pictures that all have 10 pixels of every class, `correct` of them right, and none more."""
    table = pd.DataFrame({"id": ids, "lpips": 0.5, "niqe": 4.0})
    for role in ROLES:
        table[f"text_{role}"] = text
        table = table.assign(**{f"correct_{role}_{c}": correct for c in CLASSES})
        table = table.assign(**{f"predicted_{role}_{c}": correct for c in CLASSES})
    return table.assign(**{f"support_{c}": 10 for c in CLASSES})


@pytest.fixture
def config(monkeypatch, tiny_faces, tmp_path) -> Config:
    """Pictures that need not exist: their scores depend on method and seed only."""
    level = {"both": 8, "none": 6, "real": 9}

    def scores(self):
        seed = self.config.sampling.seed
        return frame(self.dataset.ids, 20.0 + seed, level[self.method] - (seed - 42))

    def features(self):
        shift = 0.1 * level[self.method]
        random = np.random.default_rng(self.config.sampling.seed).normal(size=(4, 6))
        return dict.fromkeys(ROLES, random + shift)

    monkeypatch.setattr(PictureSet, "scores", scores)
    monkeypatch.setattr(PictureSet, "features", features)
    monkeypatch.setattr(tables, "face_diversity", lambda sets: np.full(4, len(sets)))
    monkeypatch.setattr(tables, "generate_missing", list)
    return Config(profile=str(tmp_path)).replace(
        data={"root": str(tiny_faces), "size": 64}, evaluation={"bootstrap": 20}
    )


def test_a_table_s_pictures_are_generated_in_one_start_a_seed(config, monkeypatch, tmp_path):
    config = config.replace(adapters=str(tmp_path / "adapters"), sampling={"num_processes": 2})
    started = []
    present = {"none", "ControlNeXt"}
    monkeypatch.setattr(tables, "generate_missing", pictures.generate_missing)
    monkeypatch.setattr(pictures, "run", lambda *words, **options: started.append(words))
    lacks = property(lambda self: [] if self.method in present else ["0"])
    monkeypatch.setattr(PictureSet, "missing", lacks)
    monkeypatch.setattr(PictureSet, "scores", lambda self: frame(["0"], 20.0, 8))
    with pytest.raises(ConfigError, match="TRAIN=1"):
        tables.table_rows(config, "table1", {"EC2Face": "both"})
    monkeypatch.setattr("ec2face_lab.study.painters.find_mask_lora", lambda *_: tmp_path)
    (tmp_path / "baselines" / "uac").mkdir(parents=True)
    (tmp_path / "baselines" / "uac" / WEIGHTS).touch()
    methods = ("UaC", "ControlNeXt", "both", "none", "real")
    monkeypatch.setattr(tables, "scored", lambda sets: [frame(["0"], 20.0, 8)])
    monkeypatch.setattr(tables, "set_rows", lambda *arguments: [])
    tables.table_rows(config, "table1", {name: name for name in methods}, seeds=2)
    sampled = [words[words.index("--method") + 1 : words.index("--split")] for words in started]
    assert sampled == [("UaC", "both"), ("both",)]
    settings = [load_config(Path(words[words.index("--config") + 1])) for words in started]
    assert [c.seed for c in settings] == [42, 43]


def test_seeds_are_pooled(config):
    """Scores of a face are averaged over its seeds, pixels are summed; references have one."""
    two = merged(tables.scored(tables.picture_sets(config, "both", seeds=2)))
    assert list(two["id"]) == open_dataset(config, "test").ids
    assert (two["text_independent"] == 20.5 + 42).all()
    assert (two["correct_independent_hair"] == 8 + 7).all() and (two["support_hair"] == 20).all()
    (one,) = tables.scored(tables.picture_sets(config, "real", seeds=2))
    assert (one["support_hair"] == 10).all()


def test_tables_and_their_sentences(config):
    rows = tables.table_rows(
        config, "table3", {"EC2Face": "both", "real": "real"}, metrics=("OAA", "RFA")
    )
    beside = {"F1", "F1_RFA", "mIoU", "KID", "CMMD"}
    assert set(rows["metric"]) == {"OAA", "RFA", *beside, *CLASSES}
    assert "real" not in set(rows.loc[rows["metric"] == "KID", "method"]), "0 by definition"
    assert set(rows.loc[rows["method"] == "real", "seeds"]) == {""}
    assert "OAA 80.0 of 90.0 (89 %)" in tables.describe_ceiling(rows, "EC2Face")

    pairs = {"both - none": ("both", "none"), "none - none": ("none", "none")}
    lines = tables.describe_differences(tables.difference_rows(config, "d", pairs))
    gain = "RFA +20.00 [+20.00, +20.00], F1_RFA +13.89 [+13.89, +13.89]"
    assert f"both - none: {gain}: higher\n" in lines, "2 * 8 / 18 - 2 * 6 / 16"
    assert "none - none: OAA +0.00 [+0.00, +0.00], F1 +0.00 [+0.00, +0.00]: not" in lines
    assert lines.endswith("Intervals are over faces; the trainings are held fixed.")
    assert tables.seed_label(config, 3) == "42-44"


def test_several_trainings_have_intervals_over_both_and_a_diversity(config):
    rows = tables.difference_rows(config, "d", {"both - none": ("both", "none")}, seeds=2)
    cells = rows[rows["critic"] != "guiding"].set_index("metric")
    assert cells.loc["OAA", "joint_low"] == pytest.approx(cells.loc["OAA", "value"])
    assert cells.loc["precision_ear_r", "value"] == 0, "nothing is painted in a wrong place"
    assert cells.loc["Diversity", "value"] == 0 and cells.loc["KID", "joint_low"] < 0
    assert tables.describe_differences(rows).endswith("over faces and trainings.")
    scores = tables.table_rows(config, "t", {"EC2Face": "both"}, seeds=2, metrics=("OAA",))
    assert scores.set_index("metric")["value"]["Diversity"] == 2


def test_presence_counts_pictures_of_all_trainings(config, monkeypatch):
    """3 of 64 x 64 pixels are a presence, 2 are none; masks without the class stand apart."""
    at = {42: 3, 43: 2}

    def scores(self):
        table = frame(self.dataset.ids, 20.0, 8)
        table["predicted_independent_hat"] = at[self.config.sampling.seed]
        table.loc[:2, "support_hat"] = 0
        return table

    monkeypatch.setattr(PictureSet, "scores", scores)
    rows = tables.presence_rows(config, "presence", {"EC2Face": "both"}, seeds=2)
    own = rows[rows["critic"] == "independent"].set_index("metric")
    assert own.loc["presence_hat", ["value", "n"]].tolist() == [50, 2]
    assert own.loc["false_presence_hat", ["value", "n"]].tolist() == [50, 6]
    assert own.loc["presence_eye_g", "value"] == 100
    assert len(rows) == 2 * 2 * 4 and set(rows["seeds"]) == {"42-43"}


def test_diversity_of_a_face_is_that_of_its_trainings_pictures(sampled, monkeypatch):
    other = PictureSet(sampled.config.replace(sampling={"seed": 43}), "both", "test")
    values = tables.face_diversity([sampled, other])
    lpips = perception_models(sampled.config).lpips
    pair = [pictures.load(pictures.ids[1:2]) for pictures in (sampled, other)]
    assert values.shape == (len(sampled.ids),)
    assert values[1] == pytest.approx(float(lpips(*pair)), abs=1e-5) and values[1] > 0
    monkeypatch.setattr(tables, "perception_models", None)
    assert (tables.face_diversity([sampled, other]) == values).all(), "kept"


def test_each_seed_alone(config):
    """A seed is a training and its noise: rows of seed 43 are those of a config of seed 43."""
    pairs = {"both - none": ("both", "none")}
    each = tables.seed_rows(config, "d", pairs, 2)
    assert set(each["method"]) == {"both - none, seed 42", "both - none, seed 43"}
    second = tables.difference_rows(tables.with_seed(config, 1), "d", pairs)
    rows = each[each["method"].str.endswith("43")]
    assert rows["value"].tolist() == second["value"].tolist() and set(rows["seeds"]) == {"43"}


def test_an_adapter_that_is_not_there_is_named(tiny_faces, tmp_path):
    config = Config(profile=str(tmp_path), adapters=str(tmp_path), seed=44).replace(
        data={"root": str(tiny_faces), "size": 64}
    )
    with pytest.raises(ConfigError, match=r"both-seed44.*SEEDS=3"):
        PictureSet(config, "both", "test").generate()


def test_profile_names_its_substitutes():
    from ec2face_core.config import load_profile

    assert tables.substitutes(load_profile("mini")) == (
        "Small CLIPs and parsers stand in for ViT-L/14 and FaRL; NIQE is refitted on the training "
        "faces (blocks of 32 px). LPIPS has a random trunk and is in the CSV alone."
    )
    assert "CLIPs and parsers" in tables.substitutes(load_profile("photos64"))
    assert tables.substitutes(load_profile("paper")) == ""
    own = load_profile("paper", perception={"clip": "local-dir:/models/clip-l"})
    assert tables.substitutes(own) == ""
