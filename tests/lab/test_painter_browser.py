"""The painter in JupyterLab in a real browser, as a user sees it: mouse, keyboard, files.

The kernel writes the label map that Python sees into files; assertions are made on those. With
EC2FACE_SCREENSHOTS=DIR the test leaves pictures of every step there.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Hand, jupyter_lab, painter_page, wait_for

from ec2face_core.attributes import CLASS_ID
from ec2face_core.io.masks import image_ids, mask_ids
from ec2face_core.io.pictures import open_header

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium"),
]

CELL = """
import json
import numpy as np
from pathlib import Path
from ec2face_lab.painter.widget import MaskPainter

painter = MaskPainter("smoke", caption="A young woman with brown hair.", live=False)
changes = []

def write(name):
    part = Path(f".{name}.part")
    with part.open("wb") as file:
        np.save(file, painter.mask)
    part.rename(f"{name}.npy")

def changed(change):
    changes.append(painter.mask.tolist())
    write(f"mask{len(changes)}")
    Path("count").write_text(str(len(changes)))

painter.observe(changed, "mask")
write("mask0")
def drawn(change):
    drawing = painter.drawing
    if drawing is None:
        return
    state = {"agreement": drawing.agreement(), "wish": drawing.mask.tolist()}
    part = Path(".drawn.part")
    part.write_text(json.dumps(state))
    part.rename("drawn.json")
painter.observe(drawn, "status")
painter
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the notebook, in which the kernel writes."""
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def hand(folder, tmp_path_factory):
    """A hand on the painter in a running JupyterLab."""
    profile = tmp_path_factory.mktemp("profile")
    with jupyter_lab(folder, CELL) as address, painter_page(address, profile) as page:
        hand = WatchedHand(page, folder)
        hand.shoot("begin")
        yield hand


class WatchedHand(Hand):
    """A hand, and the label maps that Python has seen."""

    def __init__(self, page, folder):
        super().__init__(page)
        self.folder = folder
        self.shots = 0

    def seen(self):
        count = self.folder / "count"
        return int(count.read_text() or 0) if count.exists() else 0

    def mask(self, number=None):
        return np.load(self.folder / f"mask{self.seen() if number is None else number}.npy")

    def after(self, act, steps=1):
        """The mask that Python sees after something was done."""
        before = self.seen()
        act()
        wait_for(lambda: self.seen() >= before + steps, "no change")
        time.sleep(0.3)
        assert self.seen() == before + steps, "more changes than one"
        return self.mask()

    def shoot(self, name):
        target = os.environ.get("EC2FACE_SCREENSHOTS")
        if target:
            self.shots += 1
            self.page.locator(".ec2-painter").screenshot(
                path=str(Path(target) / f"{self.shots:02d}-{name}.png")
            )


def test_a_painted_face_is_the_label_map_that_python_sees(hand, tmp_path):
    begun = hand.mask(0)
    assert set(np.unique(begun)) == {CLASS_ID[n] for n in ("background", "skin", "neck", "cloth")}

    # an eye by the brush, with the mirror: the other side gets the other eye
    hand.size(3)
    hand.keys("5", "m")
    with_eyes = hand.after(lambda: hand.drag((23, 30), (27, 30)))
    right = np.argwhere(with_eyes == CLASS_ID["r_eye"])
    left = np.argwhere(with_eyes == CLASS_ID["l_eye"])
    assert set(map(tuple, right)) == {(y, x) for y in (29, 30, 31) for x in range(22, 29)}
    assert set(map(tuple, left)) == {(y, 63 - x) for y, x in right}
    changed = with_eyes != begun
    assert set(np.unique(with_eyes[changed])) == {4, 5}
    hand.shoot("eyes")

    # the line of brows, still mirrored
    hand.size(2)
    hand.keys("7", "l")
    with_brows = hand.after(lambda: hand.drag((21, 26), (29, 24)))
    assert (with_brows == CLASS_ID["r_brow"]).sum() == (with_brows == CLASS_ID["l_brow"]).sum() > 10
    hand.keys("m", "2", "b")
    hand.size(4)
    with_nose = hand.after(lambda: hand.drag((32, 32), (32, 40)))
    assert (with_nose == CLASS_ID["nose"]).sum() > 20

    # lips with the keyboard alone: pen down, five pixels to the right, pen up
    hand.page.mouse.move(*hand.point(29, 47))
    hand.keys("w", "b")
    hand.size(2)

    def by_keys():
        hand.keys("Space", *["ArrowRight"] * 5, "Space")

    with_lips = hand.after(by_keys)
    lips = np.argwhere(with_lips == CLASS_ID["u_lip"])
    assert len(lips) and lips[:, 1].min() >= 28 and lips[:, 1].max() <= 36
    hand.shoot("features")

    # the left half of the neck becomes cloth
    hand.keys("a", "f")
    filled = hand.after(lambda: hand.drag((23, 56)))
    added = filled != with_lips
    assert added.sum() > 10 and set(np.unique(filled[added])) == {CLASS_ID["cloth"]}
    assert set(np.unique(with_lips[added])) == {CLASS_ID["neck"]}
    undone = hand.after(lambda: hand.keys("Control+z"))
    assert np.array_equal(undone, with_lips)
    redone = hand.after(lambda: hand.keys("Control+Shift+z"))
    assert np.array_equal(redone, filled)
    back = hand.after(lambda: hand.keys("Control+z"))
    for expected in (with_nose, with_brows, with_eyes, begun):
        back = hand.after(lambda: hand.keys("Control+z"))
        assert np.array_equal(back, expected)
    for expected in (with_eyes, with_brows, with_nose, with_lips):
        back = hand.after(lambda: hand.keys("Control+y"))
        assert np.array_equal(back, expected)

    # eraser and eyedropper
    hand.keys("e")
    erased = hand.after(lambda: hand.drag((32, 36)))
    assert erased[36, 32] == 0
    hand.after(lambda: hand.keys("Control+z"))
    hand.keys("i")
    hand.drag((32, 36))
    pressed = hand.page.locator(".ec2-class[aria-pressed=true] .ec2-name").inner_text()
    assert pressed == "nose"


def test_stamps_files_and_pictures(hand, tmp_path):
    page = hand.page
    before = hand.mask()
    stamped = hand.after(lambda: page.get_by_role("button", name="earrings").click())
    assert (stamped == CLASS_ID["ear_r"]).sum() > 10
    added = stamped != before
    assert set(np.unique(stamped[added])) == {CLASS_ID["ear_r"]}
    hand.shoot("earrings")

    # hair, so that it is a face
    hand.keys("t", "b")
    hand.size(8)
    hand.after(lambda: hand.drag((17, 34), (18, 20), (26, 9), (37, 9), (45, 20), (46, 34)))
    hand.shoot("hair")
    painted = hand.mask()

    page.get_by_role("button", name="Draw", exact=True).click()
    wait_for((hand.folder / "drawn.json").exists, "no picture was drawn")
    wait_for(
        lambda: page.locator(".ec2-picture").evaluate("e => e.naturalWidth") == 64, "not shown"
    )
    drawn = json.loads((hand.folder / "drawn.json").read_text())
    assert np.array_equal(np.array(drawn["wish"]), painted)
    skin = next(row for row in drawn["agreement"] if row["name"] == "skin")
    shown = page.locator(".ec2-class", has_text="skin").locator(".ec2-number").all_inner_texts()
    assert np.abs(np.array(shown, float) - [skin["recall"], skin["f1"]]).max() <= 0.5
    assert page.locator(".ec2-item").count() == 1
    hand.shoot("picture")

    with page.expect_download() as download:
        page.get_by_role("button", name="Save mask").click()
    file = tmp_path / "mask.png"
    download.value.save_as(file)
    image = open_header(file, "mask")
    assert image.mode == "P" and np.array_equal(image_ids(image), painted)

    # the file comes back after the mask was changed; then an earlier picture restores its mask
    hand.keys("e")
    erased = hand.after(lambda: hand.drag((10, 10), (50, 50)))
    assert not np.array_equal(erased, painted)
    opened = hand.after(lambda: page.locator("input[data-file=open]").set_input_files(file))
    assert np.array_equal(opened, painted) and np.array_equal(mask_ids(file), painted)
    hand.after(lambda: hand.keys("Control+z"))
    restored = hand.after(lambda: page.locator(".ec2-item").first.click())
    assert np.array_equal(restored, painted)


def test_a_bad_file_is_refused_with_a_sentence_and_changes_nothing(hand, tmp_path):
    from PIL import Image

    wrong = tmp_path / "wrong.png"
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(wrong)
    before = hand.seen()
    hand.page.locator("input[data-file=open]").set_input_files(wrong)
    status = hand.page.locator(".ec2-status")
    wait_for(lambda: "32x32" in status.inner_text(), "no sentence")
    assert hand.seen() == before


def test_a_photo_is_parsed_shown_below_the_mask_and_edited(hand, tmp_path):
    from PIL import Image

    from ec2face_core.config import load_profile
    from ec2face_lab.painter.starts import Starts

    page = hand.page
    face = Starts(load_profile("smoke")).procedural("The man has short black hair.")
    pixels = (face.image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(tmp_path / "me.png")
    upload = page.locator("input[data-file=photo]")
    parsed = hand.after(lambda: upload.set_input_files(tmp_path / "me.png"))
    assert (parsed == face.mask).mean() > 0.95
    wait_for(lambda: page.locator(".ec2-photo").evaluate("e => e.naturalWidth") == 256, "no photo")
    opacity = page.locator(".ec2-mask").evaluate("e => Number(getComputedStyle(e).opacity)")
    assert opacity == 0.5
    assert page.get_by_text("keep the rest of the photo").is_visible()

    hand.after(lambda: hand.click("glasses"))
    hand.click("Draw")
    status = page.locator(".ec2-status")
    wait_for(lambda: "Edited picture" in status.inner_text(), "no edited picture")
    hand.shoot("photo")
