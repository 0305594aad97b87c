"""The inventory names what is missing, incomplete or of the wrong kind."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from face_files import save_colour_parser

from ec2face_core.attributes import CLASSES, FACER_TO_CELEBAMASK, FLIP_PAIRS
from ec2face_core.config import Config
from ec2face_lab.prepare import inventory
from ec2face_lab.prepare.convert import from_celebamask_hq


def states(config: Config, downloads: Path, content: bool = False) -> dict[str, str]:
    """State of each need that is not there."""
    findings = inventory.survey(config, downloads, content)
    return {f.need.name: f.state for f in findings if f.state != "there"}


def problems(config: Config, downloads: Path, need: inventory.Need) -> str:
    """What the inventory says of one need."""
    (finding,) = (f for f in inventory.survey(config, downloads) if f.need == need)
    return "\n".join(finding.problems)


def test_incomplete_data_are_counted_and_named(paper_config, downloads):
    raw = downloads / "CelebAMask-HQ"
    (raw / "CelebA-HQ-img" / "3.jpg").unlink()
    for path in (raw / "CelebAMask-HQ-mask-anno").rglob("00001_*"):
        path.unlink()
    (downloads / "FFHQ-Text" / "Text" / "01234.txt").unlink()
    assert problems(paper_config, downloads, inventory.IMAGES) == "4 of 5 faces; missing: 3"
    assert problems(paper_config, downloads, inventory.PARTS) == "4 of 5 faces; missing: 1"
    assert problems(paper_config, downloads, inventory.PHOTOS) == "2 of 3 captions; missing: 01234"
    assert states(paper_config, downloads).keys() == {
        "CelebA-HQ-img", "CelebAMask-HQ-mask-anno", "FFHQ-Text",
    }  # fmt: skip


def test_a_root_is_compared_with_the_configuration(paper_config, downloads):
    data = paper_config.data
    root = Path(data.root)
    from_celebamask_hq(downloads / "CelebAMask-HQ", root, None, data.size, data.train, False)
    assert problems(paper_config, downloads, inventory.MM_CELEBA) == ""
    fewer = paper_config.replace(**{"data.test": 1})
    assert "data.test asks for 1" in problems(fewer, downloads, inventory.MM_CELEBA)
    (root / "mask" / "1.png").unlink()
    assert "mask/1.png: missing mask" in problems(paper_config, downloads, inventory.MM_CELEBA)


@pytest.mark.parametrize("place", ("celeba-caption", "Multi-Modal-CelebA-HQ/text", "a/b/c/d"))
def test_captions_are_found_wherever_they_were_unpacked(paper_config, downloads, place):
    (downloads / "FFHQ-Text" / "Text" / "0.txt").write_text("Not these.")
    (downloads / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(downloads / "multi-modal-celeba/text/celeba-caption", downloads / place)
    assert inventory.captions_folder(downloads) == downloads / place
    assert problems(paper_config, downloads, inventory.TEXTS) == ""


def test_a_clip_by_open_clips_own_name_is_looked_for_in_its_repository(paper_config, downloads):
    named = paper_config.replace(perception={"clip": "ViT-L-14-quickgelu/openai"})
    assert "hf download timm/vit_large_patch14_clip_224.openai" in problems(
        named, downloads, inventory.CLIP
    )
    unknown = paper_config.replace(perception={"clip": "ViT-L-14/nobody"})
    assert "open_clip knows no such name" in problems(unknown, downloads, inventory.CLIP)


# ---------------------------------------------------------------------------- the hub's cache


@pytest.fixture
def hub_config(paper_config) -> Config:
    return paper_config.replace(**{"backbone.path": "black-forest-labs/FLUX.1-dev"})


@pytest.fixture
def hub_cache(tmp_path) -> Path:
    """The cached repository of FLUX.1-dev, with an unfinished download."""
    cache = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-dev"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "0a1b.incomplete").write_bytes(b"123")
    return cache


def test_an_unfinished_download_is_incomplete(hub_config, hub_cache, downloads):
    assert states(hub_config, downloads) == {inventory.FLUX.name: "incomplete"}
    message = problems(hub_config, downloads, inventory.FLUX)
    assert "half-downloaded, 3 bytes so far" in message and "hf download" in message


def test_the_hashes_of_cached_files_are_compared_on_request(
    hub_config, hub_cache, downloads, flux_folder
):
    shutil.move(flux_folder, hub_cache / "snapshots" / "abc")
    (hub_cache / "refs").mkdir()
    (hub_cache / "refs" / "main").write_text("abc")
    file = hub_cache / "snapshots" / "abc" / "vae" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    blob = hub_cache / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    file.unlink()
    file.symlink_to(blob)
    assert not states(hub_config, downloads, content=True)
    blob.write_bytes(content[:-4] + b"hole")  # the right size, as where a download left holes
    assert not states(hub_config, downloads)
    assert states(hub_config, downloads, content=True) == {inventory.FLUX.name: "incomplete"}


# ------------------------------------------------------------------------------------ parsers


def by_facers_names() -> list[int]:
    """Channels in the order of facer's own class names, which exchange left and right."""
    order = list(FACER_TO_CELEBAMASK)
    for a, b in FLIP_PAIRS:
        i = order.index(a)
        j = order.index(b)
        order[i] = b
        order[j] = a
    return order


def test_a_parser_with_exchanged_classes_is_named(paper_config, downloads):
    parser = Path(paper_config.perception.parser)
    save_colour_parser(parser, by_facers_names())
    message = problems(paper_config, downloads, inventory.FARL)
    assert "wrong class order: it takes l_eye for r_eye, r_eye for l_eye, l_brow for" in message
    save_colour_parser(parser, range(len(CLASSES)))
    message = problems(paper_config, downloads, inventory.FARL)
    assert "wrong class order" in message and "skin for" in message


def test_without_known_masks_the_class_order_is_not_checked(paper_config, downloads):
    shutil.rmtree(downloads / "CelebAMask-HQ")
    save_colour_parser(Path(paper_config.perception.parser), by_facers_names())
    assert problems(paper_config, downloads, inventory.FARL) == ""


def test_a_parser_is_a_whole_torchscript_file(paper_config, downloads):
    parser = Path(paper_config.perception.parser)
    whole = parser.read_bytes()
    parser.write_bytes(whole[: len(whole) // 2])
    assert "half-downloaded" in problems(paper_config, downloads, inventory.FARL)
    torch.save({"net": torch.zeros(1)}, parser)
    message = problems(paper_config, downloads, inventory.FARL)
    assert "is no TorchScript file" in message and "refused" in message
