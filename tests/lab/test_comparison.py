"""Comparison systems as experiments: training in child processes, budgets, who leads, tables."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from figure_checks import texts

from ec2face_core import runs
from ec2face_core.backbone import load_backbone
from ec2face_core.config import Config, ConfigError, adapter_dir, load_profile
from ec2face_core.data import open_dataset
from ec2face_core.io import paths
from ec2face_core.io.paths import resolve
from ec2face_core.runs import path_digest
from ec2face_lab.__main__ import main
from ec2face_lab.baselines import SYSTEMS, WEIGHTS, build, load, systems, weights_dir
from ec2face_lab.plots.render_tables import METHODS
from ec2face_lab.plots.save import read_rows
from ec2face_lab.study import comparison, fairness
from ec2face_lab.study import pictures as picture_sets
from ec2face_lab.study.comparison import describe_lead
from ec2face_lab.study.fairness import AUTOENCODED, FACTORS, PUBLISHED, describe_fairness, varied
from ec2face_lab.study.pictures import PictureSet, available, generate_missing
from ec2face_lab.study.png import load_pictures

NAME = "MM2Latent"


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory) -> Config:
    return tiny_config.replace(
        profile=str(tmp_path_factory.mktemp("runs") / "systems"),
        data={"procedural": True, "validation": 2},
        sampling={"steps": 1, "num_processes": 1},
        evaluation={"bootstrap": 20},
        baselines={"pool": 64, "foundation_seconds": 0.1, "seconds": 0.1},
    )


@pytest.fixture(scope="module")
def kept(config, tmp_path_factory):
    """A system trained in a child process, and where its weights were copied to."""
    keep = tmp_path_factory.mktemp("kept") / "baselines"
    comparison.retrain_systems(config, [NAME], keep)
    return keep


@pytest.mark.slow
def test_a_system_is_trained_in_a_child_and_kept(config, kept):
    assert {p.relative_to(kept).as_posix() for p in kept.rglob("*") if p.is_file()} == {
        f"mm2latent/{WEIGHTS}", "mm2latent/provenance.json", "mm2latent/SHA256SUMS",
        "shared/style.safetensors", "shared/SHA256SUMS",
    }  # fmt: skip
    made = json.loads((kept / "mm2latent" / "provenance.json").read_text())["parameters"]
    assert made["budget"] == pytest.approx(0.1) and set(made["stages"]) == {"masks", "mapping"}
    assert set(made["shared"]) == {"style"}
    system = build(NAME, config)
    assert made["parameters"] == system.parameters()
    system.load(kept / "mm2latent")


@pytest.mark.slow
def test_what_is_trained_is_not_trained_again(config, kept, monkeypatch):
    started = []
    monkeypatch.setattr(comparison, "run", lambda *words, **options: started.append(words))
    comparison.retrain_systems(config, [NAME])
    assert started == []
    longer = config.replace(baselines={"seconds": 5.0})
    comparison.retrain_systems(longer, [NAME])
    assert len(started) == 1, "another budget counts"
    comparison.retrain_systems(config.replace(seed=7), [NAME])
    assert ["--shared" in words for words in started[1:]] == [True, False], "so does another seed"


@pytest.mark.slow
def test_a_training_does_not_go_on_with_another_time(config, kept, tmp_path, capsys):
    longer = config.replace(baselines={"seconds": 5.0}, profile=str(tmp_path))
    longer.save(tmp_path / "config.yaml")
    out = config.run_dir / "baselines" / "mm2latent"
    before = (out / WEIGHTS).read_bytes()
    arguments = ["--config", str(tmp_path / "config.yaml"), "--system", NAME, "--out", str(out)]
    assert main(["baselines", *arguments]) == 2
    assert "seconds 0.1 instead of 5.0" in capsys.readouterr().err
    assert (out / WEIGHTS).read_bytes() == before


@pytest.mark.slow
def test_systems_that_are_kept_do_not_lose_what_they_stand_on(config, kept, tmp_path, monkeypatch):
    keep = tmp_path / "baselines"
    shutil.copytree(kept, keep)
    (keep / "tedigan").mkdir()
    (keep / "tedigan" / WEIGHTS).touch()
    comparison.retrain_systems(config, [NAME], keep)
    (keep / "shared" / "style.safetensors").write_bytes(b"another one")
    with pytest.raises(ConfigError, match="TediGAN"):
        comparison.retrain_systems(config, [NAME], keep)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="TediGAN"):
        patch.setattr(comparison, "run", lambda *words, **options: None)
        comparison.retrain_systems(config, ["PixelFace+", NAME], keep)  # refused before any copy
    (keep / "tedigan" / WEIGHTS).unlink()
    comparison.retrain_systems(config, [NAME], keep)
    assert path_digest(keep / "shared") == path_digest(kept / "shared")


def test_what_two_share_is_trained_by_one_of_them_and_first(config, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(comparison, "run", lambda *words, **options: started.append(words))
    comparison.retrain_systems(config.replace(profile=str(tmp_path)))
    names = [words[words.index("--system") + 1] for words in started]
    shared = ["--shared" in words for words in started]
    stages = [systems()[n].shares[0] for n, s in zip(names, shared, strict=True) if s]
    assert sorted(stages) == ["style", "text_unet"]
    alone = [n for n, s in zip(names, shared, strict=True) if not s]
    assert sorted(alone) == sorted(SYSTEMS)
    assert all(not systems()[n].shares for n in alone[:2]), "who stands on them comes later"


@pytest.mark.slow
def test_a_training_on_another_clip_is_not_gone_on_with(config, kept, tmp_path, capsys):
    other = config.replace(
        perception={"clip": f"local-dir:{tmp_path / 'clip'}"}, profile=str(tmp_path / "run")
    )
    shutil.copytree(config.perception.clip.removeprefix("local-dir:"), tmp_path / "clip")
    name = next((tmp_path / "clip").glob("*.json"))
    name.write_text(name.read_text() + "\n")
    other.save(tmp_path / "config.yaml")
    out = config.run_dir / "baselines" / "mm2latent"
    arguments = ["--config", str(tmp_path / "config.yaml"), "--system", NAME, "--out", str(out)]
    assert main(["baselines", *arguments]) == 2
    assert "delete it" in capsys.readouterr().err


def test_half_and_double_are_other_runs_of_other_lengths(config):
    own = config.baselines
    folders = {factor: varied(config, factor).run_dir for factor in FACTORS}
    assert len(set(folders.values())) == 3 and folders["once"] == config.run_dir
    for factor, times in {"half": 0.5, "double": 2.0}.items():
        other = varied(config, factor)
        assert other.baselines.seconds == times * own.seconds
        assert systems()["UaC"].budget(other) == times * systems()["UaC"].budget(config)
        assert other.data == config.data and other.seed == config.seed


@pytest.mark.slow
def test_budgets_are_scored_on_validation_faces(config, kept, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(paths, "NAMED", "by this test")
    for module in (paths, runs):  # files go on record by their paths below the root
        monkeypatch.setattr(module, "ROOT", tmp_path_factory.getbasetemp())
    monkeypatch.setattr(fairness, "OURS", "real")  # EC²Face has no LoRA here
    monkeypatch.setattr(fairness, "adapter_dir", lambda config, method: adapter_dir(config, "both"))
    path = fairness.run_fairness(config, [NAME])
    rows = read_rows(path)
    ways = (*FACTORS, AUTOENCODED)  # its original sees the masks that it sees here
    methods = {f"{NAME}, {how}" for how in ways}
    assert set(rows["method"]) == {"EC2Face", *methods, *(f"EC²Face - {m}" for m in methods)}
    assert set(rows["dataset"]) == {open_dataset(config, "validation").root.name}
    shared = [varied(config, f).run_dir / "baselines" / "shared" for f in FACTORS]
    assert len({(folder / "style.safetensors").read_bytes() for folder in shared}) == 1
    for factor, times in FACTORS.items():
        about = varied(config, factor).run_dir / "baselines/mm2latent/provenance.json"
        made = json.loads(about.read_text())["parameters"]
        assert made["budget"] == pytest.approx(times * config.baselines.seconds)
    assert fairness.kept_fairness(config)[1] == path
    figure = fairness.plot_fairness(rows)
    panel = figure.axes[2]
    drawn = np.concatenate([dots.get_offsets()[:, 0] for dots in panel.collections])
    own = rows[(rows["metric"] == "Text") & (rows["critic"] == "independent")]
    own = own.set_index("method")["value"]
    for how in FACTORS:
        gap = own["EC2Face"] - own[f"{NAME}, {how}"]
        assert np.abs(drawn - gap).min() < 1e-5
    assert "masks as published" not in texts(figure), "no row, no mark"
    assert "- masks as published: not trained here." in describe_fairness(rows)
    assert fairness.run_fairness(config, [NAME, "PixelFace+"], [PUBLISHED]) == path
    more = set(read_rows(path)["method"]) - set(rows["method"])
    assert more == {f"{minus}PixelFace+, {PUBLISHED}" for minus in ("", "EC²Face - ")}

    half = weights_dir(varied(config, "half"), NAME) / WEIGHTS
    on_record = half.relative_to(paths.ROOT).as_posix()
    digest = path_digest(half)
    half.unlink()
    for _ in range(2):  # also what was gone before is known
        fairness.run_fairness(config, ["PixelFace+"], [PUBLISHED])
        assert set(read_rows(path)["method"]) == {*rows["method"], *more}, "rows outlive weights"
        record = json.loads(path.with_suffix(".json").read_text())
        assert record["parameters"]["gone"][on_record] == digest
        assert on_record not in record["inputs"]
    half.write_bytes(b"another training")
    fairness.run_fairness(config, ["PixelFace+"], [PUBLISHED])
    assert set(read_rows(path)["method"]) == {"EC2Face", *more}, "but not other weights"

    other = varied(config, PUBLISHED)
    assert other.baselines.published_masks and not config.baselines.published_masks
    weights = load(other, "PixelFace+").networks["generator"].state_dict()
    assert weights["words.8.mask.0.weight"].shape[1] == 3 * 64, "colours of 8 x 8 pixels"


@pytest.mark.slow
def test_autoencoded_pictures_are_the_systems_own_after_the_autoencoder(config, kept):
    pictures = PictureSet(config, NAME, "validation")
    sampled = pictures.load(pictures.ids)
    decoded = load_pictures(fairness.autoencoded(pictures), pictures.ids)
    vae = load_backbone(config.backbone, ("vae",)).vae
    with torch.no_grad():
        expected = vae.decode(vae.encode(sampled).latent_dist.mode()).sample.clamp(-1, 1)
    assert (decoded - expected).abs().max() < 1.1 / 127.5


def test_the_lead_is_described_for_each_way():
    def row(method: str, value: float, low: float = 0, high: float = 0) -> dict:
        cell = {"value": value, "ci_low": low, "ci_high": high, "n": 7}
        return {"method": method, "metric": "RFA", "critic": "independent"} | cell

    rows = [row("EC2Face", 60), row("UaC, once", 70), row("TediGAN, once", 5)]
    rows += [row("EC²Face - UaC, once", -10, -12, -8), row("EC²Face - TediGAN, once", 55, 50, 60)]
    rows += [row(f"UaC, {AUTOENCODED}", 58), row(f"EC²Face - UaC, {AUTOENCODED}", 2, -3, 7)]
    assert describe_fairness(pd.DataFrame(rows), ["RFA"]) == (
        "RFA, EC²Face 60.0, 7 faces (EC²Face minus system):\n"
        "- as in Table 1: leads TediGAN 5.0 (+55.0 [+50.0, +60.0]); "
        "behind UaC 70.0 (-10.0 [-12.0, -8.0]).\n"
        "- after EC²Face's autoencoder: level with UaC 58.0 (+2.0 [-3.0, +7.0]).\n"
        "- masks as published: not trained here.\n"
        "- half its own training time: not trained here.\n"
        "- twice its own training time: not trained here."
    )


@pytest.mark.slow
def test_tables_hold_the_systems_that_have_weights(config, kept):
    assert list(comparison.compared(config, "test")) == [
        NAME, "EC2Face", "real", "vae_round_trip",
    ]  # fmt: skip
    assert set(comparison.compared(config, "test")) <= set(METHODS)
    made_of = comparison.compared_files(config, "test")
    assert {weights_dir(config, NAME) / WEIGHTS, resolve(config.backbone.path)} <= set(made_of)
    assert any(path.name == "style.safetensors" for path in made_of), "what it shares, too"
    assert weights_dir(config, NAME) == config.run_dir / "baselines" / "mm2latent"


def test_newer_systems_are_compared_on_test_faces_alone(config, tmp_path, monkeypatch):
    monkeypatch.setattr(picture_sets, "trained", lambda config: ["UaC", "MDiTFace"])
    other = config.replace(profile=str(tmp_path / "run"))
    assert available(other, "test") == ["UaC", "MDiTFace"]
    assert available(other, "zero_shot") == ["UaC"]
    picture_sets.official_pictures(other, "MDiTFace", "zero_shot").mkdir(parents=True)
    assert available(other, "zero_shot") == ["UaC", "MDiTFace"], "but official pictures count"


@pytest.mark.slow
def test_two_processes_generate_what_one_does(config, kept, tmp_path):
    other = config.replace(
        profile=str(tmp_path / "run"),
        adapters=str(kept.with_name("adapters")),
        sampling={"num_processes": 2},
    )
    pictures = PictureSet(other, NAME, "test")
    assert pictures.missing == pictures.ids
    generate_missing([pictures])
    assert pictures.missing == []
    two = pictures.load(pictures.ids)
    one = PictureSet(config, NAME, "test").load(pictures.ids)
    assert (two - one).abs().max() < 1.5 / 127.5, "a level: another batch"


@pytest.mark.slow
def test_pictures_of_an_official_repository_take_their_place(config, kept, tmp_path):
    dataset = open_dataset(config, "test")
    sampled = PictureSet(config, NAME, "test").generate(progress=False)
    folder = tmp_path / "official"
    shutil.copytree(sampled, folder)
    (folder / f"{dataset.ids[0]}.png").write_bytes((folder / f"{dataset.ids[1]}.png").read_bytes())
    other = config.replace(profile=str(tmp_path / "run"))  # without weights
    assert available(other, "test") == []
    settings = tmp_path / "config.yaml"
    other.save(settings)
    arguments = ["evaluate", "--config", str(settings), "--images", str(folder), "--layout", "uac"]
    assert main(arguments) == 2, "the folder is not in that repository's naming"
    assert available(other, "test") == []
    assert main([*arguments[:-1], "mm2latent"]) == 0
    assert available(other, "test") == [NAME] and available(other, "zero_shot") == []
    shown = PictureSet(other, NAME, "test").scores()
    assert list(shown["id"]) == dataset.ids
    again = PictureSet(config, NAME, "test").scores()
    assert shown["text_independent"][0] != again["text_independent"][0]
    assert (shown["text_independent"][1:] - again["text_independent"][1:]).abs().max() < 1e-4


def test_the_lead_is_described_against_the_best_of_the_others():
    def row(method: str, value: float, low: float = 0, high: float = 0) -> dict:
        return {
            "method": method, "metric": "RFA", "critic": "independent", "source": "ours",
            "value": value, "ci_low": low, "ci_high": high,
        }  # fmt: skip

    rows = pd.DataFrame([row("EC2Face", 60), row("UaC", 20), row("TediGAN", 30), row("real", 90)])
    rows = pd.concat([rows, rows.assign(critic="guiding", value=1.0)])
    lead = pd.DataFrame([row("EC²Face - UaC", 40, 38, 42), row("EC²Face - TediGAN", 30, -1, 61)])
    assert describe_lead(rows, lead, ["RFA"]) == (
        "RFA: EC²Face (ours) 60.0, best of the paper's systems TediGAN 30.0: +30.0 [-1.0, +61.0], "
        "a factor of 2.00; 1 of 2 are significantly lower.\n"
        "Intervals are over faces; the trainings are held fixed."
    )
    f1 = lead.assign(metric="F1_RFA", value=1.0, ci_low=[-1.0, 0.5], ci_high=3.0)
    said = describe_lead(rows, pd.concat([lead, f1], ignore_index=True), ["RFA"])
    assert "TediGAN 30.0: +30.0 [-1.0, +61.0], F1_RFA +1.0 [+0.5, +3.0]" in said
    assert "0 of 2 are significantly lower" in said, "in recall or in F1 alone"
    newer = pd.DataFrame([row("EC2Face", 60), row("MDiTFace", 70), row("UaC", 20)])
    lead = pd.DataFrame([row("EC²Face - UaC", 40, 38, 42), row("EC²Face - MDiTFace", -10, -12, -8)])
    assert describe_lead(newer, lead, ["RFA"]) == (
        "RFA: EC²Face (ours) 60.0, best of the paper's systems UaC 20.0: +40.0 [+38.0, +42.0], "
        "a factor of 3.00; 1 of 1 are significantly lower; "
        "MDiTFace 70.0: -10.0 [-12.0, -8.0].\n"
        "Intervals are over faces; the trainings are held fixed."
    )
    alone = describe_lead(newer[:2], lead[1:], ["RFA"])
    assert alone.splitlines()[0] == "RFA: EC²Face (ours) 60.0; MDiTFace 70.0: -10.0 [-12.0, -8.0]."
    assert "No comparison system" in describe_lead(rows, pd.DataFrame())


def test_minutes_are_summed_over_cores_or_gpus():
    _, base, lora = comparison._own_facts(load_profile("mini"))
    assert base == pytest.approx(2 * 4272.1 / 60) and lora == pytest.approx(2 * 889.7 / 60)
    gpus = {"device": "8 x NVIDIA H100", "parameters": {"processes": 8}}
    assert comparison._devices(gpus) == 8 and comparison._devices({}) == 1


@pytest.mark.slow
def test_facts_are_those_of_the_trainings(config, kept, monkeypatch):
    monkeypatch.setattr(comparison, "_own_facts", lambda config: (2.4, 71.0, 15.0))
    real = comparison.sampling_seconds
    seconds = lambda c, name: 0.5 if name == "both" else real(c, name, 2)  # noqa: E731
    monkeypatch.setattr(comparison, "sampling_seconds", seconds)
    table = comparison.system_facts(config)
    assert list(table.index) == [NAME, METHODS["EC2Face"]]
    made = build(NAME, config).parameters() / 1e6
    assert table["parameters (M)"][NAME] == pytest.approx(made, abs=0.01)
    assert list(table.loc[METHODS["EC2Face"]]) == [2.4, 71.0, 15.0, 0.5]
    assert 0 < table["sampling (s)"][NAME] < 60
