"""The data sources, and that every stage of a foundation trains on a folder of photographs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ec2face_core.attributes import CLASS_ID, flip_labels
from ec2face_core.data import FaceDataset
from ec2face_lab.__main__ import main
from ec2face_lab.world.sources import FolderFaces, ProceduralFaces, caption_of, write_dataset


@pytest.fixture(scope="module")
def faces_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "faces"
    write_dataset(root, seed=8, splits={"train": 80, "test": 2}, size=64, progress=False)
    return root


@pytest.fixture(scope="module")
def folder(faces_dir) -> FolderFaces:
    return FolderFaces(faces_dir)


def test_a_folder_shows_each_face_once_an_epoch_and_mirrors_some(folder, faces_dir):
    dataset = FaceDataset(faces_dir, "train", 64)
    known = {}
    for i in range(len(dataset)):
        face = dataset[i]
        known[face.image.numpy().tobytes()] = (i, False, face.label_map)
        known[face.image.flip(-1).numpy().tobytes()] = (i, True, flip_labels(face.label_map))
    n = len(dataset) - len(range(0, len(dataset), 20))
    shown, described = folder.scenes(3, 0, 3 * n)
    found = [known[image.numpy().tobytes()] for image in shown.image]
    for label_map, (_, _, expected) in zip(shown.label_map, found, strict=True):
        assert torch.equal(label_map, expected)
    for epoch in range(3):
        faces = [i for i, _, _ in found[epoch * n : (epoch + 1) * n]]
        assert len(set(faces)) == n
        assert not any(i % 20 == 0 for i in faces), "these are held out"
    assert {mirrored for _, mirrored, _ in found} == {True, False}
    for (i, _, _), description in zip(found, described, strict=True):
        assert caption_of(description, 11) in dataset[i].captions


@pytest.mark.parametrize("kind", ["procedural", "folder"])
def test_a_face_depends_on_its_number_alone(kind, folder):
    source = folder if kind == "folder" else ProceduralFaces()
    together, described = source.scenes(5, 64, 32)
    again, described_again = source.scenes(5, 64, 32)
    assert torch.equal(together.image, again.image)
    assert described == described_again
    faces = source.faces(5, 32, 16)
    assert torch.equal(faces.image, source.faces(5, 32, 16).image)
    assert faces.captions == source.faces(5, 32, 16).captions
    other = source.faces(6, 32, 16)
    assert not torch.equal(faces.image, other.image)


def test_perception_models_see_rare_accessories_more_often(folder):
    rare = [CLASS_ID[name] for name in ("ear_r", "neck_l", "eye_g", "hat")]

    def share(label_maps: torch.Tensor) -> float:
        return (
            torch.stack([(label_maps == c).flatten(1).any(1) for c in rare]).any(0).float().mean()
        )

    assert share(folder.faces(1, 0, 300).label_map) > 1.3 * share(
        folder.scenes(1, 0, 300)[0].label_map
    )


def test_the_bundle_of_procedural_faces_is_not_overwritten(faces_dir, capsys):
    assert main(["pretrain", "vae", "--data", str(faces_dir)]) == 2
    assert "--data needs --out" in capsys.readouterr().err


@pytest.mark.slow
def test_every_stage_trains_on_a_folder(faces_dir, tmp_path, capsys):
    from ec2face_core.backbone import load_backbone
    from ec2face_core.config import load_profile
    from ec2face_core.perception import ClipScorer, FaceParser

    place = ["--data", str(faces_dir), "--out", str(tmp_path), "--size", "64"]
    assert main(["pretrain", "vae", *place]) == 2
    assert "pretrain parser --role guiding" in capsys.readouterr().err
    for arguments in (
        ["parser", "--role", "guiding", "--samples", "128"],
        ["vae", "--samples", "16"],
        ["captions", "--samples", "64"],
        ["latents", "--samples", "64"],
        ["flux", "--samples", "32", "--batch", "16"],
        ["distill", "--samples", "16", "--batch", "16"],
        ["clip", "--role", "guiding", "--samples", "128"],
        ["facts", "--samples", "128"],
    ):
        assert main(["pretrain", *arguments, *place]) == 0
    base = tmp_path / "training" / "base"
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    before = load_file(weights)
    shutil.rmtree(base.parent / "flux")
    further = ["--samples", "16", "--batch", "16", "--lr", "0", "--from", str(base)]
    assert main(["pretrain", "flux", *further, *place]) == 0
    assert all(torch.equal(before[name], value) for name, value in load_file(weights).items())
    shutil.rmtree(base.parent / "vae")
    further = ["--samples", "16", "--lr", "0", "--from", str(base)]
    assert main(["pretrain", "vae", *further, *place]) == 0
    kept = load_file(base / "vae" / weights.name)
    trained = torch.load(base.parent / "vae.pt", weights_only=True)
    assert kept.keys() == trained.keys()
    assert all(torch.equal(value.float(), trained[name]) for name, value in kept.items())
    assert json.loads((base.parent / "vae.json").read_text())["began_with"]["digest"]
    assert main(["pretrain", "keep", "--out", str(tmp_path)]) == 0
    restore = ["pretrain", "restore", "--from", str(tmp_path / "base"), "--out", str(tmp_path)]
    assert main(restore) == 2
    assert "is under way" in capsys.readouterr().err
    shutil.rmtree(base.parent)
    assert main(restore) == 0
    assert all(torch.equal(before[name], value) for name, value in load_file(weights).items())
    again = torch.load(base.parent / "vae.pt", weights_only=True)
    assert all(torch.equal(again[name], value.float()) for name, value in kept.items())
    assert json.loads((base.parent / "base.json").read_text())["faces"] == faces_dir.name
    config = load_profile(
        "photos64",
        backbone={"path": str(tmp_path / "flux")},
        perception={
            "parser": str(tmp_path / "parser_guiding.pt"),
            "clip": f"local-dir:{tmp_path / 'clip_guiding'}",
        },
    )
    record = json.loads((tmp_path / "flux" / "provenance.json").read_text())["parameters"]
    assert record["faces"] == faces_dir.name
    assert load_backbone(config.backbone).vae.config.scaling_factor == pytest.approx(
        record["autoencoder"]["scale"]
    )
    faces = FaceDataset(faces_dir, "test", 64)
    parsed = FaceParser.from_config(config.perception).parse(faces[0].image[None])
    assert parsed.shape == (1, 64, 64) and len(parsed.unique()) > 1
    score = ClipScorer.from_config(config.perception).score(faces[0].image[None], ["A person."])
    assert score.isfinite().all()
