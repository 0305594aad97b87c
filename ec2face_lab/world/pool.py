"""The pool that the miniature's transformer is trained on: encoded faces, conditions, captions.

Faces are encoded once, with two dense conditions each, and their captions are tokenised once, so
that a training step only gathers rows.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ec2face_core.backbone import encode_images
from ec2face_core.runs import content_key, path_digest, whole_file, write_json

from ..cache import read_note
from .pretrain import SEED, autocast, untrained, with_trained_vae
from .ranks import rank_of
from .sources import DataSource, caption_of, dense_condition

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

POOL = 10**6  # number of the first face of the pool

POOL_BATCH = 512  # faces of the pool that are sampled and encoded together

PART = 8  # such batches in a file

CAPTIONS = 4  # of each face of the pool


def _ids_of(tokenizers: tuple[Any, Any], texts: list[str]) -> Tensor:
    """Token ids of the two text encoders (CLIP, T5), `b 2 n`; both have the same length."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = [t(texts, max_length=t.model_max_length, **options).input_ids for t in tokenizers]
    return torch.stack(ids, 1).to(torch.int16)


def _caption_ids(
    source: DataSource, tokenizers: tuple[Any, Any], batch: int, number: int
) -> Tensor:
    """Token ids of the captions of one batch of the pool, `b CAPTIONS 2 n`."""
    first = POOL + number * batch
    described = source.descriptions(SEED, first, batch)
    texts = [
        caption_of(description, (first + i) * CAPTIONS + k)
        for i, description in enumerate(described)
        for k in range(CAPTIONS)
    ]
    return _ids_of(tokenizers, texts).unflatten(0, (batch, CAPTIONS))


def encode_captions(source: DataSource, work: Path, faces: int, processes: int = 1) -> None:
    """Write the token ids of the captions of the pool, `work/captions.pt`, if it is not there yet.

    Args:
        source: the faces.
        work: folder of the pool.
        faces: size of the pool.
        processes: that compose and tokenise captions.
    """
    from tqdm.auto import tqdm

    path = work / "captions.pt"
    key = content_key([source.key(), faces])
    if _is_kept(path, key):
        return
    backbone = untrained(source)
    tokenizers = (backbone.tokenizer, backbone.tokenizer_2)
    batch = min(POOL_BATCH, faces)
    numbers = range(faces // batch)
    ids_of = functools.partial(_caption_ids, source, tokenizers, batch)
    parts: Iterable[Tensor] = map(ids_of, numbers)
    bar = {"desc": "captions", "total": len(numbers), "mininterval": 1}
    if processes > 1:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            ids = [part.clone() for part in tqdm(pool.map(ids_of, numbers, chunksize=4), **bar)]
    else:
        ids = list(tqdm(parts, **bar))
    null = _ids_of(tokenizers, [""])[0]
    _keep(path, key, {"ids": torch.cat(ids), "null": null})


@torch.no_grad()
def encode_pool(source: DataSource, work: Path, faces: int) -> None:
    """Encode faces and two dense conditions of each; writes `work/pool_000.pt` and so on.

    Parts that are there already, of the same faces and autoencoder, stay. Ranks share the others.

    Args:
        source: the faces.
        work: folder of the trained autoencoder and of the pool.
        faces: size of the pool.
    """
    from tqdm.auto import tqdm

    device = source.device
    vae = with_trained_vae(source, work).vae.to(device)
    batch = min(POOL_BATCH, faces)
    numbers = range(faces // batch)
    parts = [numbers[i : i + PART] for i in range(0, len(numbers), PART)]
    key = content_key([source.key(), faces, batch, path_digest(work / "vae.pt")])
    rank, ranks = rank_of()
    for number, path in _parts(work):
        if number >= len(parts) and rank == 0:
            path.unlink()
            _note(path).unlink(missing_ok=True)
    mine = range(rank, len(parts), ranks)
    lacking = [i for i in mine if not _is_kept(work / f"pool_{i:03}.pt", key)]
    total = sum(len(parts[i]) for i in lacking)
    with tqdm(desc="pool", total=total, mininterval=1, disable=rank > 0) as bar:
        for i in lacking:
            encoded = []
            for k in parts[i]:
                encoded.append(_encoded(source, vae, k, batch))
                bar.update()
            images, conditions = (torch.cat(part) for part in zip(*encoded, strict=True))
            _keep(work / f"pool_{i:03}.pt", key, {"image": images, "condition": conditions})


def _encoded(
    source: DataSource, vae: AutoencoderKL, number: int, batch: int
) -> tuple[Tensor, Tensor]:
    """Latents of one batch of the pool, `b c h w`, and of two conditions of each, `b 2 c h w`."""
    device = source.device
    shares = torch.tensor(list(source.condition_shares.values()), device=device)
    generator = torch.Generator(device).manual_seed(number)
    shown, _ = source.scenes(SEED, POOL + number * batch, batch)
    pair = []
    for _ in range(2):
        kinds = torch.multinomial(shares, batch, True, generator=generator)
        pictures = torch.empty_like(shown.image)
        for k, kind in enumerate(source.condition_shares):
            chosen = (kinds == k).view(-1, 1, 1, 1)
            pictures = torch.where(chosen, dense_condition(kind, shown, generator), pictures)
        pair.append(pictures)
    with autocast(device):
        z = encode_images(vae, torch.cat([shown.image, *pair])).half()
    return z[:batch].cpu(), z[batch:].unflatten(0, (2, batch)).transpose(0, 1).cpu()


def _parts(work: Path) -> list[tuple[int, Path]]:
    """The parts of a pool that are there, in their order."""
    return [(int(path.stem.removeprefix("pool_")), path) for path in sorted(work.glob("pool_*.pt"))]


def _is_kept(path: Path, key: str) -> bool:
    """Whether a file is complete, and what the key stands for."""
    note = _note(path)
    return path.is_file() and note.is_file() and read_note(note).get("key") == key


def _keep(path: Path, key: str, content: dict[str, Tensor]) -> None:
    """Write a file and what its key is; while there is no key, it does not count as complete."""
    _note(path).unlink(missing_ok=True)
    with whole_file(path) as file:
        torch.save(content, file)
    write_json(_note(path), {"key": key})


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


class Pool:
    """Everything that training steps sample from, on one device.

    Attributes:
        z_image: latents `n c h w`, half precision.
        z_condition: latents of two conditions of each, `n 2 c h w`.
        ids: token ids of the captions `n CAPTIONS 2 length`, int16.
        null: token ids of the empty caption `2 length`.
        held: the last faces, which no step sees.
    """

    def __init__(self, work: Path, device: torch.device) -> None:
        parts = [torch.load(path) for _, path in _parts(work)]
        texts = torch.load(work / "captions.pt")
        self.device = device
        self.z_image = torch.cat([part["image"] for part in parts]).to(device)
        self.z_condition = torch.cat([part["condition"] for part in parts]).to(device)
        self.ids = texts["ids"].to(device)
        self.null = texts["null"].to(device)
        self.held = min(256, len(self.z_image) // 4)

    def sample(
        self, batch: int, null: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents `b c h w`, conditions `b c h w` and token ids `b 2 n` of random faces.

        null: share of the captions that are replaced by the empty one.
        """
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        rows = torch.randint(len(self.z_image) - self.held, (batch,), **options)
        z_c = self.z_condition[rows, torch.randint(2, (batch,), **options)]
        ids = self.ids[rows, torch.randint(CAPTIONS, (batch,), **options)].long()
        dropped = torch.rand(batch, **options) < null
        ids = torch.where(dropped[:, None, None], self.null.long(), ids)
        return self.z_image[rows].float(), z_c.float(), ids

    def held_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the faces that no step sees: their first condition and caption."""
        z_c = self.z_condition[-self.held :, 0]
        return self.z_image[-self.held :].float(), z_c.float(), self.ids[-self.held :, 0].long()
