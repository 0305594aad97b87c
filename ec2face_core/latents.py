"""Encode once: image latents, mask latents and text embeddings on disk.

    folder/<key>/images-00000.safetensors   64 faces: z, z_mask, packed label maps, counts; ids and
                                            captions in the metadata
    folder/<key>/text-<hash>.safetensors    256 captions

The key covers the content of the encoders' and the data's files, size and text length, so other
encoders or data make another cache. A file appears whole or not at all and carries the hash of its
content, which is compared when a run opens the cache; a damaged file is made again. A killed run
continues with the missing files, and several ranks share the work.
Latents are found by the face's id and embeddings by the caption's text. They are float16: half the
disk space, and finer than the bfloat16 of FLUX's own weights. Label maps are packed by zlib, which
makes those of 512 px some sixty times smaller.

At paper scale embeddings of all drawn captions are 60 GB and more on disk, and embedding them takes
minutes. So with `data.texts=memory` each rank embeds the captions of its own samples when it starts
and keeps them in host memory. Captions are embedded in batches of one fixed shape, so an embedding
does not depend on the others of its batch, and a resumed training has the same ones.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import math
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .attributes import pixel_counts
from .backbone import (
    Backbone,
    TextEmbedding,
    backbone_folder,
    check_side,
    encode_images,
    encode_text,
    warn_of_lost_words,
)
from .config import BackboneConfig, Config, UserError
from .io.paths import resolve
from .mask_branch import mask_latents_of
from .runs import (
    content_key,
    parallel,
    path_digest,
    remove_leftovers,
    tensors_sha256,
    write_tensors,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .data import FaceDataset


FACES = 64  # per file
CAPTIONS = 256  # per file
BATCH = 8  # faces or captions encoded at once
FORMAT = 2  # of the files
EMPTY = ""  # the null text of Eq. 13


class LatentCache:
    """A cache opened for reading; files are memory-mapped, only names are in memory.

    Args:
        folder: the folder that holds `images-*.safetensors` and `text-*.safetensors`.

    Raises:
        CacheError: no file is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: list[str] = []
        self._captions: dict[str, tuple[str, ...]] = {}
        self._face: dict[str, tuple[dict[str, Any], int]] = {}  # id -> file's slices, row
        self._text: dict[str, tuple[dict[str, Any], int]] = {}  # caption -> likewise
        self._reader = ThreadPoolExecutor(1, "read ahead")
        self._ahead: dict[tuple, Future[dict[str, Any]]] = {}
        for path in sorted(folder.glob("images-*.safetensors")):
            slices, about = _open(path)
            self.ids += about["ids"]
            self._captions |= {
                i: tuple(c) for i, c in zip(about["ids"], about["captions"], strict=True)
            }
            self._face |= {i: (slices, row) for row, i in enumerate(about["ids"])}
        for path in sorted(folder.glob("text-*.safetensors")):
            slices, about = _open(path)
            self._text |= {caption: (slices, row) for row, caption in enumerate(about["captions"])}
        if not self.ids:
            raise CacheError(f"no latents in {folder}: encode_dataset makes them")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(c, h, w)` of an image latent."""
        slices, _ = self._face[self.ids[0]]
        return tuple(slices["z"].get_shape()[1:])

    def captions(self, id: str) -> tuple[str, ...]:
        """Every caption of a face."""
        return self._captions[id]

    def add_text(self, captions: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """Keep embeddings in memory: `tokens` and `pooled`, a row for each caption."""
        self._text |= {caption: (tensors, row) for row, caption in enumerate(captions)}

    def has_text(self, caption: str) -> bool:
        """Whether the caption's embedding is here."""
        return caption in self._text

    def label_maps(self, ids: Sequence[str]) -> Tensor:
        """Label maps `b h w`, int64."""
        return torch.stack([self._label_map(i) for i in ids]).long()

    def _label_map(self, id: str) -> Tensor:
        slices, row = self._face[id]
        first, last = slices["label_map_ends"][row : row + 2].tolist()
        packed = slices["label_map"][first:last].numpy().tobytes()
        ids = np.frombuffer(zlib.decompress(packed), np.uint8)
        side = math.isqrt(len(ids))
        return torch.from_numpy(ids.reshape(side, side).copy())

    def label_counts(self) -> Tensor:
        """Pixels of each class over all faces of the cache, `(19,)` int64: T of Eq. 10."""
        return self._rows("counts", self._face, self.ids).sum(0)

    def ids_with(self, classes: Sequence[int]) -> list[str]:
        """The faces whose mask has a pixel of one of these classes."""
        counts = self._rows("counts", self._face, self.ids)[:, list(classes)].sum(1)
        return [id for id, count in zip(self.ids, counts.tolist(), strict=True) if count]

    def text(self, captions: Sequence[str]) -> TextEmbedding:
        """Embeddings of captions (also of the empty one), float32."""
        missing = [caption for caption in captions if caption not in self._text]
        if missing:
            more = f" and {len(missing) - 1} more captions" if len(missing) > 1 else ""
            raise CacheError(
                f"{self.folder} has no embedding of {missing[0]!r}{more}: run encode_dataset again "
                "with these captions"
            )
        tokens = self._rows("tokens", self._text, captions)
        return TextEmbedding(tokens.float(), self._rows("pooled", self._text, captions).float())

    def batch(self, ids: Sequence[str], caption_indices: Sequence[int]) -> dict[str, Any]:
        """The samples of these ids, each with the caption that the index names.

        Returns:
            id (list), captions (list of str), z and z_mask `b c h w` float32, label_map `b H W`
            int64, text (TextEmbedding).
        """
        if future := self._ahead.pop(_key(ids, caption_indices), None):
            return future.result()
        return self._read(ids, caption_indices)

    def read_ahead(self, ids: Sequence[str], caption_indices: Sequence[int]) -> None:
        """Read a batch on another thread; the `batch` of the same arguments then returns it."""
        key = _key(ids, caption_indices)
        if key not in self._ahead:
            while len(self._ahead) > 1:  # the present one and the next; older ones were not wanted
                self._ahead.pop(next(iter(self._ahead)))
            self._ahead[key] = self._reader.submit(self._read, ids, caption_indices)

    def _read(self, ids: Sequence[str], caption_indices: Sequence[int]) -> dict[str, Any]:
        captions = [self._captions[i][k] for i, k in zip(ids, caption_indices, strict=True)]
        return {
            "id": list(ids),
            "captions": captions,
            "z": self._rows("z", self._face, ids).float(),
            "z_mask": self._rows("z_mask", self._face, ids).float(),
            "label_map": self.label_maps(ids),
            "text": self.text(captions),
        }

    @staticmethod
    def _rows(name: str, where: dict[str, tuple[dict, int]], keys: Sequence[str]) -> Tensor:
        return torch.stack([where[key][0][name][where[key][1]] for key in keys])


def _key(ids: Sequence[str], caption_indices: Sequence[int]) -> tuple:
    return tuple(ids), tuple(int(k) for k in caption_indices)


class CacheError(UserError, RuntimeError):
    """A cache that cannot be read or written; the message names the remedy."""


def encode_dataset(
    dataset: FaceDataset,
    backbone: Backbone | Callable[[], Backbone],
    config: Config,
    folder: Path,
    progress: bool = True,
    captions: Callable[[LatentCache], Iterable[str]] | None = None,
    accelerator: Accelerator | None = None,
    memory: bool = False,
) -> LatentCache:
    """Encode whatever is not yet in the cache of these encoders and data, and open it.

    Args:
        dataset: faces; `ids`, `root` and items are used.
        backbone: with vae and text parts on the device that encodes, or a function that loads it;
            it is called only if something is missing.
        config: reads backbone and data.size.
        folder: caches live in `folder/<key>`, see `cache_key`.
        progress: show progress bars.
        captions: which captions to embed, given the cache of the images; None: all. The empty
            caption is always embedded.
        accelerator: its processes share the work and wait for each other.
        memory: embeddings that are not on disk are kept in memory, those of this rank's captions.

    Raises:
        CacheError: disk or memory is too small, or the disk not shared by the ranks, or the
            encoders give values that float16 cannot hold.
    """
    rank = accelerator.process_index if accelerator else 0
    ranks = accelerator.num_processes if accelerator else 1
    wait = accelerator.wait_for_everyone if accelerator else lambda: None
    folder = Path(folder) / cache_key(dataset, config)
    encoders = functools.cache(backbone) if callable(backbone) else lambda: backbone

    # Every rank looks before any rank writes, so that all divide the same list.
    remove_leftovers(folder)
    files = range(0, len(dataset.ids), FACES)
    missing = _missing(folder, files)
    wait()
    if missing:
        check_side(encoders().vae, config.data.size)
        vae = encoders().vae.config
        side = config.data.size // 2 ** (len(vae.block_out_channels) - 1)
        face = 4 * vae.latent_channels * side**2 + config.data.size**2 // 20  # packed label map
        _check_room(folder, len(missing) * FACES * face, f"{len(missing) * FACES} faces")
        wait()
    for first in _bar(missing[rank::ranks], "images and masks", progress and rank == 0):
        rows = range(first, min(first + FACES, len(dataset.ids)))
        _write(folder / _image_file(first), *_encode_faces(dataset, rows, encoders()))
    wait()
    if gone := [i for i in files if not (folder / _image_file(i)).is_file()]:
        raise CacheError(
            f"{len(gone)} files of latents are not in {folder} although every rank has written "
            "its own: all ranks must see one disk and the same data"
        )

    texts = sorted(folder.glob("text-*.safetensors"))
    damaged = [
        path for path, whole in zip(texts, parallel(_intact, texts), strict=True) if not whole
    ]
    wait()
    for path in damaged:
        path.unlink(missing_ok=True)
    wait()
    cache = LatentCache(folder)
    wanted = captions(cache) if captions else (c for i in cache.ids for c in cache.captions(i))
    absent = sorted(c for c in {EMPTY, *wanted} if not cache.has_text(c))
    if absent and rank == 0:
        warn_of_lost_words(encoders(), absent, config.backbone.text_length)
    if absent:
        width = encoders().text_encoder_2.config.d_model
        size = 2 * len(absent) * config.backbone.text_length * width
        _check_room(None if memory else folder, size, f"{len(absent)} embedded captions")
    wait()
    shared = not memory
    parts = [absent[i : i + CAPTIONS] for i in range(0, len(absent), CAPTIONS)]
    for part in _bar(parts[rank::ranks] if shared else parts, "captions", progress and rank == 0):
        tensors = _encode_captions(part, encoders(), config.backbone.text_length)
        if memory:
            cache.add_text(part, tensors)
        else:
            name = hashlib.sha256("\n".join(part).encode()).hexdigest()[:16]
            _write(folder / f"text-{name}.safetensors", tensors, {"captions": part})
    wait()
    if callable(backbone):  # what was loaded here is not needed any more
        del encoders
        gc.collect()
        torch.cuda.empty_cache()
    return LatentCache(folder) if shared else cache


def _check_room(folder: Path | None, size: int, what: str) -> None:
    """Refuse to begin what cannot end; folder: on its disk, or None: in this machine's memory."""
    import psutil

    if folder is None:
        free = psutil.virtual_memory().available
        remedy = "set data.texts to disk, or train on fewer processes"
    else:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
        remedy = "make room, name another disk in data.cache, or set data.texts to memory"
    if size > free:
        place = "memory" if folder is None else f"on the disk of {folder}"
        raise CacheError(
            f"{what} need {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free {place}: {remedy}"
        )


def cache_folder(config: Config) -> Path:
    """Where caches of the training faces live: `data.cache`, or beside the data root."""
    if config.data.cache:
        return resolve(config.data.cache)
    root = resolve(config.data.root)
    return root.with_name(f"{root.name}-latents")


def cache_key(dataset: FaceDataset, config: Config) -> str:
    """Sixteen hex digits: encoders, size, text length, and the content of the data files."""
    about: list[Any] = [FORMAT, _encoder_digest(config.backbone), config.data.size]
    about += [config.backbone.dtype, config.backbone.text_length, dataset.ids]
    about.append(dataset.digest("image", "mask", "text"))
    return content_key(about, 16)


def _encoder_digest(config: BackboneConfig) -> list[str]:
    """Of the content, so a commit or a copy of the same weights makes no other cache."""
    folder = backbone_folder(config)
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return [path_digest(folder / part) for part in parts]


@torch.no_grad()
def _encode_faces(
    dataset: FaceDataset, rows: range, backbone: Backbone
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    vae = backbone.vae
    encoded: list[dict[str, Tensor]] = []
    packed: list[bytes] = []
    about: dict[str, Any] = {"ids": [], "captions": []}
    samples = list(parallel(dataset.__getitem__, rows))
    for start in range(0, len(samples), BATCH):
        some = samples[start : start + BATCH]
        images = torch.stack([s.image for s in some]).to(vae.device)
        label_map = torch.stack([s.label_map for s in some])
        encoded.append(
            {
                "z": encode_images(vae, images).half().cpu(),
                "z_mask": mask_latents_of(vae, label_map.to(vae.device)).half().cpu(),
                "counts": pixel_counts(label_map),
            }
        )
        packed += [zlib.compress(one.numpy().tobytes()) for one in label_map.byte()]
        about["ids"] += [s.id for s in some]
        about["captions"] += [list(s.captions) for s in some]
    tensors = {name: torch.cat([e[name] for e in encoded]) for name in encoded[0]}
    tensors["label_map"] = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8)
    tensors["label_map_ends"] = torch.tensor([0, *map(len, packed)]).cumsum(0)
    return tensors, about


def _encode_captions(captions: list[str], backbone: Backbone, length: int) -> dict[str, Tensor]:
    filled = captions + [EMPTY] * (-len(captions) % BATCH)  # every batch has one shape
    parts = [filled[i : i + BATCH] for i in range(0, len(filled), BATCH)]
    encoded = [encode_text(backbone, part, length) for part in parts]
    n = len(captions)
    tensors = {
        "tokens": torch.cat([e.tokens.half().cpu() for e in encoded])[:n],
        "pooled": torch.cat([e.pooled.half().cpu() for e in encoded])[:n],
    }
    _check_finite(tensors, "an embedding")
    return tensors


def _missing(folder: Path, files: Sequence[int]) -> list[int]:
    """The files of image latents, by their first face, that are absent or damaged."""
    whole = parallel(_intact, [folder / _image_file(first) for first in files])
    return [first for first, good in zip(files, whole, strict=True) if not good]


def _image_file(first: int) -> str:
    return f"images-{first // FACES:05d}.safetensors"


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Memory-mapped slices by name, and the metadata."""
    from safetensors import safe_open

    file = safe_open(path, "pt")
    return {name: file.get_slice(name) for name in file.keys()}, {  # noqa: SIM118 (no iterator)
        name: value if name == "sha256" else json.loads(value)
        for name, value in file.metadata().items()
    }


def _intact(path: Path) -> bool:
    """Whether the file is there and has its content; a damaged one is named, and made again."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        metadata = {name: json.dumps(value) for name, value in _open(path)[1].items()}
        recorded = json.loads(metadata.pop("sha256"))
        if tensors_sha256(tensors, metadata) != recorded:
            raise ValueError("its content does not have the recorded hash")
    except FileNotFoundError:
        return False
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is damaged ({error}) and is made again", stacklevel=3)
        return False
    return True


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write one file of the cache atomically."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    _check_finite(tensors, path.name)
    metadata = {name: json.dumps(value) for name, value in about.items()}
    try:
        write_tensors(path, tensors, metadata | {"sha256": tensors_sha256(tensors, metadata)})
    except OSError as error:
        raise CacheError(f"{error}, or name another disk in data.cache") from error


def _check_finite(tensors: dict[str, Tensor], what: str) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CacheError(f"{name} of {what} is not finite in float16: check the encoders")


def _bar(work: Sequence, what: str, show: bool) -> Iterable:
    """A progress bar over the files to make; none without work."""
    from tqdm.auto import tqdm

    return tqdm(work, desc=f"encoding {what}", unit="file", disable=None if show and work else True)
