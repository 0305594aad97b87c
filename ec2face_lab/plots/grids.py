"""Grids of pictures: Figs. 3, 6, 7 and 8, maps of weights, and the general `image_grid`.

Images are `b 3 h w` floats in [-1, 1], label maps `b h w` class ids.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ec2face_core.attributes import CLASS_ID, GROUPS, display_name

from .style import (
    bare,
    class_legend,
    mask_picture,
    new_figure,
    picture,
    plain,
    show,
    square_crop,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rare_boxes(
    label_map: Tensor, classes: Sequence[int] = GROUPS["RFA"]
) -> list[tuple[int, int, int, int]]:
    """Boxes (x, y, width, height) in pixels around each connected part of the given classes.

    Specks below 0.03 % of the map get no box; a box has a margin of 3 % of the map's side.
    """
    from scipy import ndimage

    height, width = label_map.shape
    boxes = []
    for class_id in classes:
        parts, _ = ndimage.label(label_map.cpu().numpy() == class_id, structure=np.ones((3, 3)))
        for i, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
            if (parts == i).sum() < 3e-4 * parts.size:
                continue
            margin = max(1, round(0.03 * width))
            x = max(columns.start - margin, 0)
            y = max(rows.start - margin, 0)
            right = min(columns.stop + margin, width)
            bottom = min(rows.stop + margin, height)
            boxes.append((x, y, right - x, bottom - y))
    return boxes


def _largest_rare(
    label_maps: Tensor, classes: Sequence[int] = GROUPS["RFA"]
) -> list[tuple[int, int, int, int] | None]:
    """The largest of the `rare_boxes` of each map; None without one."""
    boxes = [rare_boxes(mask, classes) for mask in label_maps]
    return [max(some, key=lambda box: box[2] * box[3], default=None) for some in boxes]


def rare_details(
    label_maps: Tensor, images: Mapping[str, Tensor], classes: Sequence[int] = GROUPS["RFA"]
) -> dict[str, list[np.ndarray]]:
    """The largest rare attribute of each face, cut out of its mask and of several pictures.

    Args:
        label_maps: `b h w`.
        images: name -> pictures of the same faces, `b 3 h w` in [-1, 1].
        classes: ids, found in the mask; a face without them is shown whole.

    Returns:
        `mask` and the names of images -> b square pictures `h w 3`.
    """
    height, width = label_maps.shape[1:]
    boxes = [box or (0, 0, width, height) for box in _largest_rare(label_maps, classes)]
    rows = {"mask": [mask_picture(mask) for mask in label_maps]}
    rows |= {name: [picture(image) for image in pictures] for name, pictures in images.items()}
    return {
        name: [square_crop(image, box) for image, box in zip(row, boxes, strict=True)]
        for name, row in rows.items()
    }


@styled
def image_grid(
    rows: Sequence[Sequence[Tensor | np.ndarray | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: float = 1.1,
    boxes: Sequence[Sequence[tuple]] = (),
    title: str = "",
    zooms: Sequence[tuple | None] = (),
    legend: Iterable[int] = (),
) -> Figure:
    """Pictures in rows and columns.

    Args:
        rows: images (`3 h w` in [-1, 1]), label maps (`h w` ids), pictures (`h w 3` in [0, 1])
            or None for "not run here".
        row_labels: text left of each row, wrapped (captions, for example).
        column_labels: text above each column, wrapped.
        cell: side of a picture in inches.
        boxes: for each row the boxes of `rare_boxes`, in red on its masks.
        title: text above the grid.
        zooms: for each row a box that every picture shows enlarged in a corner, or None.
        legend: classes whose colours are named below the grid.
    """
    columns = max(len(row) for row in rows)
    labels = [textwrap.fill(plain(label), 22) for label in row_labels]
    heads = [textwrap.fill(plain(label), 14) for label in column_labels]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    label_width = 0.068 * longest + 0.1 if longest else 0.0
    head_height = 0.17 * max((head.count("\n") + 1 for head in heads), default=0)
    width = label_width + columns * (cell + 0.07)
    classes = list(legend)
    lines = -(-len(classes) // max(1, int(width / 0.95)))
    height = len(rows) * (cell + 0.07) + head_height + 0.27 * bool(title) + 0.19 * lines
    fig = new_figure(width, height)
    ratios = ([label_width] if label_width else []) + [cell] * columns
    axes = fig.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios)
    for i, row in enumerate(rows):
        if label_width:
            axes[i, 0].axis("off")
            style = {"va": "center", "fontsize": 8, "transform": axes[i, 0].transAxes}
            axes[i, 0].text(0, 0.5, labels[i], **style)
        for j, ax in enumerate(axes[i, bool(label_width) :]):
            if j >= len(row):
                ax.axis("off")
                continue
            mask = isinstance(row[j], Tensor) and row[j].ndim == 2
            marks = boxes[i] if boxes and mask else ()
            show(ax, _any_picture(row[j]), marks, zooms[i] if zooms else None)
            if i == 0 and j < len(heads):
                ax.set_title(heads[j], fontsize=8.5, pad=4)
    if title:
        fig.suptitle(title, fontsize=10)
    if classes:
        class_legend(fig, classes)
    return fig


def _any_picture(image: Tensor | np.ndarray | None) -> np.ndarray | None:
    if isinstance(image, Tensor):
        return mask_picture(image) if image.ndim == 2 else picture(image)
    return image


def comparison_grid(
    captions: Sequence[str],
    label_maps: Tensor,
    systems: Mapping[str, Tensor | None],
    boxed: Sequence[int] = GROUPS["RFA"],
    real: Tensor | None = None,
) -> Figure:
    """Figs. 3 and 6: caption and mask, then one column per system, rare attributes enlarged.

    The red boxes on a mask are its rare attributes; the largest is enlarged in every picture.

    Args:
        captions: one per row.
        label_maps: `b h w`, one row each.
        systems: name -> images `b 3 h w`, or None for a system without pictures here.
        boxed: class ids to box, found in the mask.
        real: `b 3 h w`, shown after the mask if given.
    """
    columns = ({} if real is None else {"real": real}) | dict(systems)
    rows = [
        [mask, *(None if images is None else images[i] for images in columns.values())]
        for i, mask in enumerate(label_maps)
    ]
    boxes = [rare_boxes(mask, boxed) for mask in label_maps]
    zooms = _largest_rare(label_maps, boxed)
    cell = min(1.1, 8.2 / (len(columns) + 1) - 0.07)  # ten inches in all
    heads = ["mask", *columns]
    classes = label_maps.unique().tolist()
    return image_grid(rows, captions, heads, cell, boxes, zooms=zooms, legend=classes)


def unimodal_grid(
    captions: Sequence[str], text_images: Tensor, label_maps: Tensor, mask_images: Tensor
) -> Figure:
    """Fig. 7: rows driven by text alone, then rows driven by a mask alone; columns are seeds.

    The first rows are the base model's pictures, since the LoRA acts on mask tokens.

    Args:
        captions: one per row of the first part.
        text_images: their images `(rows, seeds, 3, h, w)`.
        label_maps: `(rows, h, w)` of the second part.
        mask_images: their images `(rows, seeds, 3, h, w)`.
    """
    nothing = np.ones((1, 1, 3), dtype=np.float32)  # white: no mask was given
    rows = [[nothing, *images] for images in text_images]
    rows += [[mask, *images] for mask, images in zip(label_maps, mask_images, strict=True)]
    labels = [f"base, text alone: “{caption}”" for caption in captions]
    labels += ["EC²Face, mask alone"] * len(label_maps)
    samples = [f"sample {i + 1}" for i in range(text_images.shape[1])]
    zooms = [None] * len(captions) + _largest_rare(label_maps)
    classes = label_maps.unique().tolist()
    return image_grid(rows, labels, ["mask", *samples], zooms=zooms, legend=classes)


def diversity_grid(captions: Sequence[str], label_maps: Tensor, images: Tensor) -> Figure:
    """Fig. 8: caption and mask are fixed, the seed varies.

    Args:
        captions: one per row.
        label_maps: `(rows, h, w)`.
        images: `(rows, seeds, 3, h, w)`.
    """
    rows = [[mask, *row] for mask, row in zip(label_maps, images, strict=True)]
    samples = [f"sample {i + 1}" for i in range(images.shape[1])]
    zooms = _largest_rare(label_maps)
    classes = label_maps.unique().tolist()
    return image_grid(rows, captions, ["mask", *samples], zooms=zooms, legend=classes)


@styled
def conflict_blocks(
    cells: Mapping[tuple[str, bool, bool], tuple[str, Tensor, Tensor]], values: Mapping[Any, float]
) -> Figure:
    """A block of 2 x 2 for each class: mask with or without it, text with or without it.

    Args:
        cells: (class, in the mask?, in the text?) -> (caption, label map, picture), as
            `robustness.conflicts` gives them.
        values: the same keys -> share of the pictures that show it, in percent.
    """
    classes = list(dict.fromkeys(name for name, _, _ in cells))
    side = min(1.05, 9.2 / (4 * max(1, len(classes))))
    fig = new_figure(4 * side * max(1, len(classes)) + 0.5, 2 * side + 1.0)
    for name, block in zip(classes, np.atleast_1d(fig.subfigures(1, len(classes))), strict=True):
        block.suptitle(display_name(CLASS_ID[name]), fontsize=9.5)
        axes = block.subplots(2, 4)
        for i, has in enumerate((True, False)):
            for j, says in enumerate((True, False)):
                pair = axes[i, 2 * j : 2 * j + 2]
                _, mask, image = cells.get((name, has, says), ("", None, None))
                for ax, part in zip(pair, (mask, image), strict=True):
                    show(ax, _any_picture(part))
                value = values.get((name, has, says))
                note = "no such faces" if value is None else f"{value:.0f} % show it"
                pair[1].set_xlabel(note, fontsize=8)
                if i == 0:
                    pair[0].set_title("text: yes" if says else "text: no", fontsize=8.5)
            axes[i, 0].set_ylabel("mask: yes" if has else "mask: no", fontsize=8.5)
    return fig


@styled
def weights_map(images: Tensor, label_maps: Tensor, weights: Mapping[str, Tensor]) -> Figure:
    """Eq. 10 over faces: image, mask and a heat map (log scale) of each kind of weights.

    Args:
        images: `b 3 h w` in [-1, 1].
        label_maps: `b h w`.
        weights: heading -> `b h' w'`; for example the pixel weights and their latent reductions.
    """
    from matplotlib.colors import LogNorm

    low = min(float(w.min()) for w in weights.values())
    high = max(float(w.max()) for w in weights.values())
    names = ["image", "mask", *weights]
    cell = min(1.35, 9 / len(names))
    fig = new_figure(cell * len(names) + 0.8, cell * len(images) + 0.35)
    axes = fig.subplots(len(images), len(names), squeeze=False)
    for i, row in enumerate(axes):
        show(row[0], picture(images[i]))
        show(row[1], mask_picture(label_maps[i]))
        for ax, values in zip(row[2:], weights.values(), strict=True):
            bare(ax)
            heat = ax.imshow(values[i].cpu(), norm=LogNorm(low, high), cmap="magma")
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name)
    fig.colorbar(heat, ax=axes, label="weight w(i, j)", shrink=0.9, pad=0.01)
    return fig
