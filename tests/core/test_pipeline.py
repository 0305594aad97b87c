"""EC2FacePipeline: FluxPipeline's sampler, three modes, every form of mask, save and load."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ec2face_core.attributes import PALETTE, palette_image
from ec2face_core.config import ConfigError, LoraConfig, load_profile
from ec2face_core.io.lora_file import save_mask_lora
from ec2face_core.mask_branch import add_mask_lora
from ec2face_core.pipeline import EC2FacePipeline
from ec2face_lab.world.networks import save_backbone, tiny_backbone

LORA = LoraConfig(rank=4, alpha=8.0)
CORPUS = ["she has wavy hair.", "a man with a hat and glasses."]
FAST = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone(CORPUS)


@pytest.fixture(scope="module")
def pipe(backbone) -> EC2FacePipeline:
    import copy

    transformer = copy.deepcopy(backbone.transformer)
    torch.manual_seed(0)
    for p in add_mask_lora(transformer, LORA):
        nn.init.normal_(p, std=0.2)
    parts = {**backbone.components(), "transformer": transformer}
    pipe = EC2FacePipeline(**parts, text_length=24, image_size=32, guidance=1.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def label_map() -> torch.Tensor:
    """Every class, in blocks of 4 x 4 pixels."""
    blocks = torch.arange(64).reshape(8, 8) % 19
    return blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, *args, seed=1, **kwargs) -> torch.Tensor:
    return pipe(*args, generator=seeded(seed)[0], **{**FAST, **kwargs}).images


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the last bits, which depend on how loaded weights lie in memory."""
    return torch.allclose(a, b, atol=1e-6, rtol=0)


def test_text_only_is_flux_pipeline(backbone, pipe):
    """Same noise, same text, no mask: FluxPipeline's own picture, though the LoRA is installed."""
    from diffusers import FluxPipeline

    flux = FluxPipeline(**backbone.components())
    flux.set_progress_bar_config(disable=True)
    expected = flux(
        CORPUS[0], height=32, width=48, num_inference_steps=5, guidance_scale=2.0,
        max_sequence_length=24, generator=seeded(3)[0], output_type="pt",
    ).images  # fmt: skip
    images = draw(
        pipe, CORPUS[0], seed=3, height=32, width=48, num_inference_steps=5, guidance_scale=2.0
    )
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)


def test_text_guidance_is_flux_pipeline_s_true_guidance(backbone, pipe):
    from diffusers import FluxPipeline

    flux = FluxPipeline(**backbone.components())
    flux.set_progress_bar_config(disable=True)
    expected = flux(
        CORPUS[0], negative_prompt="", true_cfg_scale=2.5, height=32, width=32,
        num_inference_steps=3, guidance_scale=1.0, max_sequence_length=24,
        generator=seeded(3)[0], output_type="pt",
    ).images  # fmt: skip
    images = draw(pipe, CORPUS[0], seed=3, num_inference_steps=3, text_guidance=2.5)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("s_t, s_m", [(1.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 0.5)])
def test_guidance_towards_both_conditions(pipe, label_map, s_t, s_m):
    """Each of the three velocities by itself, then the sum as it stands in the docstring."""
    from ec2face_core.backbone import encode_text
    from ec2face_core.mask_branch import guided_velocity, mask_latents_of, predict_velocity

    z, t = torch.randn(2, 8, 8, 8, generator=seeded(0)[0]), torch.tensor([0.3, 0.8])
    text, null = encode_text(pipe, CORPUS, 24), encode_text(pipe, ["", ""], 24)
    mask, keep = mask_latents_of(pipe.vae, label_map.expand(2, -1, -1)), torch.tensor([True, False])
    with torch.no_grad():
        v_0 = predict_velocity(pipe.transformer, z, t, null)
        v_text = predict_velocity(pipe.transformer, z, t, text)
        v_both = predict_velocity(pipe.transformer, z, t, text, mask, keep)
        v = guided_velocity(pipe.transformer, z, t, text, null, mask, keep, 1.0, s_t, s_m)
    expected = v_0 + s_t * (v_text - v_0) + s_m * (v_both - v_text)
    torch.testing.assert_close(v, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(v[1], (v_0 + s_t * (v_text - v_0))[1], atol=2e-5, rtol=1e-4)


def test_three_modes_differ_and_are_deterministic(pipe, label_map):
    modes = [
        {"prompt": CORPUS[0], "mask": label_map},
        {"prompt": CORPUS[0]},
        {"mask": label_map},
        {},
    ]
    images = [draw(pipe, **mode) for mode in modes]
    for mode, image in zip(modes, images, strict=True):
        assert image.shape == (1, 3, 32, 32) and image.min() >= 0 and image.max() <= 1
        assert torch.equal(draw(pipe, **mode), image)
    for i in range(4):
        assert all((images[i] - images[j]).abs().max() > 1e-4 for j in range(i))
    assert not torch.equal(draw(pipe, **modes[0], seed=2), images[0])


def test_a_picture_does_not_depend_on_its_batch(pipe, label_map):
    prompts, masks = [CORPUS[0], CORPUS[1], ""], [label_map, None, label_map.flip(0)]
    batch = pipe(prompts, masks, generator=seeded(1, 2, 3), **FAST).images
    for i in range(3):
        alone = draw(pipe, prompts[i], masks[i], seed=i + 1)
        torch.testing.assert_close(batch[i : i + 1], alone, atol=2e-5, rtol=0)


def test_one_generator_gives_the_same_pictures_in_any_grouping(pipe, label_map):
    g = seeded(7)[0]
    together = pipe([CORPUS[0]] * 3, label_map, generator=seeded(7)[0], **FAST).images
    apart = [pipe([CORPUS[0]] * n, label_map, generator=g, **FAST).images for n in (1, 2)]
    torch.testing.assert_close(torch.cat(apart), together, atol=2e-5, rtol=0)


def test_prompts_masks_and_images_per_prompt_pair_up(pipe, label_map):
    one = draw(pipe, CORPUS[1], torch.stack([label_map, label_map.T]), num_images_per_prompt=2)
    assert one.shape[0] == 4
    g = seeded(1)[0]
    apart = [
        pipe(CORPUS[1], m, generator=g, num_images_per_prompt=2, **FAST).images
        for m in (label_map, label_map.T)
    ]
    torch.testing.assert_close(one, torch.cat(apart), atol=2e-5, rtol=0)


def test_mask_forms_agree(pipe, label_map, tmp_path):
    ids = label_map.numpy().astype(np.uint8)
    palette = Image.fromarray(ids, mode="P")
    palette.putpalette(np.array(PALETTE, dtype=np.uint8).ravel().tolist())
    colours = ((palette_image(label_map[None])[0] + 1) * 127.5).round().byte()
    rgb = Image.fromarray(colours.permute(1, 2, 0).numpy())
    palette.save(tmp_path / "palette.png")
    Image.fromarray(ids).save(tmp_path / "ids.png")
    rgb.save(tmp_path / "rgb.png")
    doubled = label_map.repeat_interleave(2, 0).repeat_interleave(2, 1)
    expected = draw(pipe, mask=label_map)
    forms = [
        label_map[None], label_map.int(), ids, ids.astype(np.int64), palette, rgb, doubled, [ids],
        tmp_path / "palette.png", str(tmp_path / "ids.png"), [tmp_path / "rgb.png"],
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(draw(pipe, mask=form), expected)


def test_masks_of_other_programs_agree(pipe, label_map, tmp_path):
    """Our colours in another order, 16 bits, three equal channels, an open image: one picture."""
    ids = label_map.numpy().astype(np.uint8)
    order = np.random.default_rng(0).permutation(19)
    shuffled = Image.fromarray(np.argsort(order)[ids].astype(np.uint8))
    shuffled.putpalette(np.array(PALETTE, np.uint8)[order].ravel().tolist())
    shuffled.save(tmp_path / "shuffled.png")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "deep.png")
    forms = [
        tmp_path / "shuffled.png", shuffled, tmp_path / "deep.png", ids.astype(">u2"),
        np.dstack([ids] * 3), ids[::-1, ::-1][::-1, ::-1], ids[..., None],
        np.array(PALETTE, np.uint8)[ids],
    ]  # fmt: skip
    expected = draw(pipe, mask=label_map)
    for form in forms:
        assert torch.equal(draw(pipe, mask=form), expected)


def test_masks_that_would_mislead_are_refused(pipe, label_map, tmp_path):
    ids = label_map.numpy().astype(np.uint8)
    Image.fromarray(ids).save(tmp_path / "m.jpg")
    with pytest.raises(ValueError, match=r"m\.jpg: mask is JPEG: its loss changes ids"):
        pipe(mask=tmp_path / "m.jpg")
    for mask, shown in ((ids[:1], "32x1"), (ids[:, :16], "16x32"), (ids[:24], "32x24")):
        with pytest.raises(ValueError, match=f"a mask of {shown} would be stretched"):
            pipe(mask=mask)
    with pytest.raises(ValueError, match="one channel per class"):
        pipe(mask=torch.nn.functional.one_hot(label_map, 19).permute(2, 0, 1))
    with pytest.raises(ValueError, match="transparent"):
        pipe(mask=Image.new("RGBA", (32, 32), (0, 0, 0, 0)))
    with pytest.raises(ValueError, match="got bool"):
        pipe(mask=label_map > 3)
    with pytest.raises(ValueError, match="empty list"):
        pipe(mask=np.zeros((0, 32, 32), np.uint8))


def test_prompts_are_read_as_captions_are(pipe):
    import unicodedata

    expected = draw(pipe, "Café, she has wavy hair.")
    other = unicodedata.normalize("NFD", "\ufeffCafé,\u2028she has wavy hair.\r\n")
    assert torch.equal(draw(pipe, other), expected)
    with pytest.raises(ValueError, match="control character"):
        pipe("a\0b")


def test_words_that_are_cut_are_told(pipe):
    from ec2face_core.io.texts import LostWordsWarning

    long = "she has wavy hair. " * 9 + "she wears a red hat."
    with pytest.warns(LostWordsWarning, match=r"1 of 2 texts are longer than T5 .*red hat") as told:
        long_images = pipe([long, CORPUS[0]], generator=seeded(1, 2), **FAST).images
    assert len(told) == 1 and told[0].filename == __file__
    with pytest.warns(LostWordsWarning, match="CLIP"):
        pipe(long * 3, prompt_2="a red hat.", **FAST)  # T5 reads this one, CLIP the long one
    with pytest.warns(LostWordsWarning):  # these words change nothing, which is why they are told
        same_images = pipe([long[:-8], CORPUS[0]], generator=seeded(1, 2), **FAST).images
    assert torch.equal(long_images, same_images)


def test_a_lora_is_loaded_from_its_folder_or_file(pipe, label_map, tmp_path):
    save_mask_lora(pipe.transformer, tmp_path / "lora", LORA, text_length=24)
    expected = draw(pipe, mask=label_map)
    for place in (tmp_path / "lora", tmp_path / "lora" / "pytorch_lora_weights.safetensors"):
        pipe.load_mask_lora(place)
        assert same(draw(pipe, mask=label_map), expected)
        pipe.delete_adapters("mask")
        pipe.load_lora_weights(str(place))  # diffusers would put it on all tokens
        assert same(draw(pipe, mask=label_map), expected) and pipe.mask_lora is not None


def test_the_size_and_length_of_a_lora_go_with_it(pipe, tmp_path):
    own = (pipe.config.text_length, pipe.config.image_size)
    save_mask_lora(pipe.transformer, tmp_path / "large", LORA, text_length=20, size=48)
    save_mask_lora(pipe.transformer, tmp_path / "plain", LORA, text_length=24)
    pipe.load_mask_lora(tmp_path / "large")
    assert (pipe.config.text_length, pipe.config.image_size) == (20, 48)
    pipe.load_mask_lora(tmp_path / "plain")  # it records no size
    assert (pipe.config.text_length, pipe.config.image_size) == own


def test_second_prompts_pair_up_with_the_first(pipe):
    one = draw(pipe, CORPUS[0], prompt_2=CORPUS[1])
    assert not same(one, draw(pipe, CORPUS[0]))
    two = pipe(CORPUS, prompt_2=CORPUS[1], generator=seeded(1, 1), **FAST).images
    assert len(two) == 2 and same(two[:1], one) and not same(two[1:], one)
    for prompts, seconds in ((CORPUS, CORPUS * 2), ("a hat", CORPUS)):
        with pytest.raises(ValueError, match="second prompts"):
            pipe(prompts, prompt_2=seconds, **FAST)
    with pytest.raises(ValueError, match="negative prompts"):
        pipe(CORPUS * 2, negative_prompt=["a", "b", "c"], text_guidance=2.0, **FAST)


def test_a_scale_of_one_call_does_not_reach_the_next(pipe, label_map):
    pipe.set_adapters(["mask"], [0.5])
    expected = draw(pipe, mask=label_map)
    for scale in (0, 2.0):
        other = draw(pipe, mask=label_map, joint_attention_kwargs={"scale": scale})
        assert not same(other, expected) and same(draw(pipe, mask=label_map), expected)
    pipe.set_adapters(["mask"], [1.0])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *(
            ({"sigmas": sigmas}, "sigmas")
            for sigmas in (
                [0.2, 0.9], [2.0, 1.0], [1.0, -0.5], [float("inf"), 1.0], [1.0, 0.0], [1.0, 1.0],
                [float("nan"), 0.5], ["1", "0.5"], [True, False], 0.5, "ab", [[1.0, 0.5]], [],
            )
        ),
        *(
            ({"joint_attention_kwargs": given}, "joint_attention_kwargs")
            for given in ({"scale": float("nan")}, {"scale": "x"}, {"scale": True}, [1], "scale")
        ),
        *(
            ({"max_sequence_length": length}, "max_sequence_length")
            for length in (-1, 0, 1.0, "4", float("nan"), 10**9, True)
        ),
        ({"callback_on_step_end": 5}, "callback_on_step_end"),
        ({"callback_on_step_end": lambda *_: "done"}, "callback_on_step_end"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(1)}}, "latents"),
        ({"negative_prompt_2": 5, "text_guidance": 2.0}, "prompt_2"),
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_named(pipe, arguments, named):
    with pytest.raises((TypeError, ValueError), match=named):
        draw(pipe, CORPUS[0], **arguments)


@pytest.mark.parametrize(
    ("tokens", "pooled"),
    [
        ((1, 24, 7), (1, None)), ((24, None), (1, None)), ((2, 24, None), (1, None)),
        ((1, 0, None), (1, None)), ((1, 24, None), (1, 3)), ((1, 24, None), (None,)),
    ],
)  # fmt: skip
def test_embeddings_that_do_not_fit_are_refused(pipe, tokens, pooled):
    config = pipe.transformer.config
    fill = (config.joint_attention_dim, config.pooled_projection_dim)
    shapes = [
        [w if n is None else n for n in s] for s, w in zip((tokens, pooled), fill, strict=True)
    ]
    given = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match="prompt_embeds"):
        draw(pipe, prompt_embeds=given[0], pooled_prompt_embeds=given[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_embeddings_that_are_no_numbers_are_refused(pipe, bad):
    config = pipe.transformer.config
    tokens = torch.zeros(1, 24, config.joint_attention_dim)
    pooled = torch.zeros(1, config.pooled_projection_dim)
    given = tokens.numpy() if bad is None else tokens + bad
    with pytest.raises((TypeError, ValueError), match="prompt_embeds"):
        draw(pipe, prompt_embeds=given, pooled_prompt_embeds=pooled)


def test_output_types_latents_and_sizes(pipe):
    noise = torch.randn(1, 8, 8, 8, generator=seeded(4)[0])
    images = draw(pipe, latents=noise)
    assert torch.equal(images, draw(pipe, seed=4))
    array = pipe(latents=noise, num_inference_steps=2, output_type="np").images
    np.testing.assert_array_equal(array[0], images[0].permute(1, 2, 0).numpy())
    (pil,) = pipe(latents=noise, num_inference_steps=2).images
    np.testing.assert_array_equal(np.array(pil), (array[0] * 255).round().astype(np.uint8))
    assert draw(pipe, height=40, width=24).shape == (1, 3, 40, 24)


def test_save_and_load(pipe, backbone, label_map, tmp_path):
    expected = draw(pipe, CORPUS[0], label_map)
    pipe.save_pretrained(tmp_path / "pipe")
    assert same(draw(pipe, CORPUS[0], label_map), expected)  # still usable
    loaded = EC2FacePipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.text_length == 24 and loaded.config.image_size == 32
    assert same(draw(loaded, CORPUS[0], label_map), expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert same(draw(EC2FacePipeline.from_pretrained(again), CORPUS[0], label_map), expected)


def test_from_config_and_from_a_flux_folder(pipe, backbone, label_map, tmp_path):
    save_backbone(backbone, tmp_path / "flux", dtype=torch.float32)
    save_mask_lora(pipe.transformer, tmp_path / "adapters" / "both", LORA, text_length=24)
    config = load_profile(
        "smoke",
        backbone={"path": str(tmp_path / "flux"), "text_length": 24},
        data={"size": 32},
        sampling={"text_guidance": 1.0, "mask_guidance": 1.0},
        adapters=str(tmp_path / "adapters"),
        profile="test-pipeline",  # no retrained adapters under runs/
    )
    full = EC2FacePipeline.from_config(config)
    assert same(draw(full, CORPUS[0], label_map), draw(pipe, CORPUS[0], label_map))
    plain = EC2FacePipeline.from_config(config, variant=None)
    assert same(draw(plain, CORPUS[0]), draw(pipe, CORPUS[0]))
    assert not same(draw(plain, mask=label_map), draw(pipe, mask=label_map))
    stock = EC2FacePipeline.from_pretrained(tmp_path / "flux", guidance=1.0)
    assert stock.config.image_size == 64 and stock.config.text_length == 32
    stock.load_mask_lora(tmp_path / "adapters" / "both")
    assert same(draw(stock, mask=label_map, height=32, width=32), draw(pipe, mask=label_map))

    with pytest.raises(ConfigError, match=r"trained with 24: set backbone\.text_length to 24"):
        EC2FacePipeline.from_config(config.replace(backbone={"text_length": 32}))
    with pytest.raises(FileNotFoundError, match=r"ec2face_core\.train"):
        EC2FacePipeline.from_config(config, variant="mask")
    with pytest.raises(ConfigError, match="did you mean"):
        EC2FacePipeline.from_config(config, variant="bothe")


def test_errors_name_what_is_wrong(pipe, label_map, tmp_path):
    with pytest.raises(ValueError, match="2 prompts and 3 masks"):
        pipe(CORPUS, [label_map] * 3)
    with pytest.raises(ValueError, match=r"must be 0-18, found 0-19"):
        pipe(mask=label_map.clone().fill_(19).triu())
    with pytest.raises(ValueError, match="expected integer label ids"):
        pipe(mask=label_map.float())
    with pytest.raises(ValueError, match="palette"):
        pipe(mask=Image.effect_noise((32, 32), 90).convert("RGB"))
    with pytest.raises(ValueError, match="empty list"):
        pipe(mask=[])
    with pytest.raises(ValueError, match="a float is not a mask"):
        pipe(mask=1.5)
    with pytest.raises(ValueError, match="multiples of 8"):
        pipe(height=30)
    with pytest.raises(ValueError, match="at least 1"):
        pipe(num_inference_steps=0)
    with pytest.raises(ValueError, match="use pil, np, pt or latent"):
        pipe(output_type="jpg")
    with pytest.raises(ValueError, match="2 generators for 1 pictures"):
        pipe(generator=seeded(1, 2))
    with pytest.raises(ValueError, match="expected"):
        pipe(latents=torch.randn(1, 8, 4, 4))
    with pytest.raises(FileNotFoundError):
        pipe(mask=tmp_path / "no.png")


def test_pickles_of_the_hub_are_not_opened(monkeypatch, tmp_path):
    """Nor is a folder whose weights are others than its list says."""
    from diffusers import DiffusionPipeline

    from ec2face_core.io.sums import DamagedError, list_sums

    seen = []
    monkeypatch.setattr(
        DiffusionPipeline, "from_pretrained", lambda *_, **words: seen.append(words)
    )
    EC2FacePipeline.from_pretrained("owner/model", torch_dtype=torch.float32)
    assert seen == [{"torch_dtype": torch.float32, "use_safetensors": True}]
    weights = tmp_path / "vae" / "w.safetensors"
    weights.parent.mkdir()
    weights.write_text("whole")
    list_sums(tmp_path)
    weights.write_text("other")
    with pytest.raises(DamagedError, match=r"w\.safetensors is damaged"):
        EC2FacePipeline.from_pretrained(tmp_path)
