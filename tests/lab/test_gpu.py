"""On a GPU: procedural faces are those of the CPU, up to pixels on an edge.

Skipped without CUDA. With EC2FACE_GPU_TESTS=cpu it compares the CPU with itself.
"""

from __future__ import annotations

import importlib
import os

import pytest
import torch

CUDA = torch.cuda.is_available()
ON_CPU = os.environ.get("EC2FACE_GPU_TESTS") == "cpu"
DEVICE = "cuda" if CUDA and not ON_CPU else "cpu"
FACES = 64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or ON_CPU), reason="needs CUDA"),
]


@pytest.mark.parametrize("look", ["first", "second"])
@pytest.mark.parametrize(("world", "size"), [("world", 64), ("world.portrait", 128)])
def test_faces_of_the_gpu_are_those_of_the_cpu(world, size, look):
    package = f"ec2face_lab.{world}"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} does not exist")
    rendering = importlib.import_module(f"{package}.rendering")
    scenes = importlib.import_module(f"{package}.scenes").sample_scenes(5, range(FACES), look)
    expected = rendering.render(scenes, size, "cpu")
    found = rendering.render(scenes, size, DEVICE)
    assert found.image.device.type == found.label_map.device.type == DEVICE
    other = found.label_map.cpu() != expected.label_map
    assert other.float().mean() < 1e-3
    for name in ("image", "albedo", "normals", "depth"):
        difference = (getattr(found, name).cpu() - getattr(expected, name)).abs()
        assert difference.mean() < 1e-3
        assert (difference > 0.05).float().mean() < 2e-3
