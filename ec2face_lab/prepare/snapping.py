"""Masks in palette colours with smooth (anti-aliased) edges: edges take a neighbour's class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ec2face_core.attributes import NUM_CLASSES, PALETTE
from ec2face_core.io.masks import (
    NEIGHBOURS,
    check_ids,
    foreign_colour,
    image_values,
    is_smooth,
    nearest_colours,
)
from ec2face_core.io.pictures import open_header
from ec2face_core.io.report import DataError

EDGE_TOLERANCE = 8.0  # Euclidean distance to a palette colour (0-255) within which no edge begins
ROUNDS = 16  # pixels that edges may be wide


def read_snapped(path: Path) -> np.ndarray:
    """Class ids of a mask file as `masks.read_mask` reads it, `(h, w)` uint8; colours are snapped.

    Raises:
        DataError: it cannot be read, holds other ids or colours, or shows one class only.
    """
    values = image_values(open_header(path, "mask"))
    ids = snap_edges(values) if values.ndim == 3 else values
    check_ids(ids)
    return ids.astype(np.uint8)


def snap_edges(rgb: np.ndarray) -> np.ndarray:
    """Palette colours as ids; a pixel of an edge takes the neighbour whose colour is nearest.

    Lines of one pixel may be lost.

    Args:
        rgb: `(h, w, 3)` uint8.

    Returns:
        Class ids `(h, w)` uint8.

    Raises:
        DataError: other colours than those of smooth edges, or wider edges.
    """
    ids, distance = nearest_colours(rgb)
    edge = distance > EDGE_TOLERANCE
    if not edge.any():
        return ids
    if not is_smooth(rgb, edge):
        raise foreign_colour(rgb, distance, edge)
    return _snapped(rgb, ids, edge | ~_solid(ids, edge))


def _solid(ids: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Which pixels lie in a square of one class without edge pixels.

    Others may be part of an edge even in a palette colour: from black to hair it passes l_lip. The
    square has a side of 2 pixels, or of 3 where edges are wider than two.
    """
    side = 2 if not _eroded(edge).any() else 3
    labels = np.where(edge, NUM_CLASSES, ids)
    windows = np.lib.stride_tricks.sliding_window_view(labels, (side, side))
    square = (windows == windows[..., :1, :1]).all((-2, -1)) & (windows[..., 0, 0] != NUM_CLASSES)
    solid = np.zeros(ids.shape, bool)
    for dy in range(side):
        for dx in range(side):
            solid[dy : dy + square.shape[0], dx : dx + square.shape[1]] |= square
    return solid


def _eroded(edge: np.ndarray) -> np.ndarray:
    """Without the pixels at its rim; a line of two pixels or fewer is gone."""
    inner = edge.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(edge, step, axis)
    return inner


def _snapped(rgb: np.ndarray, ids: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """Ids in which each edge pixel has the class of the neighbour with the nearest colour."""
    palette = np.array(PALETTE)
    for _ in range(ROUNDS):
        rows, columns = np.nonzero(edge)
        best = np.full(len(rows), np.inf)
        label = ids[rows, columns]
        for dy, dx in NEIGHBOURS:
            y = np.clip(rows + dy, 0, ids.shape[0] - 1)
            x = np.clip(columns + dx, 0, ids.shape[1] - 1)
            gap = np.linalg.norm(rgb[rows, columns].astype(float) - palette[ids[y, x]], axis=-1)
            closer = ~edge[y, x] & (gap < best)
            best[closer] = gap[closer]
            label[closer] = ids[y, x][closer]
        reached = np.isfinite(best)
        ids[rows[reached], columns[reached]] = label[reached]
        edge[rows[reached], columns[reached]] = False
        if not edge.any():
            return ids
    raise DataError(
        f"{edge.mean():.2%} of the pixels have no palette colour and no neighbour within {ROUNDS} "
        "pixels that has one: another palette"
    )
