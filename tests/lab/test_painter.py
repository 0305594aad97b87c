"""The painter without a browser: stamps, starts, the worker, and what the widget does with both."""

from __future__ import annotations

import io
import json
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ec2face_core.attributes import CLASS_ID, FLIP_PAIRS, NUM_CLASSES, PALETTE
from ec2face_core.config import ConfigError, UserError
from ec2face_core.io.masks import image_ids
from ec2face_core.io.pictures import open_header
from ec2face_core.io.report import DataError
from ec2face_lab.painter.artist import Artist, Wish
from ec2face_lab.painter.stamps import FEATURES, STAMPS, face_frame, stamp
from ec2face_lab.painter.starts import STARTS, Starts, one_face
from ec2face_lab.painter.widget import KEYS, STATIC, STRIP, MaskPainter, mask_png
from ec2face_lab.painter.worker import Superseded, Worker, on_this_loop
from ec2face_lab.study.painters import through_autoencoder
from ec2face_lab.world.rendering import render
from ec2face_lab.world.scenes import sample_scenes

PATIENCE = 60.0


def plain_faces(size: int, count: int = 12) -> np.ndarray:
    """Masks of faces that wear nothing."""
    scenes = sample_scenes(5, range(count))
    for name in ("earrings", "necklace", "eyeglasses", "hat"):
        scenes.values[name][:] = 0
    return render(scenes, size).label_map.to(torch.uint8).numpy()


# ------------------------------------------------------------------------------------------ stamps


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("name", STAMPS)
def test_a_stamp_paints_its_class_alone_and_no_eye_brow_or_lip(name, size):
    class_id = CLASS_ID[STAMPS[name][0]]
    hidden = [CLASS_ID[feature] for feature in FEATURES]
    stamped_any = 0
    for ids in plain_faces(size):
        before = ids.copy()
        try:
            after = stamp(ids, name)
        except DataError as error:
            assert name == "necklace" and ("neck" in str(error) or "room" in str(error))
            continue
        changed = after != ids
        assert (after[changed] == class_id).all() and changed.any()
        assert not np.isin(ids[changed], hidden).any()
        assert np.array_equal(ids, before)
        stamped_any += 1
    assert stamped_any >= 9


def test_stamps_have_the_same_shape_at_every_size():
    for small, large in zip(plain_faces(64), plain_faces(256), strict=True):
        for name in ("earrings", "glasses", "hat"):
            share = [float((stamp(ids, name) != ids).mean()) for ids in (small, large)]
            assert share[0] == pytest.approx(share[1], rel=0.35)


def test_stamps_lie_where_the_data_has_such_things():
    scenes = sample_scenes(8, range(30))
    for name in ("earrings", "necklace", "eyeglasses", "hat"):
        scenes.values[name][:] = 1
    worn = render(scenes, 128).label_map.numpy()
    for name in ("earrings", "necklace", "eyeglasses", "hat"):
        scenes.values[name][:] = 0
    bare = render(scenes, 128).label_map.to(torch.uint8).numpy()
    for name, (class_name, _) in STAMPS.items():
        gaps = []
        for with_it, without in zip(worn, bare, strict=True):
            try:
                stamped = stamp(without, name) == CLASS_ID[class_name]
            except DataError:
                continue
            real = with_it == CLASS_ID[class_name]
            if real.any():
                centre = [np.argwhere(where).mean(0) for where in (stamped, real)]
                gaps.append(np.linalg.norm(centre[0] - centre[1]) / 128)
        assert len(gaps) >= 20 and np.median(gaps) < 0.05, name


def test_a_turned_face_gets_turned_glasses():
    from scipy.ndimage import rotate

    ids = plain_faces(128, 1)[0]
    turned = rotate(ids, 15, order=0, reshape=False)  # anticlockwise: image right goes up
    glasses = np.argwhere(stamp(turned, "glasses") == CLASS_ID["eye_g"])
    left = glasses[glasses[:, 1] < np.median(glasses[:, 1])]
    right = glasses[glasses[:, 1] >= np.median(glasses[:, 1])]
    assert left[:, 0].mean() - right[:, 0].mean() > 5
    assert face_frame(turned).unit == pytest.approx(face_frame(ids).unit, rel=0.1)


def test_brows_place_a_stamp_where_eyes_are_hidden():
    ids = plain_faces(64, 1)[0]
    hidden = ids.copy()
    hidden[np.isin(hidden, [CLASS_ID["l_eye"], CLASS_ID["r_eye"]])] = CLASS_ID["skin"]
    gap = np.abs(face_frame(hidden).v - face_frame(ids).v).max()
    assert gap < 0.35


@pytest.mark.parametrize(
    ("name", "parts", "complaint"),
    [
        ("hat", (), "neither two eyes nor two brows"),
        ("necklace", ("l_eye", "r_eye", "skin"), "no neck"),
        ("earrings", ("l_eye", "r_eye"), "no skin"),
        ("hat", ("l_eye", "r_eye", "neck"), "neither hair nor forehead"),
    ],
)
def test_a_mask_without_what_a_stamp_needs_is_refused_with_a_remedy(name, parts, complaint):
    ids = plain_faces(64, 1)[0]
    ids[~np.isin(ids, [CLASS_ID[part] for part in parts])] = 0
    with pytest.raises(DataError, match=f"{complaint}.*paint"):
        stamp(ids, name)


def test_an_unknown_stamp_is_named():
    with pytest.raises(ValueError, match="'crown' does not exist; known: earrings"):
        stamp(np.zeros((64, 64), np.uint8), "crown")


# ------------------------------------------------------------------------------------------ starts


@pytest.fixture(scope="module")
def starts(tiny_config):
    return Starts(tiny_config)


def test_an_empty_head_can_be_painted_on(starts):
    ids = starts.empty().mask
    assert ids.shape == (64, 64) and set(np.unique(ids)) == {0, 1, 17, 18}
    assert np.array_equal(ids, ids[:, ::-1])


def test_a_face_of_the_data_set_by_id_and_number(starts):
    by_number = starts.dataset(1)
    by_id = starts.dataset("13")  # 12 training faces come first
    assert np.array_equal(by_number.mask, by_id.mask) and by_id.caption
    assert by_id.image.shape == (3, 64, 64) and 0 <= by_id.image.min() < by_id.image.max() <= 1
    with pytest.raises(DataError, match="has no face 'nobody'"):
        starts.dataset("nobody")


def test_a_procedural_face_has_what_the_caption_asks_for_and_nothing_rare_beside(starts):
    hat = starts.procedural("This young man wears a hat.").mask
    assert (hat == CLASS_ID["hat"]).sum() > 100 and not (hat == CLASS_ID["eye_g"]).any()
    glasses = starts.procedural("The woman is wearing eyeglasses and has long hair.").mask
    assert (glasses == CLASS_ID["eye_g"]).any() and not (glasses == CLASS_ID["hat"]).any()


def test_the_nearest_mask_is_that_of_the_training_face_with_the_caption(starts):
    train = starts._train
    for name in train.ids[:4]:
        start = starts.nearest(train.manifest_caption(name))
        same = [k for k in train.ids if train.manifest_caption(k) == train.manifest_caption(name)]
        assert any(np.array_equal(start.mask, train.label_map(k).numpy()) for k in same)
    with pytest.raises(DataError, match="caption is empty"):
        starts.nearest(" ")


class Reader:
    """A parser whose certainty falls with the darkness of a picture's upper half."""

    device = torch.device("cpu")

    def probabilities(self, images):
        top = (images[:, :, :32].mean((1, 2, 3)) / 2 + 0.5).clamp(0, 1)
        certain = top[:, None, None, None].expand(-1, 1, 64, 64)
        rest = (1 - certain) / (NUM_CLASSES - 1)
        return torch.cat([certain, rest.expand(-1, NUM_CLASSES - 1, -1, -1)], 1)

    def parse(self, images):
        return torch.tensor(plain_faces(64, 1)).long()


def photo(top=255, bottom=0, size=100):
    pixels = np.full((size, size, 3), bottom, np.uint8)
    pixels[: size // 2] = top
    return Image.fromarray(pixels)


@pytest.fixture
def reading(tiny_config, monkeypatch):
    starts = Starts(tiny_config)
    starts.__dict__["_parser"] = Reader()
    return starts


def test_a_photo_is_parsed_and_shown_larger(reading):
    start = reading.photo(photo(size=700))
    assert start.mask.shape == (64, 64) and start.image.shape == (3, 64, 64)
    assert start.overlay.shape == (3, 512, 512)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (Image.Transpose.ROTATE_90, "a quarter turn clockwise"),
        (Image.Transpose.ROTATE_180, "half a turn"),
        (Image.Transpose.ROTATE_270, "a quarter turn anticlockwise"),
    ],
)
def test_a_turned_photo_is_refused_with_the_turn_that_rights_it(reading, turn, words):
    with pytest.raises(DataError, match=f"give it {words}"):
        reading.photo(photo().transpose(turn))


def test_a_photo_that_says_how_it_was_held_is_turned(reading, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    file = tmp_path / "phone.png"
    photo().transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    assert reading.photo(file).image[0, :20].min() > 0.9


def test_photos_without_a_face_or_of_another_shape_are_refused(reading):
    with pytest.raises(DataError, match=r"no face or several.*crop it"):
        reading.photo(photo(top=100, bottom=100))
    with pytest.raises(DataError, match="100x50: crop it to a square"):
        reading.photo(photo().crop((0, 0, 100, 50)))


def test_a_detector_decides_where_there_is_one(tiny_config):
    def detect(count):
        rects = torch.tensor([[10.0, 10, 60, 60], [100, 10, 140, 50], [5, 5, 9, 9]])[:count]
        return lambda images: {"rects": rects, "points": torch.zeros(count, 5, 2)}

    image = torch.zeros(1, 3, 200, 200)
    assert len(one_face(detect(1))(image)["rects"]) == 1
    with pytest.raises(DataError, match="2 faces are found in this photo: crop"):
        one_face(detect(3))(image)  # the third is too small to count
    starts = Starts(tiny_config, lambda images: {"rects": torch.zeros(0, 4)})
    starts.__dict__["_parser"] = Reader()
    with pytest.raises(DataError, match="no face is found"):
        starts.photo(photo().crop((0, 0, 100, 50)))


# ------------------------------------------------------------------------------------------ worker


def test_the_newest_request_wins_and_the_running_one_is_told():
    worker = Worker()
    begun = threading.Event()
    done = []

    def patient(stop):
        begun.set()
        while not stop():
            time.sleep(0.01)
        raise Superseded

    worker.submit(patient)
    assert begun.wait(PATIENCE)
    for number in range(3):
        worker.submit(lambda stop, number=number: done.append(number))
    assert worker.join(PATIENCE)
    assert done[-1] == 2 and len(done) <= 2  # those between were never needed


def test_a_pause_ends_with_a_newer_request():
    worker = Worker()
    seconds = []

    def resting(stop):
        started = time.monotonic()
        if worker.pause(PATIENCE):
            seconds.append(time.monotonic() - started)

    worker.submit(resting)
    while worker.superseded():
        time.sleep(0.01)
    worker.submit(lambda stop: None)
    assert worker.join(PATIENCE) and len(seconds) == 1 and seconds[0] < PATIENCE / 2


def test_results_come_back_on_the_loop_of_the_notebook():
    import asyncio

    seen = []

    async def cell():
        here = on_this_loop()
        thread = threading.Thread(target=lambda: here(lambda: seen.append(threading.get_ident())))
        thread.start()
        thread.join()
        assert not seen  # the loop is busy with this cell
        await asyncio.sleep(0.05)

    asyncio.run(cell())
    assert seen == [threading.get_ident()]
    on_this_loop()(lambda: seen.append("at once"))
    assert seen[-1] == "at once"


# ------------------------------------------------------------------------------------------ widget


@pytest.fixture
def painter(tiny_config):
    config = tiny_config.replace(sampling={"steps": 3})
    painter = MaskPainter(config, live=False)
    painter._artist = Artist(config)
    painter._artist.__dict__["_pipe"] = tiny_pipe(config)
    return painter


def tiny_pipe(config):
    """The pipeline at random weights; the mask LoRA is that of a new training."""
    from ec2face_core.mask_branch import add_mask_lora
    from ec2face_core.pipeline import EC2FacePipeline

    pipe = EC2FacePipeline.from_config(config, None)
    add_mask_lora(pipe.transformer, config.lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sent(painter, message, *files):
    painter._receive(painter, message, list(files))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (np.zeros((64, 64), bool), "got bool: name the class"),
        (np.zeros((64, 64)), "got float64"),
        (np.zeros((32, 48), int), "the mask is 48x32, the painter's canvas 64x64"),
        (np.full((64, 64), 19), "label 19 above 18"),
        (np.full((64, 64, 3), 128, np.uint8), "another palette"),
        (np.zeros((64, 64, 4), np.uint8), "shape"),
        ([[0] * 64] * 64, "list is not a mask"),
    ],
)
def test_masks_that_are_none_are_refused_with_a_sentence(value, complaint):
    painter = MaskPainter(None)
    before = painter.mask
    with pytest.raises((DataError, FileNotFoundError), match=complaint):
        painter.mask = value
    assert np.array_equal(painter.mask, before)


def test_a_mask_may_be_ids_colours_an_image_or_a_file(tmp_path):
    ids = plain_faces(64, 1)[0]
    painter = MaskPainter(None)
    seen = []
    painter.observe(lambda change: seen.append(change["new"]), "mask")
    forms = [ids.astype(np.int64), torch.tensor(ids), np.array(PALETTE, np.uint8)[ids]]
    forms += [Image.fromarray(ids)]
    for form in forms:
        painter.mask = np.zeros((64, 64), int)
        painter.mask = form
        assert painter.mask.dtype == np.uint8 and np.array_equal(painter.mask, ids)
    painter.save(tmp_path / "mask.png")
    painter.mask = np.zeros((64, 64), int)
    painter.load(tmp_path / "mask.png")
    assert np.array_equal(painter.mask, ids) and len(seen) == 2 * len(forms) + 2
    with pytest.raises(ValueError, match="read-only"):
        painter.mask[0, 0] = 1  # nobody would see it


def test_the_wire_carries_bytes_both_ways():
    painter = MaskPainter(None)
    state = painter.get_state("mask")["mask"]
    assert state == painter.mask.tobytes()
    ids = plain_faces(64, 1)[0]
    painter.set_state({"mask": memoryview(ids.tobytes())})
    assert np.array_equal(painter.mask, ids)


def test_the_saved_file_is_a_palette_image_in_our_colours(tmp_path):
    ids = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % NUM_CLASSES
    file = tmp_path / "mask.png"
    file.write_bytes(mask_png(ids))
    image = open_header(file, "mask")
    assert image.mode == "P" and np.array_equal(image_ids(image), ids)
    colours = np.asarray(image.convert("RGB"))
    assert np.array_equal(colours, np.array(PALETTE, np.uint8)[ids])


def test_every_class_has_its_own_key_that_no_tool_has_and_its_opposite():
    source = (STATIC / "painter.js").read_text()
    tools = json.loads(
        source.split("const TOOLS = ")[1].split(";")[0].replace("{ ", '{"').replace(": ", '": ')
        .replace(", ", ', "')
    )  # fmt: skip
    assert len(set(KEYS) | set(tools.values()) | set("md")) == NUM_CLASSES + len(tools) + 2
    rows = MaskPainter(None)._classes
    swaps = {(row["id"], row["opposite"]) for row in rows if row["opposite"] != row["id"]}
    assert swaps == {pair for a, b in FLIP_PAIRS for pair in ((a, b), (b, a))}


def test_the_script_is_plain_and_short():
    source = (STATIC / "painter.js").read_text()
    assert source.count("\n") < 600 and "import" not in source and "http" not in source


def test_a_picture_is_drawn_read_compared_and_kept(painter):
    painter.mask = plain_faces(64, 1)[0]
    painter.caption = "A young woman."
    painter.seed = 7
    first = painter.draw()
    assert first.steps == 3 and first.image.shape == (3, 64, 64)
    notice = Image.open(io.BytesIO(painter.picture)).info["Disclaimer"]
    assert notice.startswith("Synthetic")
    assert painter.reading == first.reading.tobytes() and "3 steps" in painter.status
    present = set(np.unique(painter.mask))
    assert {row["id"] for row in painter.agreement} == present
    skin = next(row for row in painter.agreement if row["id"] == CLASS_ID["skin"])
    hit = (first.reading == 1) & (painter.mask == 1)
    assert skin["recall"] == pytest.approx(100 * hit.sum() / (painter.mask == 1).sum(), abs=0.06)

    again = painter.draw()
    assert torch.equal(first.image, again.image)
    painter.mask = MaskPainter(None).mask
    painter.caption = "An old man."
    painter.mask_scale = 5.0
    second = painter.draw()
    assert not torch.equal(first.image, second.image)
    assert [item["number"] for item in painter.strip] == [3, 2, 1]
    sent(painter, {"type": "restore", "number": 1})
    assert painter.caption == "A young woman." and painter.mask_scale == 2.0
    assert np.array_equal(painter.mask, first.mask) and painter.picture == first.png
    assert len(painter.strip) == 3 and painter.keep


def test_the_strip_forgets_the_oldest(painter, monkeypatch):
    drawing = painter.draw(1)
    for _ in range(STRIP + 3):
        painter._show(drawing)
    assert len(painter.strip) == STRIP == len(painter._drawings)
    sent(painter, {"type": "restore", "number": 1})
    assert "no longer kept" in painter.status


def test_live_requests_are_drawn_with_few_steps_first_and_the_newest_wins(painter, monkeypatch):
    monkeypatch.setattr("ec2face_lab.painter.widget.LIVE_STEPS", 1)
    monkeypatch.setattr("ec2face_lab.painter.widget.REST", 0.05)
    steps = []
    painter.observe(lambda change: steps.append(painter.drawing.steps), "reading")
    painter.request(live=True)
    assert painter.wait(PATIENCE) and not painter.busy
    assert painter.drawing.steps == 3 and len(painter.strip) == 1

    monkeypatch.setattr("ec2face_lab.painter.widget.REST", PATIENCE)
    for seed in (1, 2, 3):
        painter.seed = seed
        painter.request(live=True)
    painter.request()
    assert painter.wait(PATIENCE)
    assert painter.drawing.wish.seed == 3 and painter.drawing.steps == 3
    assert len(painter.strip) == 2  # what was superseded is not kept


def test_an_edit_keeps_the_rest_of_the_photo(painter):
    start = painter.starts.dataset(0)
    painter.start(start)
    painter.stamp("glasses")
    edited = painter.draw()
    assert edited.notice["Disclaimer"].startswith("Edited")
    painter.keep = False
    anew = painter.draw()
    corner = (slice(None), slice(0, 8), slice(0, 8))
    pipe = painter._artist._pipe
    copy = through_autoencoder(pipe.vae, start.image[None] * 2 - 1)[0].clamp(-1, 1) / 2 + 0.5
    images = (edited.image, anew.image)
    gaps = [float((image[corner] - copy[corner]).abs().mean()) for image in images]
    assert gaps[0] < 0.02 < gaps[1]
    sent(painter, {"type": "restore", "number": 1})
    assert painter.keep and painter._given is not None and painter.photo


def test_requests_of_the_browser_and_what_is_wrong_with_them(painter, tmp_path):
    sent(painter, {"type": "start", "kind": "dataset"})
    assert painter.wait(PATIENCE)
    assert painter.caption and painter.photo and not painter.busy
    before = painter.mask
    sent(painter, {"type": "stamp", "name": "hat"})
    assert (painter.mask == CLASS_ID["hat"]).any()
    file = tmp_path / "mask.png"
    file.write_bytes(mask_png(before))
    sent(painter, {"type": "open"}, memoryview(file.read_bytes()))
    assert np.array_equal(painter.mask, before)
    sent(painter, {"type": "open"}, b"<html>")
    assert "HTML" in painter.status and "/" not in painter.status
    sent(painter, {"type": "photo"}, b"")
    assert "the file is empty" in painter.status
    sent(painter, {"type": "save", "what": "picture"})
    assert "no picture yet" in painter.status
    assert np.array_equal(painter.mask, before)
    painter.caption = ""
    sent(painter, {"type": "start", "kind": "nearest"})
    assert painter.wait(PATIENCE) and "caption is empty" in painter.status


def test_the_weights_are_loaded_once_when_a_browser_shows_the_painter(painter, monkeypatch):
    loads = []
    monkeypatch.setattr(Artist, "load", lambda self: loads.append(1) or 2.4)
    for _ in range(2):  # two views of one painter
        sent(painter, {"type": "ready"})
        assert painter.wait(PATIENCE)
    assert loads == [1] and painter.status == "ready: loading took 2 s"
    paints_only = MaskPainter(None)
    sent(paints_only, {"type": "ready"})
    assert not paints_only.busy and not paints_only.status


def test_saving_sends_a_file_to_the_browser(painter, monkeypatch):
    out = []
    monkeypatch.setattr(MaskPainter, "send", lambda self, m, buffers=None: out.append((m, buffers)))
    sent(painter, {"type": "save", "what": "mask"})
    message, buffers = out[0]
    assert message == {"type": "file", "name": "mask.png"} and buffers == [mask_png(painter.mask)]


def test_a_painter_without_a_profile_only_paints():
    painter = MaskPainter(None, size=128)
    assert painter.mask.shape == (128, 128) and not painter._draws
    with pytest.raises(UserError, match="only paints"):
        painter.draw()
    with pytest.raises(ValueError, match="start 'moon' does not exist; known: empty"):
        painter.start("moon")


def test_weights_that_are_missing_become_a_sentence(tiny_config, tmp_path):
    untrained = tiny_config.replace(profile=str(tmp_path / "run"), adapters=str(tmp_path / "no"))
    painter = MaskPainter(untrained, live=False)
    with pytest.raises((ConfigError, FileNotFoundError)):
        painter.draw()
    painter.request()
    assert painter.wait(PATIENCE)
    assert painter.status and not painter.busy and "Traceback" not in painter.status


def test_every_start_has_a_name_in_the_browser():
    source = (STATIC / "painter.js").read_text()
    names = source.split("const STARTS = {")[1].split("};")[0]
    assert [line.split(":")[0].strip() for line in names.strip().splitlines()] == list(STARTS)


def test_a_wish_says_what_it_is():
    text = str(Wish(np.zeros((1, 1), np.uint8), "A man.", 3, 2.0, 1.5))
    assert text == "A man.; seed 3, text 2, mask 1.5, strength 1"
