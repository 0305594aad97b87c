"""On a GPU: procedural faces are those of the CPU, and comparison systems train and sample there.

Skipped without CUDA. With EC2FACE_GPU_TESTS=cpu it compares the CPU with itself.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from ec2face_core.data import open_dataset
from ec2face_lab.baselines import SYSTEMS, build
from ec2face_lab.baselines.system import Run

CUDA = torch.cuda.is_available()
ON_CPU = os.environ.get("EC2FACE_GPU_TESTS") == "cpu"
DEVICE = "cuda" if CUDA and not ON_CPU else "cpu"
FACES = 64
LONG = 1e30  # seconds, so that steps end a stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or ON_CPU), reason="needs CUDA"),
]


@pytest.mark.parametrize("look", ["first", "second"])
@pytest.mark.parametrize(("world", "size"), [("world", 64), ("world.portrait", 128)])
def test_faces_of_the_gpu_are_those_of_the_cpu(world, size, look):
    rendering = importlib.import_module(f"ec2face_lab.{world}.rendering")
    scenes = importlib.import_module(f"ec2face_lab.{world}.scenes")
    faces = scenes.sample_scenes(5, range(FACES), look)
    expected = rendering.render(faces, size, "cpu")
    found = rendering.render(faces, size, DEVICE)
    assert found.image.device.type == found.label_map.device.type == DEVICE
    other = found.label_map.cpu() != expected.label_map
    assert other.float().mean() < 1e-3
    for name in ("image", "albedo", "normals", "depth"):
        difference = (getattr(found, name).cpu() - getattr(expected, name)).abs()
        assert difference.mean() < 1e-3
        assert (difference > 0.05).float().mean() < 2e-3


@pytest.mark.parametrize("name", SYSTEMS)
def test_comparison_systems_train_there_and_sample_as_on_the_cpu(
    name, tiny_config, tmp_path, monkeypatch
):
    config = tiny_config.replace(
        sampling={"steps": 2}, baselines={"pool": 64, "foundation_seconds": LONG}
    )
    for module in ("mm2latent", "tedigan", "style", "unets", "pixelface"):
        monkeypatch.setattr(f"ec2face_lab.baselines.{module}.BATCH", 2)
    monkeypatch.setattr("ec2face_lab.baselines.mm2latent.CENTRED", 8)
    dataset = open_dataset(config, "train")
    system = build(name, config, DEVICE)
    system.fit(dataset, Run(tmp_path / name, LONG, max_steps=2))
    there = build(name, config, "cpu")
    there.networks.load_state_dict(system.networks.state_dict())
    masks = torch.stack([dataset.label_map(face) for face in dataset.ids[:2]])
    pictures = []
    for one in (system, there):
        one.clip_steps = 1  # of TediGAN
        one.networks.requires_grad_(False).eval()
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        pictures.append(one.generate(["A woman smiles."] * 2, masks, generators))
    assert pictures[0].device.type == DEVICE
    assert pictures[0].std() > 0
    assert (pictures[0].cpu() - pictures[1]).abs().mean() < 1e-2
