"""Rows of tables and differences over seeds, and sentences that say what they say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from ec2face_core.attributes import CLASSES
from ec2face_core.config import Config, ConfigError, load_config
from ec2face_core.data import open_dataset
from ec2face_lab.baselines import WEIGHTS
from ec2face_lab.study import pictures, tables
from ec2face_lab.study.pictures import PictureSet
from ec2face_lab.study.scores import ROLES


def frame(ids: list[str], text: float, correct: int) -> pd.DataFrame:
    """Scores of pictures that all have 10 pixels of every class, `correct` of them right."""
    table = pd.DataFrame({"id": ids, "lpips": 0.5, "niqe": 4.0})
    for role in ROLES:
        table[f"text_{role}"] = text
        table = table.assign(**{f"correct_{role}_{c}": correct for c in CLASSES})
    return table.assign(**{f"support_{c}": 10 for c in CLASSES})


@pytest.fixture
def config(monkeypatch, tiny_faces, tmp_path) -> Config:
    """Pictures that need not exist: their scores depend on method and seed only."""
    level = {"both": 8, "none": 6, "real": 9}

    def scores(self):
        seed = self.config.sampling.seed
        return frame(self.dataset.ids, 20.0 + seed, level[self.method] - (seed - 42))

    monkeypatch.setattr(PictureSet, "scores", scores)
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
    for name in ("both", "none", "both-seed43", "none-seed43"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    (tmp_path / "baselines" / "uac").mkdir(parents=True)
    (tmp_path / "baselines" / "uac" / WEIGHTS).touch()
    methods = ("UaC", "ControlNeXt", "both", "none", "real")
    monkeypatch.setattr(tables, "scored", lambda sets: frame(["0"], 20.0, 8))
    tables.table_rows(config, "table1", {name: name for name in methods}, seeds=2)
    sampled = [words[words.index("--method") + 1 : words.index("--split")] for words in started]
    assert sampled == [("UaC", "both"), ("both",)]
    settings = [load_config(Path(words[words.index("--config") + 1])) for words in started]
    assert [c.seed for c in settings] == [42, 43]


def test_seeds_are_pooled(config):
    """Scores of a face are averaged over its seeds, pixels are summed; references have one."""
    two = tables.scored(tables.picture_sets(config, "both", seeds=2))
    assert list(two["id"]) == open_dataset(config, "test").ids
    assert (two["text_independent"] == 20.5 + 42).all()
    assert (two["correct_independent_hair"] == 8 + 7).all() and (two["support_hair"] == 20).all()
    assert (tables.scored(tables.picture_sets(config, "real", seeds=2))["support_hair"] == 10).all()


def test_tables_and_their_sentences(config):
    rows = tables.table_rows(
        config, "table3", {"EC2Face": "both", "real": "real"}, metrics=("OAA", "RFA")
    )
    assert set(rows["metric"]) == {"OAA", "RFA", *CLASSES}
    assert set(rows.loc[rows["method"] == "real", "seeds"]) == {""}
    assert "OAA 80.0 of 90.0 (89 %)" in tables.describe_ceiling(rows, "EC2Face")

    pairs = {"both - none": ("both", "none"), "none - none": ("none", "none")}
    lines = tables.describe_differences(tables.difference_rows(config, "d", pairs))
    assert "both - none, RFA: +20.00 [+20.00, +20.00]: higher" in lines
    assert "none - none, OAA: +0.00 [+0.00, +0.00]: not significant" in lines
    assert tables.seed_label(config, 3) == "42-44"


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

    said = tables.substitutes(load_profile("mini"))
    for words in (
        "randomly initialised AlexNet",
        "refitted on the training faces, block 32",
        "mini",
    ):
        assert words in said
    assert tables.substitutes(load_profile("paper")) == ""
