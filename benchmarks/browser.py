"""JupyterLab with one notebook in headless Chromium, and a hand that paints in it.

Used by `benchmarks/painter.py` and by the painter's tests.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
PATIENCE = 180  # seconds, on shared cores
TOKEN = "painter"

RUN_ALL = """async () => {
    const app = window.jupyterapp;
    await app.restored;
    const panel = app.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    const run = (name) => app.commands.execute(name);
    if (!app.shell.leftCollapsed) await run('application:toggle-left-area');
    await run('notebook:hide-cell-code');
    await run('notebook:run-all-cells');
}"""


def wait_for(condition: Callable[[], bool], complaint: str, seconds: float = PATIENCE) -> None:
    """Wait until a condition holds; AssertionError with the complaint if it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.1)


@contextmanager
def jupyter_lab(folder: Path, cell: str) -> Iterator[str]:
    """A JupyterLab with its own settings in a folder; yields the address of a notebook."""
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip())])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "paint.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: str(folder / f".{name.lower()}") for name in ("JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    own["JUPYTER_RUNTIME_DIR"] = str(folder / ".runtime")
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--port={port}", f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={TOKEN}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
    ]  # fmt: skip
    environment = os.environ | own | {"PYTHONPATH": str(ROOT)}
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            wait_for(lambda: _is_open(port), "JupyterLab does not answer")
            yield f"http://127.0.0.1:{port}/lab/tree/paint.ipynb?token={TOKEN}"
        finally:
            server.terminate()
            server.wait(30)


@contextmanager
def painter_page(address: str, profile: Path) -> Iterator[Any]:
    """The page of a notebook that shows a painter, after all its cells have run.

    Args:
        address: from `jupyter_lab`.
        profile: empty folder for the browser.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, headless=True, args=FLAGS,
            viewport={"width": 1500, "height": 1150}, accept_downloads=True,
        )  # fmt: skip
        page = context.pages[0]
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(address)
        page.wait_for_function("window.jupyterapp !== undefined")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.evaluate(RUN_ALL)
        page.wait_for_selector(".ec2-painter .ec2-overlay")
        yield page
        context.close()


class Hand:
    """A user's hand on a painter of 64 x 64 pixels."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Where the middle of a mask's pixel is on the page."""
        box = self.page.locator(".ec2-overlay").bounding_box()
        return box["x"] + (x + 0.5) * box["width"] / 64, box["y"] + (y + 0.5) * box["height"] / 64

    def drag(self, *pixels: tuple[int, int]) -> None:
        """Press at the first pixel, move through the others, and let go."""
        self.page.mouse.move(*self.point(*pixels[0]))
        self.page.mouse.down()
        for pixel in pixels[1:]:
            self.page.mouse.move(*self.point(*pixel), steps=4)
        self.page.mouse.up()

    def keys(self, *names: str) -> None:
        """Press keys on the canvas."""
        self.page.locator(".ec2-overlay").focus()
        for name in names:
            self.page.keyboard.press(name)

    def size(self, size: int) -> None:
        """Set the brush's size."""
        self.page.locator("input[aria-label='brush size']").evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", str(size)
        )

    def click(self, name: str) -> None:
        """Click a button."""
        self.page.get_by_role("button", name=name, exact=True).click()


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
