"""How fast the painter is, and a recording of it.

    .venv/bin/python benchmarks/painter.py          # benchmarks/painter.csv and docs/painter.gif

A picture is timed in the kernel (`Artist.draw`) and in the browser: from the moment the pen is
lifted to the picture on the page. While a picture is drawn the browser's longest frame and the time
until a stamp is shown are measured. All pictures are of procedural faces.
"""

from __future__ import annotations

import csv
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from browser import CHROMIUM, ROOT, Hand, jupyter_lab, painter_page, wait_for
from PIL import Image

OUT = Path(__file__).with_suffix(".csv")
RECORDING = ROOT / "docs" / "painter.gif"
WIDTH = 720  # pixels of the recording
LONGEST = 2_000_000  # bytes of the recording
TIMES = 7

CELL = """
from ec2face_lab.painter.widget import MaskPainter
painter = MaskPainter("mini", caption="A young woman with long brown hair.", live=False)
painter
"""

Row = tuple[str, float, str]

# What the hand does: keys and brush size, then the pixels of one stroke.
STROKES: tuple[tuple[tuple[str, ...], int, tuple[tuple[int, int], ...]], ...] = (
    (("t", "b", "m"), 9, ((32, 7), (22, 10), (15, 22), (13, 38), (14, 52))),
    (("5",), 2, ((22, 30), (26, 30))),
    (("7", "l"), 2, ((20, 26), (27, 25))),
    (("2", "b"), 3, ((31, 29), (31, 38), (29, 39))),
    (("w",), 2, ((27, 45), (32, 45))),
    (("r",), 2, ((28, 47), (32, 47))),
)
STAMPS = {"earrings": "A young woman wearing earrings.", "hat": "A young woman wearing a hat."}


def kernel() -> list[Row]:
    """Seconds of a picture without a browser."""
    from ec2face_core.config import load_profile
    from ec2face_lab.painter.artist import Artist, Wish
    from ec2face_lab.painter.starts import Starts
    from ec2face_lab.painter.widget import LIVE_STEPS

    config = load_profile("mini")
    artist = Artist(config)
    start = Starts(config).procedural("She has long brown hair.")
    wish = Wish(start.mask, start.caption, 1, 2.0, 2.0)
    artist.draw(wish, 1)
    rows = []
    for steps in (LIVE_STEPS, config.sampling.steps):
        took = [artist.draw(wish, steps).seconds for _ in range(TIMES)]
        rows.append((f"picture, {steps} steps: best", min(took), "s"))
        rows.append((f"picture, {steps} steps: median", statistics.median(took), "s"))
    return rows


def wait_for_picture(page: Any, act: Callable[[], None]) -> float:
    """Seconds from an action to the next picture on the page."""
    page.evaluate("""() => {
        const image = document.querySelector('.ec2-picture');
        window.shown = new Promise((done) => {
            image.addEventListener('load', () => done(performance.now()), { once: true });
        });
        for (const name of ['pointerup', 'click'])
            document.addEventListener(name, () => (window.began = performance.now()),
                                      { once: true, capture: true });
    }""")
    act()
    return float(page.evaluate("async () => (await window.shown) - window.began")) / 1000


def in_the_browser(hand: Hand) -> list[Row]:
    """Seconds from pen-up to picture, and how the page stays responsive."""
    page = hand.page
    live = page.locator("input[data-trait=live]")
    live.check()
    took = []
    for i in range(TIMES):
        took.append(wait_for_picture(page, lambda i=i: hand.drag((4 + i, 4), (4 + i, 8))))
    rows = [
        ("pen-up to picture, 4 steps: best", min(took), "s"),
        ("pen-up to picture, 4 steps: median", statistics.median(took), "s"),
    ]
    live.uncheck()
    hand.click("Draw")
    longest = page.evaluate("""() => new Promise((done) => {
        let last = performance.now(), longest = 0, frames = 0;
        const frame = (now) => {
            longest = Math.max(longest, now - last);
            last = now;
            if (++frames < 60) requestAnimationFrame(frame); else done(longest);
        };
        requestAnimationFrame(frame);
    })""")
    rows.append(("longest frame while a picture is drawn", longest / 1000, "s"))
    hand.click("Draw")
    began = time.perf_counter()
    hand.click("glasses")
    wait_for(lambda: "glasses" in page.locator(".ec2-status").inner_text(), "no stamp", 60)
    rows.append(("stamp shown while a picture is drawn", time.perf_counter() - began, "s"))
    return rows


def record(hand: Hand) -> list[Image.Image]:
    """Frames of a session from an empty head to a face with a hat."""
    page = hand.page
    frames: list[Image.Image] = []

    def shoot() -> None:
        content = page.locator(".ec2-painter").screenshot()
        frames.append(Image.open(io.BytesIO(content)).convert("RGB"))

    hand.click("Start")  # an empty head
    page.locator("input[data-trait=live]").check()
    page.wait_for_timeout(500)
    shoot()
    for keys, size, pixels in STROKES:
        hand.keys(*keys)
        hand.size(size)
        page.mouse.move(*hand.point(*pixels[0]))
        page.mouse.down()
        for pixel in pixels[1:]:
            page.mouse.move(*hand.point(*pixel), steps=3)
            shoot()
        wait_for_picture(page, page.mouse.up)
        shoot()
    hand.keys("m")
    for name, caption in STAMPS.items():
        page.locator("input[data-trait=caption]").fill(caption)
        wait_for_picture(page, lambda name=name: hand.click(name))
        shoot()
    wait_for(lambda: "28 steps" in page.locator(".ec2-status").inner_text(), "no rest", 120)
    shoot()
    return frames


def save_recording(frames: list[Image.Image], path: Path) -> None:
    """Write an animated GIF; the last frame stays longer."""
    height = max(frame.height for frame in frames)
    same = []
    for frame in frames:
        page = Image.new("RGB", (frame.width, height), "white")
        page.paste(frame)
        same.append(page.resize((WIDTH, round(height * WIDTH / frame.width)), Image.Resampling.BOX))
    none = Image.Dither.NONE  # it would not compress
    drawn = [frame.quantize(256, Image.Quantize.MAXCOVERAGE, dither=none) for frame in same]
    path.parent.mkdir(exist_ok=True)
    drawn[0].save(
        path, save_all=True, append_images=drawn[1:], loop=0, optimize=True,
        duration=[450] * (len(drawn) - 1) + [4000],
        comment=b"EC2Face: procedural and synthetic faces, no photographs of persons.",
    )  # fmt: skip
    if path.stat().st_size > LONGEST:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than {LONGEST:,}")


def main() -> None:
    """Measure, record and write."""
    if CHROMIUM is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    rows = kernel()
    with tempfile.TemporaryDirectory() as folder:
        lab = Path(folder) / "lab"
        lab.mkdir()
        with (
            jupyter_lab(lab, CELL) as address,
            painter_page(address, Path(folder) / "profile") as page,
        ):
            hand = Hand(page)
            ready = page.locator(".ec2-status")
            wait_for(lambda: "ready" in ready.inner_text(), "the weights are not loaded")
            frames = record(hand)
            rows += in_the_browser(hand)
    save_recording(frames, RECORDING)
    rows.append(("load of the machine (1 minute)", os.getloadavg()[0], "processes"))
    rows.append(("cores", float(os.cpu_count() or 0), ""))
    with OUT.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["what", "value", "unit"])
        writer.writerows((what, f"{value:.3g}", unit) for what, value, unit in rows)
    print(OUT.read_text())


if __name__ == "__main__":
    main()
