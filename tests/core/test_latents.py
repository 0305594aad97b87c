"""The cache: a latent and a caption of *its* id, made once, resumed, shared, checked."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from ec2face_core import backbone as backbone_module
from ec2face_core import latents
from ec2face_core.attributes import palette_image
from ec2face_core.backbone import encode_images, encode_text, load_backbone
from ec2face_core.data import FaceDataset
from ec2face_core.latents import CacheError, LatentCache, cache_key, encode_dataset


@pytest.fixture(scope="module")
def dataset(tiny_faces):
    return FaceDataset(tiny_faces, "train", size=64)


@pytest.fixture(scope="module")
def encoders(tiny_config):
    return load_backbone(tiny_config.backbone, ("vae", "text"))


@pytest.fixture(scope="module")
def cache(dataset, encoders, tiny_config, tmp_path_factory):
    return encode_dataset(dataset, encoders, tiny_config, tmp_path_factory.mktemp("cache"))


def contents(folder):
    """Tensors by file; the bytes of a safetensors file vary with the order of its metadata."""
    return {path: load(path.read_bytes()) for path in sorted(folder.iterdir())}


def test_a_batch_holds_the_latents_and_the_caption_of_its_ids(
    cache, dataset, encoders, tiny_config
):
    ids = [cache.ids[k] for k in (7, 2, 2, 11, 0)]
    batch = cache.batch(ids, [3, 0, 9, 5, 1])
    samples = {sample.id: sample for sample in (dataset[i] for i in range(len(dataset)))}
    assert batch["captions"] == [
        samples[i].captions[k] for i, k in zip(ids, (3, 0, 9, 5, 1), strict=True)
    ]
    with torch.no_grad():
        z = encode_images(encoders.vae, torch.stack([samples[i].image for i in ids]))
        maps = torch.stack([samples[i].label_map for i in ids])
        z_mask = encode_images(encoders.vae, palette_image(maps))
        text = encode_text(encoders, batch["captions"], tiny_config.backbone.text_length)
    torch.testing.assert_close(batch["z"], z, rtol=2e-3, atol=2e-3)  # float16
    torch.testing.assert_close(batch["z_mask"], z_mask, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch["text"].tokens, text.tokens, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch["text"].pooled, text.pooled, rtol=2e-3, atol=2e-3)
    assert torch.equal(batch["label_map"], maps) and batch["label_map"].dtype == torch.int64
    assert batch["z"].dtype == torch.float32


def test_counts_are_those_of_the_dataset(cache, dataset):
    assert torch.equal(cache.label_counts(), dataset.label_counts())


def test_the_empty_caption_is_there(cache, encoders, tiny_config):
    text = encode_text(encoders, [""], tiny_config.backbone.text_length)
    torch.testing.assert_close(cache.text([""]).tokens, text.tokens, rtol=2e-3, atol=2e-3)


def test_a_complete_cache_needs_no_encoder_and_a_damaged_one_only_for_what_is_missing(
    dataset, encoders, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(latents, "FACES", 5)  # three files
    monkeypatch.setattr(latents, "CAPTIONS", 30)
    made = encode_dataset(dataset, encoders, tiny_config, tmp_path, progress=False)
    before = contents(made.folder)

    def no_encoder():
        raise AssertionError("the encoders were loaded for nothing")

    encode_dataset(dataset, no_encoder, tiny_config, tmp_path, progress=False)

    first, second, third, text, *_ = before
    second.unlink()
    for path in (third, text):
        path.write_bytes(path.read_bytes()[:-100])
    touched = first.stat().st_mtime_ns
    with pytest.warns(UserWarning, match=f"({third.name}|{text.name}) is damaged"):
        again = encode_dataset(dataset, lambda: encoders, tiny_config, tmp_path, progress=False)
    assert first.stat().st_mtime_ns == touched
    after = contents(again.folder)
    assert after.keys() == before.keys()
    for path, tensors in before.items():
        torch.testing.assert_close(after[path], tensors, rtol=0, atol=0)


def test_only_the_captions_that_are_asked_for(dataset, encoders, tiny_config, tmp_path):
    def first_of_each(cache):
        return [cache.captions(i)[0] for i in cache.ids]

    cache = encode_dataset(dataset, encoders, tiny_config, tmp_path, captions=first_of_each)
    cache.batch(cache.ids, [0] * len(cache.ids))
    other = cache.captions(cache.ids[0])[1]
    assert not cache.has_text(other)
    with pytest.raises(CacheError, match="run encode_dataset again"):
        cache.text([other])
    cache = encode_dataset(dataset, encoders, tiny_config, tmp_path)  # all: the rest is added
    assert cache.has_text(other)


def test_the_key_names_encoders_and_data(dataset, tiny_config, tiny_faces):
    key = cache_key(dataset, tiny_config)
    assert key == cache_key(dataset, tiny_config.replace(**{"trainer.learning_rate": 1.0}))
    others = [
        cache_key(dataset, tiny_config.replace(**{"backbone.text_length": 16})),
        cache_key(dataset, tiny_config.replace(**{"data.size": 32})),
        cache_key(FaceDataset(tiny_faces, "test", size=64), tiny_config),
    ]
    assert len({key, *others}) == 4


def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    dataset, encoders, tiny_config, tmp_path, monkeypatch
):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CacheError, match="No space left"):
        encode_dataset(dataset, encoders, tiny_config, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_ranks_share_the_work(dataset, encoders, tiny_config, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "FACES", 4)
    monkeypatch.setattr(latents, "CAPTIONS", 40)
    barrier, written = threading.Barrier(2), {}
    original = latents._write

    def note(path, *content):
        written.setdefault(threading.get_ident(), set()).add(path.name)
        original(path, *content)

    monkeypatch.setattr(latents, "_write", note)
    caches: dict[int, LatentCache] = {}

    def rank(index):
        process = SimpleNamespace(
            process_index=index, num_processes=2, wait_for_everyone=lambda: barrier.wait(60)
        )
        caches[index] = encode_dataset(
            dataset, encoders, tiny_config, tmp_path, progress=False, accelerator=process
        )

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = written.values()
    assert one and two and not one & two
    assert one | two == {p.name for p in caches[0].folder.iterdir()}
    everything = cache.ids, [k % 10 for k in range(len(cache.ids))]
    for each in caches.values():
        torch.testing.assert_close(each.batch(*everything)["z"], cache.batch(*everything)["z"])


def test_embeddings_in_memory_are_those_on_disk(dataset, encoders, tiny_config, tmp_path):
    """Bit for bit, whichever captions are embedded together."""
    on_disk = encode_dataset(dataset, encoders, tiny_config, tmp_path)
    wanted = sorted({c for i in on_disk.ids for c in on_disk.captions(i)})[1::3]
    kept = encode_dataset(
        dataset, encoders, tiny_config, tmp_path / "other", captions=lambda _: wanted, memory=True
    )
    assert not list(kept.folder.glob("text-*"))
    for caption in ["", *wanted]:
        left, right = kept.text([caption]), on_disk.text([caption])
        assert torch.equal(left.tokens, right.tokens) and torch.equal(left.pooled, right.pooled)
    with pytest.raises(CacheError, match="no embedding of"):
        kept.text(["another one"])


def test_what_cannot_end_is_not_begun(dataset, encoders, tiny_config, tmp_path, monkeypatch):
    import psutil

    usage = SimpleNamespace(free=1000, total=1, used=1)
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CacheError, match=r"faces need .* GB, and 0\.0 GB are free on the disk of"):
        encode_dataset(dataset, encoders, tiny_config, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(CacheError, match=r"captions need .* free memory: set data\.texts to disk"):
        encode_dataset(dataset, encoders, tiny_config, tmp_path, memory=True)


def test_the_key_is_that_of_the_content(dataset, tiny_config, tmp_path, monkeypatch):
    """A folder, a copy of it and the hub's snapshot of any commit have one key."""
    import os
    import shutil

    import huggingface_hub

    key = cache_key(dataset, tiny_config)
    source = tiny_config.backbone.path
    snapshots = []
    for commit in ("abc", "def"):  # as the hub's local copies are: links to blobs
        place = tmp_path / "snapshots" / commit
        shutil.copytree(source, place, copy_function=os.symlink)
        snapshots.append(place)
    shutil.copytree(source, tmp_path / "copy")
    copied = tiny_config.replace(**{"backbone.path": str(tmp_path / "copy")})
    assert cache_key(dataset, copied) == key
    monkeypatch.setattr(backbone_module, "load_backbone", lambda *_: None)
    monkeypatch.setattr(backbone_module, "answering_hub", lambda *_: nullcontext())
    asked = []
    for place in snapshots:
        monkeypatch.setattr(
            huggingface_hub,
            "hf_hub_download",
            lambda repo, file, revision, place=place: asked.append(revision) or str(place / file),
        )
        hub = {"backbone.path": "owner/flux", "backbone.revision": place.name}
        assert cache_key(dataset, tiny_config.replace(**hub)) == key
    assert asked == ["abc", "def"]
