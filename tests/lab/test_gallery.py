"""Executed notebooks as pages: quiet, small, and without this machine."""

from __future__ import annotations

import io
import sys

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from ec2face_core.io.paths import ROOT
from ec2face_lab import gallery


def stream(text: str, name: str = "stdout"):
    return new_output("stream", name=name, text=text)


def picture(pixels: np.ndarray):
    """A displayed PNG, as matplotlib's figures come."""
    import base64

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "<Figure>"}
    return new_output("display_data", data=data)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path, *outputs):
    cells = [
        new_markdown_cell(
            "# Title\n[R](../README.md#a), [next](02_b.ipynb), [web](https://a.b/c.md), [up](#top)"
        ),
        new_code_cell("run()", outputs=list(outputs)),
        new_code_cell(""),
    ]
    notebook = new_notebook(cells=cells, metadata={"widgets": {"state": {}}})
    nbformat.write(notebook, path)
    return path


def test_a_redrawn_line_keeps_its_last_state():
    text = "start\n\r  0%|  |\r 50%|# |\r100%|##|\nend\n\x1b[A\r   \rx\n"
    assert gallery.last_states(text) == "start\n100%|##|\nend\nx\n"
    assert gallery.last_states("a\n\nb\r\n") == "a\n\nb\n"


def test_a_warning_names_its_cell_without_a_folder():
    said = gallery.without_machine("/tmp/ipykernel_12/345.py:3: UserWarning: x\n")
    assert said == "cell:3: UserWarning: x\n"


def test_tidy_joins_streams_and_drops_bars_widgets_and_machine_paths(tmp_path):
    widget = new_output(
        "display_data",
        data={"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "0%|"},
    )
    path = saved(
        tmp_path / "a.ipynb",
        stream("\ra:  1%| | 1/99 [00:01<01:38]"), stream("\ra: 100%|#| 99/99 [01:39<00:00]\n"),
        widget, stream(f"\r50 %\rsee {ROOT}/runs and {sys.prefix}/lib\n"),
        picture(noise(4, 4)), stream("\r  \r"), stream("after\n"),
    )  # fmt: skip
    gallery.tidy_file(path)
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    first, shown, last = notebook.cells[1].outputs
    assert first.text == "see runs and .venv/lib\n"
    assert "image/png" in shown.data and last.text == "after\n"


def test_a_page_shows_text_code_and_small_pictures(tmp_path):
    long = "".join(f"line {i}\n" for i in range(500))
    table = new_output(
        "execute_result",
        data={"text/html": "<style>x</style><table><tr><td>1</td></tr></table>", "text/plain": "1"},
    )
    flat = np.zeros((60, 80, 3), np.uint8)
    path = saved(
        tmp_path / "01_a.ipynb", picture(flat), picture(noise(500, 600)), stream(long), table
    )
    page, *pictures = gallery.render(
        path, tmp_path / "docs" / "gallery", tmp_path / "notebooks" / "01_a.ipynb"
    )
    text = page.read_text()
    assert page.name == "01_a.md"
    assert text.startswith("*This is an executed copy of [01_a.ipynb](../../notebooks/01_a.ipynb)")
    assert "[R](../../README.md#a), [next](02_b.md), [web](https://a.b/c.md), [up](#top)" in text
    assert "# Title" in text and "run()" in text and "<Figure>" not in text
    assert "line 0" in text and "line 499" in text and "line 250" not in text
    assert "<table>" in text and "<style>" not in text
    assert [p.suffix for p in pictures] == [".png", ".webp"]
    for file in pictures:
        assert file.stat().st_size <= gallery.LARGEST
        assert f"]({file.relative_to(page.parent).as_posix()})" in text
        assert Image.open(file).size[0] > 0


def test_a_picture_that_cannot_be_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "LARGEST", 1000)
    path = saved(tmp_path / "01_a.ipynb", picture(noise(500, 600)))
    with pytest.raises(ValueError, match="cannot be made smaller than 1000 bytes"):
        gallery.render(path, tmp_path / "out", path)
