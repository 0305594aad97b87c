"""The exporter of the second parser, on a SegFormer of the real layout at random weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ec2face_core.attributes import CLASSES
from ec2face_core.perception import FaceParser, WeightsError
from ec2face_lab.__main__ import main
from ec2face_lab.prepare.second_parser import export_segformer

SIZE = 64


def segformer(folder, names):
    """A tiny SegFormer with these classes, saved as on the hub."""
    from transformers import (
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = SegformerConfig(
            hidden_sizes=[16, 16, 24, 32],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=16,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
        net = SegformerForSemanticSegmentation(config).eval()
    net.save_pretrained(folder)
    SegformerImageProcessor().save_pretrained(folder)
    return net


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The original network, its class names, and the parser that opens the exported file."""
    folder = tmp_path_factory.mktemp("segformer")
    names = [*reversed(CLASSES)]  # found by name, wherever they are
    net = segformer(folder / "hub", names)
    file = export_segformer(folder / "hub", folder / "parser.pt", SIZE)
    return net, names, FaceParser(file, SIZE)


@pytest.mark.parametrize("batch", (1, 3))
def test_the_export_is_the_network_with_our_classes(exported, batch):
    net, names, parser = exported
    images = torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)  # ImageNet's
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
    with torch.no_grad():
        logits = net(pixel_values=(images - mean) / std).logits
    wanted = F.interpolate(logits, (SIZE, SIZE), mode="bilinear", align_corners=False)
    wanted = wanted[:, [names.index(name) for name in CLASSES]]
    torch.testing.assert_close(parser.logits(2 * images - 1), wanted, atol=1e-4, rtol=1e-4)


def test_other_sizes_and_gradients(exported):
    parser = FaceParser.__new__(FaceParser)
    parser.__dict__ = dict(exported[2].__dict__, size=48)  # as FaRL's 448 for a network of 512
    images = torch.zeros(2, 3, 80, 80, requires_grad=True)
    logits = parser.logits(images)
    assert logits.shape == (2, 19, 80, 80)
    logits.square().sum().backward()
    assert images.grad.abs().sum() > 0


def test_other_classes_are_refused(tmp_path):
    segformer(tmp_path / "hub", [*CLASSES[:-1], "banana"])
    with pytest.raises(WeightsError, match="cloth"):
        export_segformer(tmp_path / "hub", tmp_path / "parser.pt", SIZE)
    with pytest.raises(WeightsError, match="no SegFormer"):
        export_segformer(tmp_path, tmp_path / "parser.pt", SIZE)
    assert not (tmp_path / "parser.pt").exists()


def test_prepare_exports_a_downloaded_one(paper_config, downloads, tmp_path, monkeypatch, capsys):
    segformer(tmp_path / "hub", CLASSES)
    monkeypatch.setattr("ec2face_lab.commands.prepare.local_folder", lambda *_: tmp_path / "hub")
    file = tmp_path / "weights" / "second.pt"
    path = tmp_path / "config.yaml"
    paper_config.replace(perception={"scoring_parser": str(file)}).save(path)
    given = ["prepare", "--config", str(path), "--downloads", str(downloads)]
    assert main([*given, "--dry-run"]) == 2 and not file.exists()
    assert main(given) == 2  # random weights: its classes are in no order, which is said
    assert file.exists() and "INCOMPLETE  scoring parser" in capsys.readouterr().out
    assert main([*given, "export-parser", str(tmp_path / "hub")]) == 0
