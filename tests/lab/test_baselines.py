"""What the comparison systems share: training, resuming, sampling, weights, folders."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from ec2face_core.backbone import load_backbone
from ec2face_core.config import Config, ConfigError
from ec2face_core.data import open_dataset
from ec2face_core.runs import path_digest
from ec2face_lab import baselines
from ec2face_lab.baselines import NEWER, SYSTEMS, build
from ec2face_lab.baselines.int8_weights import read_weights, write_weights
from ec2face_lab.baselines.system import Run
from ec2face_lab.study.painters import NOTICE
from ec2face_lab.study.pictures import PictureSet
from ec2face_lab.study.png import load_pictures
from ec2face_lab.world import training
from ec2face_lab.world.networks import SECOND, save_backbone, tiny_backbone

MODULES = "style tedigan mm2latent pixelface unets uac codiffusion controlnext flux"
STAGES = {
    "TediGAN": ["visual", "mask", "text"],
    "UaC": ["mask", "text"],
    "PixelFace+": ["adversarial"],
    "CoDiffusion": ["mask", "influence"],
    "ControlNeXt": ["control"],
    "MM2Latent": ["masks", "mapping"],
    "Face-MoGLE": ["control"],
    "MDiTFace": ["control"],
}
LONG = 1e30  # seconds, so that steps end a stage and learning rates do not depend on the time
PROMPTS = ["A woman with black hair.", "The man has eyeglasses."]


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def config(tiny_config) -> Config:
    return tiny_config.replace(
        sampling={"steps": 2}, baselines={"pool": 64, "foundation_seconds": LONG}
    )


@pytest.fixture(scope="module")
def faces(config):
    return open_dataset(config, "train")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(scope="module", params=SYSTEMS)
def trained(request, config, faces, runs):
    """(a system after two steps a stage, one killed in its last stage and resumed, run folder)."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES.split():
            module = importlib.import_module(f"ec2face_lab.baselines.{module}")
            patch.setattr(module, "BATCH", 2)
            if hasattr(module, "CENTRED"):
                patch.setattr(module, "CENTRED", 8)
        patch.setattr(training, "CHECKPOINT_SECONDS", -1.0)  # a checkpoint after every step
        straight = build(name, config)
        stopped = build(name, config)
        straight.fit(faces, Run(runs / f"{name}-straight", LONG, max_steps=2))
        save = training.save_checkpoint
        left = 2 * len(STAGES[name]) - 1

        def save_or_die(*arguments, **options):
            nonlocal left
            save(*arguments, **options)
            left -= 1
            if not left:
                raise Killed

        patch.setattr(training, "save_checkpoint", save_or_die)
        with pytest.raises(Killed):
            stopped.fit(faces, Run(runs / name, LONG, max_steps=2))
        patch.setattr(training, "save_checkpoint", save)
        stopped = build(name, config)
        stopped.fit(faces, Run(runs / name, LONG, max_steps=2))
    for one in (straight, stopped):
        one.clip_steps = 1  # of TediGAN
    return straight, stopped, runs / name


@pytest.fixture(scope="module")
def masks(config) -> torch.Tensor:
    test = open_dataset(config, "test")
    return torch.stack([test[i].label_map for i in range(2)])


def noise(n: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.mark.slow
def test_resumed_training_equals_an_uninterrupted_one(trained, config):
    straight, stopped, folder = trained
    a = straight.networks.state_dict()
    b = stopped.networks.state_dict()
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    fresh = build(straight.name, config).networks.state_dict()
    moved = {k.split(".")[0] for k in a if not torch.equal(a[k], fresh[k])}
    assert moved == set(straight.networks), "every network has been trained"
    assert not any(p.requires_grad for p in straight.networks.parameters())
    logs = {path.parent.name: path for path in folder.glob("*/metrics.jsonl")}
    assert set(logs) == set(STAGES[straight.name])
    for log in logs.values():
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2], log
        assert all(math.isfinite(value) for row in rows for value in row.values())


def test_what_is_shared_is_frozen_and_trained_once(trained, runs):
    """TediGAN and MM2Latent stand on one generator, CoDiffusion and ControlNeXt on one U-Net."""
    own = trained[0]
    if own.name in NEWER:
        assert own.budget(own.config) == own.config.baselines.seconds, "its base is EC²Face's"
        base = load_backbone(own.config.backbone, ("transformer",)).transformer.state_dict()
        found = own.transformer.state_dict()
        kept = {k: found.get(k, found.get(k.replace(".weight", ".base_layer.weight")
                .replace(".bias", ".base_layer.bias"))) for k in base}  # fmt: skip
        assert all(torch.equal(base[k], kept[k]) for k in base)
        return
    if not own.shares:
        assert own.budget(own.config) == LONG + own.config.baselines.seconds
        return
    assert own.budget(own.config) == own.config.baselines.seconds
    stage, key = own.shares
    fresh = build(own.name, own.config).networks[key]
    read_weights(runs / "shared" / f"{stage}.safetensors", fresh)
    shared, found = fresh.state_dict(), own.networks[key].state_dict()
    assert found.keys() == shared.keys()
    assert all(torch.equal(shared[k], found[k]) for k in shared)


def test_pictures_follow_their_noise_and_both_conditions(trained, masks):
    own = trained[0]
    pictures = own.generate(PROMPTS, masks, noise())
    assert pictures.shape == (2, 3, 64, 64) and pictures.dtype == torch.float32
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert torch.equal(pictures, own.generate(PROMPTS, masks, noise()))
    assert not torch.equal(pictures, own.generate(PROMPTS, masks.flip(0), noise()))
    assert not torch.equal(pictures, own.generate(PROMPTS[::-1], masks, noise()))
    others = [torch.Generator().manual_seed(7 + i) for i in range(2)]
    drawn = own.generate(PROMPTS, masks, others)
    assert torch.equal(pictures, drawn) == (own.name == "MM2Latent"), "which maps to one code"
    second = own.generate(PROMPTS[1:], masks[1:], noise()[1:])
    assert (second[0] - pictures[1]).abs().mean() < 1e-3, "neither batch nor order counts"


def test_one_condition_alone_where_the_original_has_it(trained, masks):
    own = trained[0]
    for what, given in (("text", (PROMPTS, None)), ("mask", (None, masks))):
        if what in own.takes:
            assert own.generate(*given, noise()).shape == (2, 3, 64, 64)
        else:
            with pytest.raises(ValueError, match="needs a text and a mask"):
                own.generate(*given, noise())
    with pytest.raises(ValueError, match="needs a text"):
        own.generate(None, None, noise())
    with pytest.raises(ValueError, match="3 generators"):
        own.generate(PROMPTS, masks, noise(3))


def test_other_sizes_are_refused_before_anything_is_trained(config):
    for name in SYSTEMS:
        with pytest.raises(ConfigError, match="official repository"):
            build(name, config.replace(data={"size": 256}))


def test_words_that_the_vocabulary_lacks_are_named(config, faces, masks):
    own = build("MM2Latent", config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.generate([faces.manifest_caption(name) for name in faces.ids[:2]], masks, noise())
    with pytest.warns(UserWarning, match=r"has Xylophone, ñandú; such"):
        own.generate(["A Xylophone.", "The ñandú has a Xylophone"], masks, noise())


def test_weights_come_back(trained, config, masks, tmp_path):
    own = trained[0]
    own.save(tmp_path / "first" / "one")
    first, second = build(own.name, config), build(own.name, config)
    first.clip_steps = second.clip_steps = 1
    first.load(tmp_path / "first" / "one")
    first.save(tmp_path / "second" / "one")
    second.load(tmp_path / "second" / "one")
    pictures = first.generate(PROMPTS, masks, noise())
    again = second.generate(PROMPTS, masks, noise())
    assert (pictures - again).abs().max() < 0.01
    assert (pictures - own.generate(PROMPTS, masks, noise())).abs().mean() < 0.02  # 8 bits
    bytes_kept = sum(f.stat().st_size for f in (tmp_path / "first").rglob("*.safetensors"))
    assert bytes_kept < 1.1 * own.parameters(), "a byte a weight"
    if own.shares:
        shared = tmp_path / "first" / "shared" / f"{own.shares[0]}.safetensors"
        about = {"parameters": {"stands_on": {"shared": path_digest(shared)}}}
        (tmp_path / "first" / "one" / "provenance.json").write_text(json.dumps(about))
        first.load(tmp_path / "first" / "one")
        shared.write_bytes((tmp_path / "second" / "one" / "weights.safetensors").read_bytes())
        with pytest.raises(ConfigError, match="train it again"):
            first.load(tmp_path / "first" / "one")
        shared.unlink()
        with pytest.raises(FileNotFoundError, match="shared"):
            first.load(tmp_path / "first" / "one")
    if own.name in NEWER:
        about = {"parameters": {"stands_on": {"base": "another one"}}}
        (tmp_path / "first" / "one" / "provenance.json").write_text(json.dumps(about))
        with pytest.raises(ConfigError, match=r"than .*transformer: train it"):
            first.load(tmp_path / "first" / "one")
    with pytest.raises(FileNotFoundError, match="TRAIN=1"):
        first.load(tmp_path / "nowhere")


def test_weights_in_eight_bits_are_within_half_a_step(tmp_path):
    torch.manual_seed(0)
    net, other = (torch.nn.Linear(64, 32, dtype=torch.float64) for _ in range(2))
    net.weight.data[3] *= 100
    net.weight.data[5] = 0
    write_weights(tmp_path / "a.safetensors", net)
    read_weights(tmp_path / "a.safetensors", other)
    step = net.weight.abs().amax(1, keepdim=True) / 127
    assert ((other.weight - net.weight).abs() <= step / 2 + 1e-6).all()
    assert torch.allclose(other.bias, net.bias, atol=1e-3)


def test_parameters_are_within_a_fifth_of_the_transformers(trained):
    assert 0.8 * 2.4e6 <= trained[0].parameters() <= 1.2 * 2.4e6


def test_rows_and_where_their_weights_lie(tiny_config, tmp_path):
    rows = ["TediGAN", "UaC", "PixelFace+", "CoDiffusion", "ControlNeXt", "MM2Latent"]
    classes = baselines.systems()
    assert list(baselines.PAPER) == rows
    rows += ["Face-MoGLE", "MDiTFace"]
    assert list(classes) == rows == [cls.name for cls in classes.values()]
    with pytest.raises(ConfigError, match="known: TediGAN"):
        build("StyleFace", tiny_config)
    config = tiny_config.replace(adapters=str(tmp_path / "adapters"), profile=str(tmp_path / "run"))
    kept = tmp_path / "baselines" / "pixelface"
    assert baselines.weights_dir(config, "PixelFace+") == kept and not baselines.trained(config)
    retrained = tmp_path / "run" / "baselines" / "pixelface"
    retrained.mkdir(parents=True)  # as while it trains
    assert baselines.weights_dir(config, "PixelFace+") == kept
    (retrained / baselines.WEIGHTS).touch()
    assert baselines.weights_dir(config, "PixelFace+") == retrained
    assert baselines.trained(config) == ["PixelFace+"]


def modified(folder: Path, name: str) -> int:
    return (folder / f"{name}.png").stat().st_mtime_ns


def test_a_split_is_generated_once_and_completed(config, tmp_path):
    config = config.replace(adapters=str(tmp_path / "adapters"), profile=str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="no weights of MM2Latent"):
        PictureSet(config, "MM2Latent", "test").generate(shard=(0, 1), progress=False)
    assert not (config.run_dir / "images").exists()
    build("MM2Latent", config).save(tmp_path / "baselines" / "mm2latent")
    pictures = PictureSet(config, "MM2Latent", "test")
    folder = pictures.generate(shard=(0, 1), progress=False)
    ids = pictures.dataset.ids
    assert {path.stem for path in folder.glob("*.png")} == set(ids)
    with Image.open(folder / f"{ids[0]}.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert picture.text["Disclaimer"] == NOTICE and "MM2Latent" in picture.text["Model"]
    before = load_pictures(folder, ids)
    times = [modified(folder, name) for name in ids]
    (folder / f"{ids[2]}.png").unlink()
    assert PictureSet(config, "MM2Latent", "test").generate(shard=(0, 1), progress=False) == folder
    same = [modified(folder, name) == time for name, time in zip(ids, times, strict=True)]
    assert same == [True, True, False, True]
    # a level of 255, as sums of a smaller batch may be rounded otherwise
    assert (load_pictures(folder, ids) - before).abs().max() < 1.5 / 127.5
    other = build("MM2Latent", config.replace(seed=7))
    other.save(tmp_path / "baselines" / "mm2latent")
    assert PictureSet(config, "MM2Latent", "test", limit=1).folder != folder


@pytest.fixture(scope="module")
def config_128(config, tiny_corpus, tmp_path_factory) -> Config:
    """The second miniature's layout at random weights, and its world."""
    folder = tmp_path_factory.mktemp("second")
    save_backbone(tiny_backbone(tiny_corpus, 1, SECOND), folder / "flux")
    return config.replace(
        data={
            "root": str(folder / "faces"), "size": 128, "train": 4, "test": 2, "validation": 0,
            "maker": "ec2face_lab.world.sources:write_portraits",
        },
        backbone={"path": str(folder / "flux"), "text_length": 64},
        baselines={"pool": 8},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_learns_and_draws_at_128_px(name, config_128, tmp_path, monkeypatch):
    """One step of every stage; a mask of 128 px and a text make a picture of 128 px."""
    for module in MODULES.split():
        module = importlib.import_module(f"ec2face_lab.baselines.{module}")
        monkeypatch.setattr(module, "BATCH", 2)
        if hasattr(module, "CENTRED"):
            monkeypatch.setattr(module, "CENTRED", 4)
    system = build(name, config_128)
    system.fit(open_dataset(config_128, "train"), Run(tmp_path / "own", LONG, max_steps=1))
    system.clip_steps = 1  # of TediGAN
    test = open_dataset(config_128, "test")
    masks = torch.stack([test[i].label_map for i in range(2)])
    images = system.generate(PROMPTS, masks, noise())
    assert images.shape == (2, 3, 128, 128)
    assert images.isfinite().all()
    system.save(tmp_path / "own")
    again = build(name, config_128)
    again.load(tmp_path / "own")
    again.clip_steps = 1
    other = again.generate(PROMPTS, masks, noise())
    assert (other - images).abs().mean() < 0.05, "weights are kept in eight bits"
