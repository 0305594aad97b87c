"""The stages of a foundation: their data, their guidance, and where their results lie."""

from typing import ClassVar

import pytest
import torch

from ec2face_core.io.paths import ROOT, resolve
from ec2face_lab.world import pool as pools
from ec2face_lab.world.networks import tiny_backbone
from ec2face_lab.world.pool import CAPTIONS, Pool, encode_captions
from ec2face_lab.world.pretrain import FaceBlocks, work_folder
from ec2face_lab.world.pretrain_flux import TextToVelocity
from ec2face_lab.world.sources import ProceduralFaces, caption_of


@pytest.fixture(scope="module")
def source() -> ProceduralFaces:
    return ProceduralFaces()


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone(
        ["A young woman with long brown hair.", "He is smiling and wears a hat."], 3
    )


def test_long_trainings_lie_in_runs_and_those_on_photographs_beside_their_bundle(tmp_path):
    assert work_folder(resolve("data/mini128")) == ROOT / "runs" / "foundation" / "mini128"
    assert work_folder(tmp_path / "mine") == tmp_path / "mine" / "training"


def test_blocks_show_the_faces_of_single_steps_in_turn(source):
    class OnGpu(ProceduralFaces):
        """Renders on the CPU, in the blocks of a GPU."""

        def __init__(self) -> None:
            super().__init__("cpu")
            self.device = torch.device("meta")

        def scenes(self, seed: int, start: int, count: int) -> tuple:
            return source.scenes(seed, start, count)

    blocks = FaceBlocks(OnGpu(), 128)
    assert blocks.steps == 4
    generator = torch.Generator().manual_seed(0)
    seen = [blocks(number, "depth", generator)[0] for number in range(4)]
    block, _ = source.scenes(5_001, 0, 512)
    assert torch.equal(torch.cat(seen), block.image)


def test_captions_of_the_pool_are_those_of_its_faces(source, tmp_path, monkeypatch, backbone):
    monkeypatch.setattr(pools, "untrained", lambda _: backbone)
    encode_captions(source, tmp_path, 32)
    ids = torch.load(tmp_path / "captions.pt")["ids"]
    assert ids.shape == (32, CAPTIONS, 2, 32)
    described = source.descriptions(pools.SEED, pools.POOL, 32)
    _, rendered = source.scenes(pools.SEED, pools.POOL, 32)
    assert described == rendered
    for i, k in ((0, 0), (31, 3)):
        caption = caption_of(described[i], (pools.POOL + i) * CAPTIONS + k)
        words = backbone.tokenizer.decode(ids[i, k, 0].long(), skip_special_tokens=True)
        expected = backbone.tokenizer(caption, truncation=True).input_ids
        assert words == backbone.tokenizer.decode(expected, skip_special_tokens=True)


def test_only_the_parts_of_a_pool_that_lack_are_encoded(source, tmp_path, monkeypatch, backbone):
    class Counted(ProceduralFaces):
        seen: ClassVar = []

        def scenes(self, seed: int, start: int, count: int) -> tuple:
            self.seen.append((start - pools.POOL) // count)
            return super().scenes(seed, start, count)

    def encoded(faces: int) -> list[int]:
        Counted.seen.clear()
        pools.encode_pool(Counted(), tmp_path, faces)
        return list(Counted.seen)

    monkeypatch.setattr(pools, "with_trained_vae", lambda *_: backbone)
    monkeypatch.setattr(pools, "POOL_BATCH", 4)
    monkeypatch.setattr(pools, "PART", 2)
    (tmp_path / "vae.pt").write_bytes(b"first")
    texts = {"ids": torch.zeros(20, CAPTIONS, 2, 6), "null": torch.zeros(2, 6)}
    torch.save(texts, tmp_path / "captions.pt")
    assert encoded(20) == [0, 1, 2, 3, 4]
    whole = Pool(tmp_path, torch.device("cpu"))
    assert whole.z_image.shape == (20, 8, 16, 16) and whole.z_condition.shape[1] == 2
    assert encoded(20) == []
    (tmp_path / "pool_001.pt").unlink()
    monkeypatch.setattr(pools, "rank_of", lambda: (1, 2))
    assert encoded(20) == [2, 3], "the second rank has every second part"
    assert torch.equal(Pool(tmp_path, torch.device("cpu")).z_condition, whole.z_condition)
    monkeypatch.setattr(pools, "rank_of", lambda: (0, 1))
    (tmp_path / "vae.pt").write_bytes(b"another autoencoder")
    assert encoded(8) == [0, 1] and not (tmp_path / "pool_002.pt").exists()
    assert len(Pool(tmp_path, torch.device("cpu")).z_image) == 8


def test_captions_are_encoded_once(source, tmp_path, monkeypatch, backbone):
    monkeypatch.setattr(pools, "untrained", lambda _: backbone)
    encode_captions(source, tmp_path, 16)
    before = (tmp_path / "captions.pt").stat().st_mtime_ns
    monkeypatch.setattr(pools, "untrained", lambda _: pytest.fail("encoded again"))
    encode_captions(source, tmp_path, 16)
    assert (tmp_path / "captions.pt").stat().st_mtime_ns == before
    monkeypatch.setattr(pools, "untrained", lambda _: backbone)
    encode_captions(source, tmp_path, 8)
    assert len(torch.load(tmp_path / "captions.pt")["ids"]) == 8


def test_no_step_sees_the_held_out_faces(tmp_path):
    n = 64
    z = torch.arange(n).view(n, 1, 1, 1).expand(n, 2, 4, 4).half()
    ids = torch.arange(n, dtype=torch.int16).view(n, 1, 1, 1).expand(n, CAPTIONS, 2, 6)
    torch.save({"image": z, "condition": torch.stack([z, z + 100], 1)}, tmp_path / "pool_000.pt")
    null = torch.full((2, 6), 999, dtype=torch.int16)
    torch.save({"ids": ids, "null": null}, tmp_path / "captions.pt")
    pool = Pool(tmp_path, torch.device("cpu"))
    z_0, z_c, tokens = pool.sample(4000, 0.25, torch.Generator().manual_seed(1))
    faces = z_0[:, 0, 0, 0]
    assert faces.max() == n - pool.held - 1
    assert set((z_c[:, 0, 0, 0] - faces).tolist()) == {0.0, 100.0}
    dropped = tokens[:, 0, 0] == 999
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(tokens[~dropped][:, 0, 0].float(), faces[~dropped])
    assert pool.held_out()[0][:, 0, 0, 0].tolist() == list(range(n - pool.held, n))


def test_samples_without_condition_tokens_are_those_of_the_base_alone(backbone):
    model = TextToVelocity(backbone).eval()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 8, 16, 16, generator=generator)
    z_c = torch.randn(4, 8, 16, 16, generator=generator)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9])
    ids = torch.randint(3, 40, (4, 2, 32), generator=generator)
    g = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with torch.no_grad():
        mixed = model(z, t, ids, z_c, alone=2, guidance=g)
        for i in range(4):
            row = slice(i, i + 1)
            one = model(z[row], t[row], ids[row], z_c[row], int(i < 2), float(g[i]))
            assert torch.allclose(mixed[row], one, atol=1e-5)
        other = model(z, t, ids, z_c, alone=2, guidance=2 * g)
    assert (mixed - other).abs().amax((1, 2, 3)).min() > 0  # the guidance of each sample is read
