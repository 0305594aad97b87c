"""Scores of a folder, their summaries, and the command that makes both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import accuracy_row
from PIL import Image

from ec2face_core.attributes import CLASSES, pixel_counts
from ec2face_core.config import Config
from ec2face_core.io.report import DataError
from ec2face_core.metrics import OVERLAP, RECALL, accuracy_from_counts
from ec2face_lab.__main__ import main
from ec2face_lab.plots.save import COLUMNS
from ec2face_lab.prepare.captions import caption_facts
from ec2face_lab.study import scores as scoring
from ec2face_lab.study.pictures import PictureSet
from ec2face_lab.study.png import load_pictures
from ec2face_lab.study.scores import folder_features, score_folder
from ec2face_lab.study.summary import summarise, summarise_difference
from ec2face_lab.world.facts import FactNet, load_facts, save_facts


@pytest.fixture(scope="module")
def config(sampled_config) -> Config:
    return sampled_config


@pytest.fixture(scope="module")
def faces(sampled):
    return sampled.dataset


@pytest.fixture(scope="module")
def pictures(sampled):
    return sampled.folder


def test_scores_against_a_second_computation(config, faces, pictures):
    """Every column from the perception models directly, for one picture."""
    table = score_folder(pictures, faces, config, progress=False)
    assert list(table["id"]) == faces.ids
    name = faces.ids[2]
    row = table.iloc[2]
    models = scoring.perception_models(config)
    image = load_pictures(pictures, [name])
    target = faces.label_map(name)[None]
    text = models.clips["guiding"].score(image, [faces.manifest_caption(name)])
    assert row["text_guiding"] == pytest.approx(float(text), abs=1e-3)
    lpips = models.lpips(image, faces.image(name)[None])
    assert row["lpips"] == pytest.approx(float(lpips), abs=1e-5)
    parsed = models.parsers["independent"].parse(image)
    right = parsed == target
    support = pixel_counts(target)[0].tolist()
    predicted = pixel_counts(parsed)[0].tolist()
    for i, c in enumerate(CLASSES):
        assert row[f"support_{c}"] == support[i]
        assert row[f"predicted_independent_{c}"] == predicted[i]
        assert row[f"correct_independent_{c}"] == int((right & (target == i)).sum())
    features = folder_features(pictures, faces, config, progress=False)
    for role in scoring.ROLES:
        assert features[role].shape[0] == len(faces.ids)
        expected = models.clips[role].image_features(image)[0].detach()
        assert features[role][2] == pytest.approx(expected.numpy(), abs=1e-5)
    real = PictureSet(config, "real", "test").scores(progress=False)
    assert real["lpips"].abs().max() < 1e-6


def test_shares_of_several_processes_join_to_the_same_scores(
    config, faces, pictures, monkeypatch, tmp_path
):
    """With NIQE in worker processes, and continued where one share was stopped."""
    whole = score_folder(pictures, faces, config, progress=False)
    other = config.replace(profile=str(tmp_path / "shared"))  # another place of the scores
    monkeypatch.setattr(scoring, "BATCH", 1)
    monkeypatch.setattr(scoring, "SPARE_CORES", 0)
    scoring.score_share(pictures, faces, other, 0, 1, 2)
    made = {path.name for path in tmp_path.rglob("*.parts/*")}
    assert made == {f"{start:06d}.npz" for start in range(1, len(faces.ids), 2)}
    assert not scoring.is_scored(pictures, faces, other)
    joined = score_folder(pictures, faces, other, progress=False)
    for name in whole.columns.drop("id"):
        assert joined[name].to_numpy() == pytest.approx(
            whole[name].to_numpy(), abs=1e-4, nan_ok=True
        )
    assert scoring.is_scored(pictures, faces, other) and not [*tmp_path.rglob("*.parts")]
    features = folder_features(pictures, faces, other, progress=False)
    expected = folder_features(pictures, faces, config, progress=False)
    for role in scoring.ROLES:
        assert features[role] == pytest.approx(expected[role], abs=1e-5)


def test_scores_are_kept_by_content(config, faces, pictures, monkeypatch, tmp_path):
    """The same pictures are read, a changed one is scored again."""
    first = score_folder(pictures, faces, config, progress=False)
    copy = tmp_path / pictures.name
    copy.mkdir()
    for name in faces.ids:
        (copy / f"{name}.png").write_bytes((pictures / f"{name}.png").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "perception_models", None)
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
    out = capsys.readouterr().out
    assert "RFA (%) ↑" in out and "mIoU (%) ↑" in out and "KID ↓" in out and "LPIPS ↓" not in out
    assert (config.run_dir / "evaluation" / "test-both.csv").is_file()
    assert main([*arguments, "--method", "real", "vae_round_trip"]) == 0, "several at once"
    for name in ("real", "vae_round_trip"):
        assert (config.run_dir / "evaluation" / f"test-{name}.csv").is_file()


def test_summaries_pool_over_images(config, faces, pictures):
    table = score_folder(pictures, faces, config, progress=False)
    rows = summarise([table], "table1", "EC2Face", "faces", config, "42")
    assert list(rows.columns) == list(COLUMNS)
    assert not rows.duplicated(["method", "metric", "critic"]).any()
    counts = [torch.tensor(x) for x in scoring.counts(table, "independent")]
    accuracy = accuracy_from_counts(*counts)
    shown = (*RECALL, *CLASSES, *OVERLAP)
    want = {name: value for name, value in accuracy_row(accuracy).items() if name in shown}
    assert rows[["joint_low", "t_low", "p_holm"]].isna().all(axis=None), "a single training"
    found = rows[rows["critic"] == "independent"].set_index("metric")
    for metric, value in want.items():
        assert found.loc[metric, "value"] == pytest.approx(value, nan_ok=True)
    assert found.loc["Text", "n"] == len(table)
    assert (found["ci_low"].fillna(0) <= found["value"].fillna(0) + 1e-9).all()

    nothing = summarise_difference([table], [table], "d", "both - both", "faces", config)
    assert np.allclose(nothing[["value", "ci_low", "ci_high"]].fillna(0), 0)
    with pytest.raises(ValueError, match="same faces"):
        summarise_difference([table], [table.iloc[::-1]], "d", "x", "faces", config)


def test_facts_that_captions_mention_are_looked_for(config, faces, pictures, tmp_path):
    """100 or 0 where a caption mentions a fact, NaN elsewhere; absent without the setting."""
    captions = {name: faces.manifest_caption(name) for name in faces.ids}
    mentioned = {name: set(caption_facts(text)) for name, text in captions.items()}
    names = sorted(set().union(*mentioned.values(), ["hat"]))
    torch.manual_seed(0)
    net = FactNet(names, widths=(8, 16), size=32)
    save_facts(net, tmp_path / "facts.safetensors")
    net = load_facts(tmp_path / "facts.safetensors")
    other = config.replace(perception={"scoring_facts": str(tmp_path / "facts.safetensors")})
    table = score_folder(pictures, faces, other, progress=False).set_index("id")
    holds = net.holds(load_pictures(pictures, faces.ids))
    for i, name in enumerate(faces.ids):
        for j, fact in enumerate(names):
            value = table.loc[name, f"fact_{fact}"]
            if fact in mentioned[name]:
                assert value == 100 * bool(holds[i, j])
            else:
                assert np.isnan(value)
    rows = summarise([table.reset_index()], "t", "EC2Face", "faces", other)
    found = [table.loc[name, f"fact_{fact}"] for name in faces.ids for fact in mentioned[name]]
    facts = rows.set_index("metric")["value"]
    assert facts["Facts"] == pytest.approx(np.mean(found))
    without = score_folder(pictures, faces, config, progress=False)
    assert not any(name.startswith("fact_") for name in without)
    assert config.digest() != other.digest()
    assert config.replace(perception={"scoring_facts": ""}).digest() == config.digest()
