"""Nonsense is refused with a sentence: settings, arguments of the formulas, of the pipeline."""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest
import torch

from ec2face_core import attributes, losses
from ec2face_core.command_line import parse_override
from ec2face_core.config import Config, ConfigError, LossConfig, load_config, load_profile
from ec2face_core.flow import interpolate, reverse_estimate, target_velocity
from ec2face_core.guards.checks import check_labels, check_number, check_texts, number
from ec2face_core.metrics import accuracy_from_counts, mask_accuracy, psnr

B, SIDE = 2, 8
NAN = float("nan")


@pytest.fixture
def labels():
    return torch.randint(0, 19, (B, SIDE, SIDE), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def probabilities():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 19, SIDE, SIDE, generator=generator).softmax(1)


# ----------------------------------------------------------------------------------------- formulas


def test_masks_as_files_give_them_are_right(labels, probabilities):
    """uint8 labels, which every mask file gives, mean what int64 labels mean."""
    for kind in (torch.uint8, torch.int32, torch.int16):
        few = labels.to(kind)
        assert torch.equal(attributes.palette_image(few), attributes.palette_image(labels))
        assert torch.equal(attributes.flip_labels(few), attributes.flip_labels(labels))
        assert torch.equal(attributes.one_hot(few), attributes.one_hot(labels))
        counts = attributes.pixel_counts(labels).sum(0)
        expected = losses.long_tail_weights(labels, counts)
        assert torch.equal(losses.long_tail_weights(few, counts), expected)
        expected = losses.mask_consistency_loss(probabilities, labels)
        assert torch.equal(losses.mask_consistency_loss(probabilities, few), expected)


@pytest.mark.parametrize("wrong", [-1, 19, 255])
def test_a_label_out_of_range_is_refused_everywhere(labels, probabilities, wrong):
    labels[0, 0, 0] = wrong
    counts = torch.ones(19).long()
    for call in (
        lambda: attributes.palette_image(labels),
        lambda: attributes.flip_labels(labels),
        lambda: attributes.one_hot(labels),
        lambda: attributes.pixel_counts(labels),
        lambda: losses.long_tail_weights(labels, counts),
        lambda: losses.latent_weights(labels, counts, 4, LossConfig()),
        lambda: losses.mask_consistency_loss(probabilities, labels),
        lambda: mask_accuracy(labels, labels),
    ):
        with pytest.raises(ValueError, match="ids must be 0-18"):
            call()


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.complex64])
def test_labels_are_integers(labels, kind):
    with pytest.raises(TypeError, match="integers"):
        attributes.palette_image(labels.to(kind))
    with pytest.raises(ValueError, match="no pixel"):
        check_labels(labels[:0], 19)
    with pytest.raises(TypeError, match="ndarray"):
        check_labels(labels.numpy(), 19)


def test_losses_do_not_broadcast(labels, probabilities):
    x = torch.randn(B, 4, SIDE, SIDE)
    one_text = torch.nn.functional.normalize(torch.randn(1, 8), dim=-1)
    with pytest.raises(ValueError, match="shapes differ"):  # one text and three images
        losses.text_consistency_loss(one_text.expand(3, 8), one_text)
    with pytest.raises(ValueError, match="shapes differ"):
        losses.text_consistency_loss(torch.randn(3, 4), torch.randn(3, 1))
    with pytest.raises(ValueError, match=r"weights .* does not fit"):
        losses.flow_matching_loss(x, x, torch.ones(3 * B, SIDE, SIDE)[:, None])
    with pytest.raises(ValueError, match="shapes differ"):
        losses.flow_matching_loss(x, x[:1])
    with pytest.raises(ValueError, match="with b = 2"):
        losses.mask_consistency_loss(probabilities, labels[:1])
    with pytest.raises(ValueError, match=r"\(2,\): one for each sample"):
        losses.total_loss(torch.ones(B), None, None, torch.full((B, 1), 0.5), LossConfig())
    with pytest.raises(ValueError, match=r"text has shape \(1,\)"):
        losses.total_loss(torch.ones(B), torch.ones(1), None, torch.ones(B), LossConfig())
    with pytest.raises(TypeError, match="bool"):
        keep = torch.ones(B)
        losses.total_loss(torch.ones(B), torch.ones(B), None, torch.ones(B), LossConfig(), keep)


def test_losses_know_their_ranges(labels, probabilities):
    for logits in (100 * probabilities, probabilities - 2):
        with pytest.raises(ValueError, match=r"probabilities must lie in"):
            losses.mask_consistency_loss(logits, labels)
    for balance in (3, -0.1, NAN):
        with pytest.raises(ValueError, match="balance must be finite and in"):
            losses.mask_consistency_loss(probabilities, labels, balance)
    with pytest.raises(ValueError, match="smoothing must be finite"):
        losses.mask_consistency_loss(probabilities, labels, smoothing=math.inf)
    with pytest.raises(ValueError, match="b 19 h w"):
        losses.mask_consistency_loss(probabilities[:, :18], labels)
    for p in (NAN, 1000, -0.1):
        with pytest.raises(ValueError, match="p must be finite and in"):
            losses.drop_conditions(4, p)
    with pytest.raises(ValueError, match="counts"):
        losses.class_weights(torch.ones(25))
    for counts in (torch.zeros(19), -torch.ones(19), torch.full((19,), NAN)):
        with pytest.raises(ValueError, match="counts must be pixels"):
            losses.class_weights(counts)
    for side in (0, -1, SIDE + 1):
        with pytest.raises(ValueError, match="latent_size"):
            losses.latent_weights(labels, torch.ones(19), side, LossConfig())
    with pytest.raises(TypeError, match="real numbers"):
        losses.beta(torch.tensor([500, 900]))
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        losses.beta(torch.tensor([500.0]))
    # a diverged guide gives NaN, which the trainer reports by its step
    assert losses.mask_consistency_loss(probabilities * NAN, labels).isnan().all()


def test_flow_knows_its_times_and_shapes():
    x = torch.randn(B, 4, SIDE, SIDE)
    t = torch.rand(B)
    with pytest.raises(TypeError, match="int64"):  # the timesteps of diffusers
        interpolate(x, x, torch.tensor([0, 999]))
    for wrong in (torch.tensor([0.5, 1.5]), torch.tensor([-0.1, 0.5]), torch.tensor([0.5, NAN])):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            reverse_estimate(x, x, wrong)
    for wrong in (t[:1], t[:, None], torch.rand(())):
        with pytest.raises(ValueError, match="one for each sample"):
            interpolate(x, x, wrong)
    with pytest.raises(ValueError, match="shapes differ"):
        target_velocity(x, x[:, :1])
    with pytest.raises(TypeError, match="int64"):
        interpolate(x.long(), x, t)


def test_metrics_know_their_counts(labels):
    ones = torch.ones(2, 19).long()
    with pytest.raises(ValueError, match="negative"):
        accuracy_from_counts(-ones, ones)
    with pytest.raises(ValueError, match="correct than were predicted"):
        accuracy_from_counts(ones, ones, 0 * ones)
    with pytest.raises(TypeError, match="integers"):
        accuracy_from_counts(ones.float(), ones)
    with pytest.raises(ValueError, match="differ"):
        mask_accuracy(labels.reshape(B, 4, 16), labels.reshape(B, 16, 4))
    with pytest.raises(ValueError, match="shapes differ"):  # one reference for two
        psnr(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8))


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("trainer.drop_probability", [NAN, 1000, -0.1]),
        ("trainer.steps", [0, -1, 10**10, 2.5, "4", True, None]),
        ("trainer.batch_size", [0, -1, 10**9]),
        ("trainer.accumulation", [10**9]),
        ("trainer.checkpoint_every", [0]),
        ("trainer.learning_rate", [NAN, -1, 0, math.inf, int("9" * 400), "٣.٥", "1_000"]),
        ("trainer.max_grad_norm", [-1, NAN]),
        ("trainer.mixed_precision", ["x"]),
        ("loss.clip", [NAN, -5, math.inf, 1e-30]),
        ("loss.balance", [1000, -1]),
        ("loss.smoothing", [math.inf, -math.inf, 0]),
        ("loss.alpha_text", [-1, NAN]),
        ("loss.alpha_mask", [-1]),
        ("loss.importance_sampling", [-1]),
        ("loss.center", [NAN, math.inf]),
        ("lora.rank", [0, -4]),
        ("perception.parser_size", [0]),
        ("backbone.dtype", ["x", "int8"]),
        ("sampling.guidance", [NAN, math.inf, -1]),
        ("sampling.text_guidance", [NAN, -math.inf]),
        ("sampling.mask_guidance", [NAN]),
        ("evaluation.limit", [-3]),
        ("evaluation.bootstrap", [0, -1]),
        ("data.size", [0, 8, 10**7]),
        ("data.train", [0, -5]),
        ("data.cache", [5, None]),
        ("data.root", ["", " ", "a ", "a\0b", "a\nb", "a\x1b[0m", "\udcff", 5, None, ["a"]]),
        ("data.cache", ["a\nb", "\0"]),
        (
            "profile",
            [
                "",
                "../../elsewhere",
                "mini/../../x",
                5,
                "a\0b",
                ".",
                "./",
                "./.",
                "/",
                "//",
                "~",
                "~/x",
                "~root/x",
                " ",
                "mini ",
            ],
        ),
        ("seed", [-1, 2**64]),
    ],
)
def test_a_setting_that_means_nothing_is_refused_where_it_is_set(key, values):
    for value in values:
        with pytest.raises(ConfigError, match=key.rpartition(".")[2]) as refusal:
            load_profile("smoke", **{key: value})
        assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        b"trainer: [5\nloss: }", b"\x00", b"\xff\xfe\xff", b"a: b: c", b"- 5", b"5",
        b"!!python/x 1",
        b"!!python/object/apply:os.system [ls]", b"a: 2020-99-99", b"? [a]\n: b", b"%", b"&a *a",
        b"[" * 3000, b"trainer: *nobody", b'"', b"\t- a",
    ],
)  # fmt: skip
def test_a_file_that_does_not_parse_is_one_line(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    "text", ["seed=[", "seed=!!python/object/apply:os.getcwd []", "seed=%", "x"]
)
def test_an_override_that_does_not_parse_is_one_line(text):
    with pytest.raises(ConfigError, match="--set") as refusal:
        load_profile("smoke", **parse_override(text))
    assert "\n" not in str(refusal.value)


def test_an_alias_bomb_is_a_short_line(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for name, before in zip("bcdefg", "abcdef", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    path = tmp_path / "config.yaml"
    path.write_text("\n".join([*lines, "trainer: *g"]))
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    path.write_text("\n".join([*lines, "seed: *g"]).replace("a: &a", "trainer: {}\nx: &a"))
    with pytest.raises(ConfigError) as second:
        load_config(path)
    assert len(str(refusal.value)) < 1000 and len(str(second.value)) < 1000


def test_numbers_of_command_lines_have_bounds():
    parse = number(0, 10)
    assert parse("7") == 7 and number(0, whole=False)("2.5") == 2.5
    for text in ("-3", "11", "x", "2.5", "nan", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=r"of at least 0 and at most 10"):
            parse(text)
    with pytest.raises(argparse.ArgumentTypeError):
        number(0, whole=False)("nan")


def test_numbers_and_texts():
    check_number(np.float32(0.5), "x", 0, 1)
    check_number(np.int64(3), "x", whole=True)
    for wrong in (True, "1", None, 1j, [1]):
        with pytest.raises(TypeError, match="x: expected a number"):
            check_number(wrong, "x")
    with pytest.raises(ValueError, match="x must be finite"):
        check_number(10**400, "x")
    with pytest.raises(TypeError, match="whole"):
        check_number(2.0, "x", whole=True)
    assert check_texts("a") == ["a"] and check_texts(("a", "")) == ["a", ""]
    for wrong in ([1, 2], 5, None, b"a", ["a", None]):
        with pytest.raises(TypeError, match="prompt"):
            check_texts(wrong)
    with pytest.raises(ValueError, match="empty list"):
        check_texts([])


def test_the_place_of_the_cache_is_a_setting_and_no_part_of_the_digest(tmp_path):
    from ec2face_core.latents import cache_folder

    config = load_profile("mini")
    assert cache_folder(config).name.endswith("-latents")
    moved = config.replace(data={"cache": str(tmp_path)})
    assert cache_folder(moved) == tmp_path
    assert Config().data.cache == "" and moved.digest() != config.digest()


# ----------------------------------------------------------------------------------------- pipeline


@pytest.fixture(scope="module")
def pipe(tiny_config):
    from ec2face_core.pipeline import EC2FacePipeline

    return EC2FacePipeline.from_config(tiny_config, variant=None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *(({name: value}, ValueError, "must be finite")
          for name in ("guidance_scale", "text_guidance", "mask_guidance")
          for value in (NAN, math.inf, -math.inf, -3)),
        ({"guidance_scale": 1j}, TypeError, "expected a number"),
        ({"guidance_scale": "3"}, TypeError, "expected a number"),
        ({"mask_strength": -1}, ValueError, "mask_strength"),
        ({"num_inference_steps": 2.0}, TypeError, "num_inference_steps: expected a whole"),
        ({"num_inference_steps": "64"}, TypeError, "num_inference_steps: expected a whole"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
        ({"num_images_per_prompt": -1}, ValueError, "num_images_per_prompt"),
        ({"num_images_per_prompt": 1.5}, TypeError, "num_images_per_prompt"),
        ({"height": 0}, ValueError, "height"),
        ({"width": 64.0}, TypeError, "width"),
        ({"generator": 1}, TypeError, "generator"),
        ({"prompt": [1, 2]}, TypeError, "prompt"),
        ({"prompt": []}, ValueError, "prompt"),
        ({"latents": torch.full((1, 16, 16, 16), NAN)}, ValueError, "latents must be finite"),
        ({"latents": torch.ones(1, 16, 16, 16).long()}, TypeError, "latents"),
    ],
)  # fmt: skip
def test_the_pipeline_refuses_nonsense(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(**({"prompt": "She smiles.", "num_inference_steps": 1} | arguments))


def test_a_picture_that_is_not_finite_is_never_returned(pipe, monkeypatch):
    from ec2face_core import pipeline
    from ec2face_core.guards.checks import NotFiniteError

    decode = pipeline.decode_latents
    monkeypatch.setattr(pipeline, "decode_latents", lambda vae, z: decode(vae, z) * NAN)
    with pytest.raises(NotFiniteError, match="not finite"):
        pipe("She smiles.", num_inference_steps=1)
