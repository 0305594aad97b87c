"""Editing through masks: what is kept lies on the picture's own path, what changed is sampled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import pipeline_with_lora
from PIL import Image

from ec2face_core.backbone import decode_latents, encode_images, pack, unpack
from ec2face_core.data import FaceDataset
from ec2face_core.inference.inputs import draw_noise
from ec2face_core.io.report import DataError
from ec2face_lab.painter.edits import changed_pixels, edit, keep_outside, read_pictures


@pytest.fixture(scope="module")
def pipe(tiny_config):
    return pipeline_with_lora(tiny_config)


@pytest.fixture(scope="module")
def face(tiny_faces):
    return FaceDataset(tiny_faces, "test")[0]


def with_hat(label_map):
    new = label_map.clone()
    new[:12, 20:44] = 14
    return new


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_changed_pixels_are_the_difference_and_a_margin():
    mask = torch.zeros(1, 64, 64).long()
    new = mask.clone()
    new[0, 30, 40] = 3
    for margin, expected in ((0, 1), (1, 9), (None, 25), (5, 121)):
        changed = changed_pixels(mask, new, margin)
        assert changed.dtype == torch.bool and int(changed.sum()) == expected
        assert changed[0, 30, 40]
    assert not changed_pixels(mask, mask).any()
    new[0, 0, 0] = 1
    assert int(changed_pixels(mask, new, 1).sum()) == 9 + 4  # cut off at the corner


def test_what_is_no_pair_of_masks_is_refused():
    mask = torch.zeros(1, 64, 64).long()
    with pytest.raises(ValueError, match="mask"):
        changed_pixels(mask, mask[:, :32])
    with pytest.raises(TypeError):
        changed_pixels(mask.float(), mask)
    with pytest.raises(ValueError, match="margin"):
        changed_pixels(mask, mask, -1)


def test_an_unchanged_mask_gives_the_round_trip(pipe, face):
    image = face.image[None] / 2 + 0.5
    kept = edit(
        pipe, image, face.label_map, face.label_map, "A man.", generator=seeded(),
        num_inference_steps=2, output_type="pt",
    ).images  # fmt: skip
    copy = decode_latents(pipe.vae, encode_images(pipe.vae, face.image[None]))
    assert torch.allclose(kept, (copy / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_a_mask_that_changes_everywhere_gives_the_ordinary_picture(pipe, face):
    new = (face.label_map + 1) % 19
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    image = face.image[None] / 2 + 0.5
    edited = edit(pipe, image, face.label_map, new, "A man.", generator=seeded(), **settings).images
    anew = pipe("A man.", new, generator=seeded(), **settings).images
    assert torch.allclose(edited, anew, atol=1e-5)


def test_kept_latents_follow_the_path_between_picture_and_noise(pipe, face):
    new = with_hat(face.label_map)
    z = encode_images(pipe.vae, face.image[None])
    factor = face.image.shape[-1] // z.shape[-1]
    changed = changed_pixels(face.label_map[None], new[None])
    sampled = torch.nn.functional.max_pool2d(changed[:, None].float(), factor).bool()
    noise = draw_noise(tuple(z.shape), seeded(), torch.device("cpu"))
    seen = []

    def look(pipe, step, time, values):
        latents = unpack(values["latents"], *z.shape[-2:])
        seen.append((float(pipe.scheduler.sigmas[step + 1]), latents.clone()))

    edit(
        pipe, face.image[None] / 2 + 0.5, face.label_map, new, generator=seeded(),
        num_inference_steps=3, callback_on_step_end=look,
    )  # fmt: skip
    assert [round(t, 3) for t, _ in seen][-1] == 0.0 and len(seen) == 3
    for t, latents in seen:
        path = (1 - t) * z + t * noise
        where = sampled.expand_as(z)
        assert torch.allclose(latents[~where], path[~where], atol=1e-5)
        assert not torch.allclose(latents[where], path[where], atol=1e-2)


def test_pictures_of_a_batch_do_not_depend_on_each_other(pipe, tiny_faces):
    faces = FaceDataset(tiny_faces, "test")
    images = torch.stack([faces[i].image for i in range(2)]) / 2 + 0.5
    masks = torch.stack([faces[i].label_map for i in range(2)])
    new = torch.stack([with_hat(m) for m in masks])
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    both = edit(
        pipe, images, masks, new, ["a", "b"], generator=[seeded(1), seeded(2)], **settings
    ).images
    for i, prompt in enumerate("ab"):
        one = edit(pipe, images[i], masks[i], new[i], prompt, generator=seeded(i + 1), **settings)
        assert torch.allclose(both[i], one.images[0], atol=1e-4)


def test_a_callback_may_replace_the_latents_of_an_ordinary_picture(pipe, face):
    z = encode_images(pipe.vae, face.image[None])
    steps = []

    def replace(pipe, step, time, values):
        steps.append((step, float(time)))
        return {"latents": pack(z)}

    image = pipe(mask=face.label_map, generator=seeded(), num_inference_steps=2, output_type="pt",
                 callback_on_step_end=replace).images  # fmt: skip
    assert [step for step, _ in steps] == [0, 1] and steps[0][1] > steps[1][1] > 0
    copy = decode_latents(pipe.vae, z) / 2 + 0.5
    assert torch.allclose(image, copy.clamp(0, 1), atol=1e-5)


def test_pictures_are_read_from_files_images_and_tensors(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    expected = torch.tensor(pixels).permute(2, 0, 1)[None] / 255
    for form in (image, tmp_path / "a.png", str(tmp_path / "a.png"), expected, expected[0]):
        assert torch.equal(read_pictures(form), expected)
    assert read_pictures([image, image]).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="one size"):
        read_pictures([image, image.resize((8, 8))])
    with pytest.raises(ValueError, match="shape"):
        read_pictures(torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match=r"image must lie in \[0, 1\]"):
        read_pictures(expected * 2 - 1)
    (tmp_path / "b.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="HTML"):
        read_pictures(tmp_path / "b.png")


def test_arrays_are_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3), np.uint8)
    expected = torch.tensor(pixels).permute(2, 0, 1)[None] / 255
    floats = pixels / 255
    for form in (
        pixels, pixels[::-1][::-1], floats, floats.astype(np.float32), pixels[None], [pixels],
        (floats,), expected[0].numpy().transpose(1, 2, 0), np.asfortranarray(pixels),
    ):  # fmt: skip
        assert torch.allclose(read_pictures(form), expected, atol=1e-6)
        assert read_pictures(form).dtype == torch.float32
    mixed = [pixels, Image.fromarray(pixels), expected, expected[0]]
    assert torch.allclose(read_pictures(mixed), expected.expand(4, -1, -1, -1))
    assert read_pictures(np.stack([pixels] * 3)).shape == (3, 3, 16, 8)
    assert (pixels / 255 == floats).all()  # untouched


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_open_image_is_turned_as_its_file_is(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3), np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif)
    from_file = read_pictures(path)
    with Image.open(path) as image:
        assert torch.equal(read_pictures(image), from_file)
        assert torch.equal(read_pictures([image, image])[1:], from_file)
    assert from_file.shape[-2:] == ((8, 16) if orientation > 5 else (16, 8))


@pytest.mark.parametrize(
    ("image", "kind", "reason"),
    [
        (None, TypeError, "image: expected PIL images, paths, tensors or arrays, got NoneType"),
        (3, TypeError, "got int"),
        (b"x.png", TypeError, "got bytes"),
        ({"a": 1}, TypeError, "got dict"),
        ([None], TypeError, "got NoneType"),
        ([], ValueError, "image is an empty list"),
        (np.zeros((16, 16, 3), np.int64), TypeError, "array of int64; give uint8"),
        (np.zeros((16, 16, 3), bool), TypeError, "array of bool"),
        (np.zeros((16, 16), np.uint8), ValueError, r"array of shape \(16, 16\), expected h w 3"),
        (np.zeros((16, 16, 4), np.uint8), ValueError, "expected h w 3"),
        (np.zeros((3, 16, 16), np.uint8), ValueError, "expected h w 3"),
        (np.zeros((0, 16, 3), np.uint8), ValueError, "is empty"),
        (np.full((16, 16, 3), 255.0), ValueError, r"image must lie in \[0, 1\]"),
        (np.full((16, 16, 3), np.nan), ValueError, r"image must lie in \[0, 1\]"),
        ("gone.png", FileNotFoundError, r"image .*gone\.png does not exist"),
        ("/", ValueError, "image /: unreadable image"),
        ("~nobody-of-this-name/x.png", FileNotFoundError, "image: ~nobody-of-this-name/x.png"),
        ("a" * 5000, FileNotFoundError, "File name too long"),
        (["gone.png"], FileNotFoundError, "does not exist"),
        (Image.new("F", (16, 16)), ValueError, "image: 32-bit pixels"),
        (Image.new("RGB", (0, 0)), ValueError, "is empty"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(image, kind, reason):
    with pytest.raises(kind, match=reason) as caught:
        read_pictures(image)
    assert len(str(caught.value)) < 300


def test_a_large_margin_reaches_the_whole_picture():
    mask = torch.zeros(1, 48, 64).long()
    new = mask.clone()
    new[0, 3, 5] = 1
    for margin in (64, 1000, 10**9, 10**30, np.int64(64)):
        assert changed_pixels(mask, new, margin).all()
        assert not changed_pixels(mask, mask, margin).any()


@pytest.mark.parametrize("name", ["height", "width", "latents"])
def test_settings_of_an_edit_itself_are_refused(pipe, face, name):
    image = face.image[None] / 2 + 0.5
    with pytest.raises(TypeError, match=f"{name}: an edit takes the size from") as caught:
        edit(pipe, image, face.label_map, face.label_map, **{name: 128})
    assert len(str(caught.value)) < 200


def test_numbers_and_sizes_that_do_not_fit_are_refused(pipe, face):
    image = face.image[None] / 2 + 0.5
    with pytest.raises(ValueError, match="1 pictures, 2 masks and 1 new masks"):
        edit(pipe, image, [face.label_map] * 2, face.label_map)
    with pytest.raises(ValueError, match="needs the mask of every picture"):
        edit(pipe, image, None, face.label_map)
    with pytest.raises(ValueError, match="multiples"):
        edit(pipe, image[..., :62], face.label_map[:, :62], face.label_map[:, :62])


def test_a_kept_cell_needs_all_of_its_pixels():
    z = torch.zeros(1, 4, 4, 4)
    noise = torch.ones_like(z)
    changed = torch.zeros(1, 16, 16).bool()
    changed[0, 3, 3] = True  # the last pixel of the first cell

    class Scheduler:
        sigmas = torch.tensor([1.0, 0.25, 0.0])

    class Pipe:
        scheduler = Scheduler()

    step_end = keep_outside(z, noise, changed)
    values = step_end(Pipe(), 0, None, {"latents": pack(torch.full_like(z, 7.0))})
    latents = unpack(values["latents"], 4, 4)
    assert (latents[0, :, 0, 0] == 7).all() and (latents == 7).sum() == 4
    assert latents[0, 0, 0, 1] == 0.25
