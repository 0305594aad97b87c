"""From raw downloads to data roots: the report, the checks of weights, photos, a full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor, nn

from ec2face_core.attributes import CLASS_ID, CLASSES, FACER_TO_CELEBAMASK, FLIP_PAIRS, PALETTE
from ec2face_core.config import Config, load_profile
from ec2face_core.data import DataError, FaceDataset
from ec2face_core.perception import FaceParser, WeightsError
from ec2face_lab.__main__ import main
from ec2face_lab.prepare import inventory, photos, weights
from ec2face_lab.prepare.convert import from_celebamask_hq
from ec2face_lab.prepare.validate import validate

SIZE, TRAIN, TEST, ZERO_SHOT = 32, 3, 2, 3
SHARDS = {"transformer": ("diffusion_pytorch_model", 3), "text_encoder_2": ("model", 2)}
SINGLES = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}


def label_map(shift: int = 0) -> np.ndarray:
    """A schematic face, 32 px, sides as CelebAMask-HQ has them: l_ at image right."""
    ids = np.zeros((16, 16), np.uint8)
    ids[4:14, 3:13], ids[0:4, 2:14], ids[14:, 5:11] = (
        CLASS_ID[name] for name in ("skin", "hair", "neck")
    )
    ids[6, 4:7], ids[6, 9:12] = CLASS_ID["r_eye"], CLASS_ID["l_eye"]
    ids[5, 4:7], ids[5, 9:12] = CLASS_ID["r_brow"], CLASS_ID["l_brow"]
    ids[8:10, 7:9], ids[11, 6:10] = CLASS_ID["nose"], CLASS_ID["mouth"]
    return np.roll(ids, shift, axis=1).repeat(2, 0).repeat(2, 1)


def picture(ids: np.ndarray, scale: int = 2) -> Image.Image:
    """The mask in the palette's colours: a face that `ColourParser` reads."""
    return Image.fromarray(np.array(PALETTE, np.uint8)[ids].repeat(scale, 0).repeat(scale, 1))


class ColourParser(nn.Module):
    """FaRL's contract; the class of a pixel is its nearest palette colour, by a 1 x 1 product."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        colours = torch.tensor([PALETTE[i] for i in order]) / 255
        self.register_buffer("colours", colours)
        self.register_buffer("lengths", colours.square().sum(1))

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = 2 * torch.einsum("bchw,kc->bkhw", image, self.colours)
        aux: dict[str, Tensor] = {}
        return 100 * (logits - self.lengths[None, :, None, None]), aux


def save_colour_parser(path: Path, order=FACER_TO_CELEBAMASK) -> Path:
    torch.jit.script(ColourParser(list(order))).save(str(path))
    return path


def canonical_points(side: int) -> np.ndarray:
    """The five points whose FFHQ frame is exactly a frame of this side."""
    c, m = side / 2 - 0.5, side / 3.6
    y = c - 0.1 * m
    rows = [(c - side / 8, y), (c + side / 8, y), (c, y + m / 2)]
    return np.array([*rows, (c - side / 12, y + m), (c + side / 12, y + m)])


def detector(points_of=canonical_points):
    """Finds one face in every photo, at the points that a photo's side has."""

    def detect(images: Tensor) -> dict[str, Tensor]:
        points = torch.as_tensor(points_of(images.shape[-1]), dtype=torch.float32)[None]
        low, high = points.amin(1), points.amax(1)
        return {"points": points, "rects": torch.cat([low, high], 1)}

    return detect


def flux_repository(folder: Path) -> Path:
    """The files of black-forest-labs/FLUX.1-dev, with one small tensor a shard."""

    def write(path: str, content: dict) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))

    write("model_index.json", {"_class_name": "FluxPipeline"})
    write("scheduler/scheduler_config.json", {})
    for name in ("tokenizer", "tokenizer_2"):
        write(f"{name}/tokenizer_config.json", {})
    write("tokenizer/vocab.json", {})
    (folder / "tokenizer_2" / "spiece.model").touch()
    for name, stem in SINGLES.items():
        write(f"{name}/config.json", {})
        save_file({"w": np.ones(8, np.float32)}, folder / name / f"{stem}.safetensors")
    for name, (stem, n) in SHARDS.items():
        write(f"{name}/config.json", {})
        files = [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        for i, file in enumerate(files):
            save_file({f"layer.{i}": np.ones(8, np.float32)}, folder / name / file)
        index = {"weight_map": {f"layer.{i}": file for i, file in enumerate(files)}}
        write(f"{name}/{stem}.safetensors.index.json", index)
    return folder


@pytest.fixture
def downloads(tmp_path) -> Path:
    """CelebAMask-HQ, MM-CelebA-HQ's texts, FFHQ-Text and the detector, as they are unpacked."""
    folder = tmp_path / "downloads"
    raw, texts = folder / "CelebAMask-HQ", folder / "multi-modal-celeba/text/celeba-caption"
    annotation, ffhq = raw / "CelebAMask-HQ-mask-anno" / "0", folder / "FFHQ-Text"
    made = (raw / "CelebA-HQ-img", annotation, texts, ffhq / "Image", ffhq / "Text")
    for path in (*made, folder / "weights"):
        path.mkdir(parents=True)
    for k in range(TRAIN + TEST):
        ids = label_map(k % 2)
        picture(ids).save(raw / "CelebA-HQ-img" / f"{k}.jpg", quality=100, subsampling=0)
        for number in np.unique(ids[ids > 0]):
            part = np.where(ids == number, 255, 0).astype(np.uint8)
            path = annotation / f"{k:05d}_{CLASSES[number]}.png"
            Image.fromarray(part).convert("RGB").save(path)
        (texts / f"{k}.txt").write_text(f"Face {k}.\nAnother.\n")
    for name in ("00007", "01234", "69999"):
        picture(label_map(), 1).save(ffhq / "Image" / f"{name}.png")
        (ffhq / "Text" / f"{name}.txt").write_text(f"A woman, {name}.\nShe smiles.\n")
    torch.save({"weight": torch.zeros(2)}, folder / inventory.DETECTOR)
    return folder


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """The paper profile with every weight in its place; data roots and caches in `tmp_path`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(prepare, "face_detector", lambda path, device: detector())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    clip, parser = tmp_path / "clip", save_colour_parser(tmp_path / "parser.pt")
    clip.mkdir()
    (clip / "open_clip_config.json").write_text("{}")
    save_file({"w": np.ones(4, np.float32)}, clip / "open_clip_model.safetensors")
    return load_profile(
        "paper",
        data={
            "root": str(tmp_path / "roots" / "faces"), "size": SIZE, "train": TRAIN, "test": TEST,
            "zero_shot_root": str(tmp_path / "roots" / "foreign"), "zero_shot": ZERO_SHOT,
        },
        backbone={"path": str(flux_repository(tmp_path / "FLUX.1-dev"))},
        perception={
            "parser": str(parser), "scoring_parser": str(parser), "parser_size": SIZE,
            "clip": f"local-dir:{clip}", "scoring_clip": f"local-dir:{clip}",
        },
        evaluation={"lpips": "alex-random", "niqe_refit": True},
    )  # fmt: skip


def run(config: Config, downloads: Path, *options: str) -> int:
    path = downloads.parent / "config.yaml"
    config.save(path)
    return main(["prepare", "--config", str(path), "--downloads", str(downloads), *options])


def files(root: Path) -> dict[str, int]:
    """Every file under a folder with its time of writing."""
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def states(config: Config, downloads: Path, content: bool = False) -> dict[str, str]:
    found = inventory.survey(config, downloads, content)
    return {f.need.name: f.state for f in found if f.state != "there"}


def problems(config: Config, downloads: Path, need: inventory.Need) -> str:
    (found,) = (f for f in inventory.survey(config, downloads) if f.need == need)
    return "\n".join(found.problems)


# ------------------------------------------------------------------------------------ the whole


def test_from_downloads_to_verified_roots(config, downloads, tmp_path, capsys):
    config.save(tmp_path / "config.yaml")
    before = files(tmp_path)
    assert run(config, downloads, "--dry-run") == 0
    before[str(tmp_path / "config.yaml")] = files(tmp_path)[str(tmp_path / "config.yaml")]
    assert files(tmp_path) == before  # the dry run writes nothing
    printed = capsys.readouterr().out
    assert "10 of 10 there" in printed and "without --dry-run" in printed
    assert run(config, downloads) == 0
    for root in (config.data.root, config.data.zero_shot_root):
        assert not validate(root).problems
    assert sorted(p.name for p in (tmp_path / "roots").iterdir()) == ["faces", "foreign"]
    train, test = FaceDataset(config.data.root, "train"), FaceDataset(config.data.root, "test")
    assert (train.ids, test.ids) == (["0", "1", "2"], ["3", "4"])
    assert np.array_equal(test[0].label_map, label_map(1)) and train[0].captions[0] == "Face 0."
    foreign = FaceDataset(config.data.zero_shot_root, None)
    assert foreign.ids == ["00007", "01234", "69999"] and len(foreign[0].captions) == 2
    assert np.array_equal(foreign[0].label_map, label_map())
    shutil.rmtree(downloads)  # not needed any more
    capsys.readouterr()
    assert run(config, downloads, "--dry-run") == 0 and run(config, downloads) == 0
    assert "7 of 7 there" in capsys.readouterr().out


def test_a_report_of_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    arguments = ["prepare", "--dry-run", "--downloads", str(tmp_path)]
    for key in ("data.root", "data.zero_shot_root", "perception.parser"):
        arguments += ["--set", f"{key}={tmp_path / 'none'}"]
    assert main(arguments) == 2
    printed = capsys.readouterr().out
    for words in (
        "CelebA-HQ-img", "CelebAMask-HQ-mask-anno", "MM-CelebA-HQ captions", "FFHQ-Text",
        "FLUX.1-dev", "FaRL parser", "CLIP ViT-L-14", "AlexNet", "NIQE", "0 of 12 there",
        "0 of 30,000 faces", "switchablenorms/CelebAMask-HQ", "CC BY-NC-SA 4.0", "33.7 GB",
        "gated: accept the licence", "`hf auth login` (no token is stored here)",
        "hf download timm/vit_large_patch14_clip_224.openai open_clip_config.json",
    ):  # fmt: skip
        assert words in printed, words
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    main(arguments)
    assert "hf auth login" not in capsys.readouterr().out


def test_incomplete_data_are_named_and_not_converted(config, downloads, capsys):
    raw = downloads / "CelebAMask-HQ"
    (raw / "CelebA-HQ-img" / "3.jpg").unlink()
    for path in (raw / "CelebAMask-HQ-mask-anno").rglob("00001_*"):
        path.unlink()
    (downloads / "FFHQ-Text" / "Text" / "01234.txt").unlink()
    assert run(config, downloads) == 2
    assert not Path(config.data.root).exists() and not Path(config.data.zero_shot_root).exists()
    assert problems(config, downloads, inventory.IMAGES) == "4 of 5 faces; missing: 3"
    assert problems(config, downloads, inventory.PARTS) == "4 of 5 faces; missing: 1"
    assert problems(config, downloads, inventory.PHOTOS) == "2 of 3 captions; missing: 01234"
    assert states(config, downloads).keys() == {
        "CelebA-HQ-img", "CelebAMask-HQ-mask-anno", "FFHQ-Text",
    }  # fmt: skip


def test_a_root_with_missing_parts(config, downloads):
    assert run(config, downloads) == 0
    root = Path(config.data.root)
    (root / "mask" / "1.png").unlink()
    assert "mask/1.png: missing mask" in problems(config, downloads, inventory.MM_CELEBA)
    assert run(config, downloads) == 2
    fewer = config.replace(**{"data.test": 1})
    (root / "mask" / "1.png").write_bytes((root / "mask" / "0.png").read_bytes())
    assert "data.test asks for 1" in problems(fewer, downloads, inventory.MM_CELEBA)


def test_a_full_disk_leaves_nothing_half_written_and_a_conversion_resumes(
    config, downloads, tmp_path, monkeypatch, capsys
):
    save = Image.Image.save

    def full(self, path, *args, **kwargs):
        if Path(path).name == ".mask-2.png":
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:  # worker processes are forks and see it, too
        patch.setattr(Image.Image, "save", full)
        assert run(config, downloads) == 2
    printed = capsys.readouterr().err
    assert "No space left on device" in printed and "Make room and run the same" in printed
    part = tmp_path / "roots" / ".faces.partial"
    assert not Path(config.data.root).exists() and not list(part.glob(".*"))
    assert sorted(p.name for p in (part / "mask").iterdir()) == ["0.png", "1.png"]
    first, second = part / "image" / "0.png", part / "image" / "1.png"
    first.write_bytes(first.read_bytes()[:100])  # the only one to be made again
    before = second.stat().st_mtime_ns
    assert run(config, downloads) == 0
    assert (Path(config.data.root) / "image" / "1.png").stat().st_mtime_ns == before


def test_a_conversion_takes_up_other_captions_and_sizes(downloads, tmp_path):
    raw, out = downloads / "CelebAMask-HQ", tmp_path / "out"
    texts = downloads / "multi-modal-celeba/text/celeba-caption"
    (raw / "CelebA-HQ-img" / "9.jpg").write_bytes(b"nothing")
    for size in (2 * SIZE, SIZE):  # first the images' own bytes are kept, then they are not
        with pytest.raises(DataError, match="no mask part"):
            from_celebamask_hq(raw, out, texts, size, TRAIN, progress=False)
    (raw / "CelebA-HQ-img" / "9.jpg").unlink()
    (texts / "0.txt").write_text("A new one.\n")
    from_celebamask_hq(raw, out, texts, SIZE, TRAIN, progress=False)
    faces = FaceDataset(out, None)
    assert faces.captions("0") == ("A new one.",) and faces[0].image.shape == (3, SIZE, SIZE)


# -------------------------------------------------------------------------------------- weights


def test_half_downloaded_and_refused_backbones(config, downloads):
    folder = Path(config.backbone.path)
    shard = folder / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    whole = shard.read_bytes()

    def said() -> str:
        return problems(config, downloads, inventory.FLUX)

    assert said() == ""
    shard.write_bytes(whole[:-5])
    assert (
        f"{shard}: half-downloaded, expected {len(whole)} bytes, found {len(whole) - 5}" in said()
    )
    shard.write_bytes(whole[:30])
    assert "half-downloaded, expected more than" in said() and "found 30" in said()
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    assert "Git LFS pointer" in said()
    shard.write_bytes(b"\x80\x02}q\x00X\x05\x00\x00\x00")
    assert "no safetensors file" in said()
    save_file({"other": np.ones(8, np.float32)}, shard)
    assert "lacks 1 tensors, such as layer.1" in said()
    shard.unlink()
    assert f"{shard}: missing" in said()
    shard.write_bytes(whole)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "weights.bin")
    assert "vae: no safetensors" in said() and "weights.bin: pickled weights are refused" in said()
    (folder / "model_index.json").write_text('{"_class_name": "FluxFillPipeline"}')
    assert "is a FluxFillPipeline" in said()
    assert states(config, downloads) == {inventory.FLUX.name: "incomplete"}


def test_the_hub_s_cache_is_read_and_its_hashes_are_compared(config, downloads, tmp_path):
    config = config.replace(**{"backbone.path": "black-forest-labs/FLUX.1-dev"})
    cache = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-dev"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "0a1b.incomplete").write_bytes(b"123")
    assert states(config, downloads) == {inventory.FLUX.name: "incomplete"}
    said = problems(config, downloads, inventory.FLUX)
    assert "half-downloaded, 3 bytes so far" in said and "hf download" in said
    shutil.move(tmp_path / "FLUX.1-dev", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert not states(config, downloads)
    file = cache / "snapshots" / "abc" / "vae" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    blob = cache / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    file.unlink()
    file.symlink_to(blob)
    assert not states(config, downloads, content=True)
    blob.write_bytes(content[:-4] + b"hole")  # the right size, as where a download left holes
    assert not states(config, downloads)
    assert states(config, downloads, content=True) == {inventory.FLUX.name: "incomplete"}


def test_recorded_hashes(tmp_path):
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    for good in (True, False):
        name = digest[:8] if good else "7be5be79"
        trunk = tmp_path / f"alexnet-owt-{name}.pth"
        trunk.write_bytes(content)
        file = tmp_path / "copy" / "vae" / "model.safetensors"
        about = tmp_path / "copy/.cache/huggingface/download/vae/model.safetensors.metadata"
        for path in (file, about):
            path.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        about.write_text(f"commit\n{digest if good else '0' * 64}\n1.5\n")
        for path in (trunk, file):
            if good:
                weights.check_hash(path)
            else:
                with pytest.raises(WeightsError, match="damaged, its SHA-256"):
                    weights.check_hash(path)


def test_parsers_are_torchscript_in_the_right_class_order(config, downloads, tmp_path):
    parser = Path(config.perception.parser)

    def said() -> str:
        return problems(config, downloads, inventory.FARL)

    by_name = list(FACER_TO_CELEBAMASK)  # facer's own names exchange left and right
    for a, b in FLIP_PAIRS:
        i, j = by_name.index(a), by_name.index(b)
        by_name[i], by_name[j] = b, a
    save_colour_parser(parser, by_name)
    assert "wrong class order: it takes l_eye for r_eye, r_eye for l_eye, l_brow for" in said()
    save_colour_parser(parser, range(len(CLASSES)))
    assert "wrong class order" in said() and "skin for" in said()
    whole = parser.read_bytes()
    parser.write_bytes(whole[: len(whole) // 2])
    assert "half-downloaded" in said()
    torch.save({"net": torch.zeros(1)}, parser)
    assert "is no TorchScript file" in said() and "refused" in said()
    with pytest.raises(WeightsError, match="is no TorchScript file"):
        FaceParser(parser, SIZE)
    shutil.rmtree(downloads / "CelebAMask-HQ")  # nothing to hold it against
    save_colour_parser(parser, by_name)
    assert said() == ""


def test_a_detector_of_tensors_only(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("code",))

    path = tmp_path / "mobilenet0.25_Final.pth"
    torch.save({"weight": torch.zeros(1), "more": Harmful()}, path)
    with pytest.raises(WeightsError, match="no mapping of tensors"):
        photos.face_detector(path)
    from facer.face_detection.retinaface import RetinaFace, cfg_mnet

    torch.save(RetinaFace(cfg_mnet, "test").state_dict(), path)
    faces = photos.face_detector(path)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert {"rects", "points", "scores", "image_ids"} <= faces.keys()


# --------------------------------------------------------------------------------------- photos


@pytest.fixture
def parser(tmp_path) -> FaceParser:
    return FaceParser(save_colour_parser(tmp_path / "colours.pt"), SIZE)


def test_a_photo_is_cut_out_along_its_face(tmp_path, parser):
    """A face turned by 25 degrees in a larger photo comes back upright; the frame is known."""
    angle, scale, offset = np.deg2rad(25), 1.5, np.array([60.0, 20.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    face, back = picture(label_map()), np.linalg.inv(turn)
    inverse = np.column_stack([back, -back @ offset]).ravel().tolist()
    wild = face.transform((180, 150), Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)
    points = canonical_points(64) + 0.5  # to the coordinates in which a pixel's corner is whole
    moved = points @ turn.T + offset - 0.5
    cut = photos.align(wild, moved)
    assert abs(cut.width - 64 * scale) <= 1 and cut.width == cut.height
    batch = torch.from_numpy(np.array(cut.resize((SIZE, SIZE), Image.Resampling.NEAREST)))
    ids = parser.parse(batch.permute(2, 0, 1)[None] / 127.5 - 1)[0].numpy()
    assert (ids == label_map()).mean() > 0.9
    assert photos.align(face, canonical_points(64)) is face  # fills its frame: nothing is cut
    with pytest.raises(DataError, match="mirrored"):
        photos.align(face, canonical_points(64)[[1, 0, 2, 4, 3]])
    with pytest.raises(DataError, match="cut off"):
        photos.align(wild, moved - [60, 0])


def test_photos_report_all_that_is_wrong_then_resume(tmp_path, parser):
    source = tmp_path / "source"
    source.mkdir()
    pictures = {
        "good": picture(label_map()),
        "mirrored": picture(label_map()[:, ::-1]),
        "nobody": Image.new("RGB", (64, 64)),
        "wide": picture(label_map()).resize((65, 64)),
    }
    for name, image in pictures.items():
        image.save(source / f"{name}.png")
        (source / f"{name}.txt").write_text("A woman.\n")
    (source / "broken.png").write_bytes(b"nothing")
    (source / "broken.txt").write_text("A woman.\n")
    shots = {p.stem: p for p in source.glob("*.png")}
    texts = {p.stem: p for p in source.glob("*.txt")}

    def detect(images):
        found = detector()(images)
        empty = images.shape[-1] == 65 or not images.any()
        return {k: v[:0] for k, v in found.items()} if empty else found

    out = tmp_path / "out"
    with pytest.raises(DataError) as caught:
        photos.from_photos(shots, texts, out, parser, detect, SIZE, progress=False)
    said = {Path(where).stem: reason for where, reason in caught.value.report.problems}
    assert said.keys() == {"mirrored", "nobody", "wide", "broken"} and not out.exists()
    assert "left and right are exchanged" in said["mirrored"]
    assert "no face" in said["nobody"] and "no face" in said["wide"]
    assert "unreadable" in said["broken"]
    mask = tmp_path / ".out.parsed" / "masks" / "good.png"
    before = mask.stat().st_mtime_ns

    def not_again(images):
        raise AssertionError("parsed already")

    good = {"good": shots["good"]}
    photos.from_photos(good, texts, out, parser, not_again, SIZE, progress=False)
    assert before and not mask.exists() and not validate(out).problems
    assert sorted(p.name for p in out.iterdir()) == ["image", "manifest.csv", "mask", "text"]
    assert not (tmp_path / ".out.parsed").exists()
