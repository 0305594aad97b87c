"""EC2FacePipeline keeps the contract of diffusers' pipelines, with and without a mask LoRA."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxPipeline
from torch import nn

from ec2face_core.backbone import pack
from ec2face_core.config import LoraConfig
from ec2face_core.inference.loras import saved_mask_lora
from ec2face_core.io.lora_file import (
    LORA_FILE,
    LORA_FOLDER,
    WEIGHTS,
    read_mask_lora,
    save_mask_lora,
)
from ec2face_core.mask_branch import ADAPTER, add_mask_lora
from ec2face_core.pipeline import EC2FacePipeline
from ec2face_lab.world.networks import save_backbone, tiny_backbone

CORPUS = ["she has wavy hair.", "a man with a hat and glasses."]
LENGTH = 24
MASK = (torch.arange(64).reshape(8, 8) % 19).repeat_interleave(4, 0).repeat_interleave(4, 1)


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone(CORPUS)


def with_lora(backbone, attention: str = "joint", seed: int = 0) -> nn.Module:
    """A copy of the transformer with a mask LoRA that does something."""
    transformer = copy.deepcopy(backbone.transformer)
    torch.manual_seed(seed)
    for p in add_mask_lora(transformer, LoraConfig(rank=4, alpha=8.0, attention=attention)):
        nn.init.normal_(p, std=0.2)
    return transformer


def pipeline(backbone, attention: str = "joint") -> EC2FacePipeline:
    parts = {k: copy.deepcopy(v) for k, v in backbone.components().items() if k != "transformer"}
    transformer = with_lora(backbone, attention)
    pipe = EC2FacePipeline(**parts, transformer=transformer, text_length=LENGTH, image_size=32)
    return quiet(pipe)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(backbone) -> EC2FacePipeline:
    return pipeline(backbone)


@pytest.fixture(scope="module")
def flux_folder(backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    save_backbone(backbone, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def lora_folder(backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    transformer = with_lora(backbone)
    config = LoraConfig(rank=4, alpha=8.0)
    settings = {"loss.clip": 30.0, "trainer.steps": 5}
    save_mask_lora(transformer, folder, config, LENGTH, 32, "owner/base", settings)
    return folder


def draw(pipe, *, mask=MASK, **kwargs) -> torch.Tensor:
    return draw_flux(pipe, mask=mask, **kwargs)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------ calls and results


def test_signature_has_fluxpipelines_arguments():
    ours = inspect.signature(EC2FacePipeline.__call__).parameters
    flux = inspect.signature(FluxPipeline.__call__).parameters
    missing = {name for name in flux if name not in ours}
    assert missing == {n for n in flux if "ip_adapter" in n}
    optional = {"num_inference_steps", "num_images_per_prompt", "generator", "latents"}
    optional |= {"output_type", "return_dict", "prompt"}
    assert all(ours[name].default is not inspect.Parameter.empty for name in optional)


def test_dict_and_tuple_outputs_agree(pipe):
    result = draw(pipe)
    output = pipe(
        CORPUS[0], MASK, num_inference_steps=2, output_type="pt", return_dict=False,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert isinstance(output, tuple) and len(output) == 1
    assert torch.equal(output[0], result)


def test_no_prompt_is_the_empty_one(pipe):
    assert torch.equal(draw(pipe, prompt=None), draw(pipe, prompt=""))


def test_latents_as_tokens_and_as_pictures(pipe):
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(4))
    expected = draw(pipe, latents=noise)
    assert torch.equal(draw(pipe, latents=pack(noise)), expected)
    tokens = draw(pipe, latents=noise, output_type="latent")
    z = FluxPipeline._unpack_latents(tokens, 32, 32, pipe.vae_scale_factor)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        images = pipe.vae.decode(z, return_dict=False)[0]
    assert same(pipe.image_processor.postprocess(images, "pt"), expected)
    with pytest.raises(ValueError, match=r"or their tokens \(1, 16, 32\)"):
        draw(pipe, latents=noise[..., :4])


def test_text_only_agrees_with_fluxpipeline_in_every_argument(backbone, pipe):
    flux = quiet(FluxPipeline(**backbone.components()))
    embeds = pipe.encode_prompt(CORPUS[1], max_sequence_length=16)
    flux_embeds = flux.encode_prompt(CORPUS[1], max_sequence_length=16)
    for ours, theirs in zip(embeds, flux_embeds, strict=True):
        assert ours.dtype == theirs.dtype and same(ours, theirs)
    calls = [
        {"prompt": CORPUS[0], "prompt_2": CORPUS[1], "max_sequence_length": 16},
        {"sigmas": [1.0, 0.7, 0.2], "guidance_scale": 2.0},
        {"negative_prompt": CORPUS[1], "true_cfg_scale": 3.0},
        {"prompt_embeds": embeds[0], "pooled_prompt_embeds": embeds[1]},
        {"num_images_per_prompt": 2},
    ]
    for call in calls:
        call = {"max_sequence_length": LENGTH, "guidance_scale": 3.5, **call}
        images = draw(pipe, mask=None, **call)
        if "num_images_per_prompt" in call:  # FluxPipeline draws the noise of both at once
            assert images.shape[0] == 2 and same(images[:1], draw(pipe, mask=None))
            continue
        assert same(images, draw_flux(flux, **call)), call


def draw_flux(flux, **kwargs) -> torch.Tensor:
    given = {
        "num_inference_steps": 2, "output_type": "pt", "height": 32, "width": 32,
        "generator": torch.Generator().manual_seed(1),
    }  # fmt: skip
    if "prompt_embeds" not in kwargs:
        given["prompt"] = CORPUS[0]
    return flux(**(given | kwargs))[0]


def test_encode_prompt_in_isolation(pipe):
    text_parts = {k: v for k, v in pipe.components.items() if "text" in k or "token" in k}
    others = {k: v for k, v in pipe.components.items() if k not in text_parts}
    encoder = EC2FacePipeline(**text_parts, **dict.fromkeys(others), text_length=LENGTH)
    embeds = encoder.encode_prompt(CORPUS[0])
    painter = EC2FacePipeline(
        **others, **dict.fromkeys(text_parts), text_length=LENGTH, image_size=32
    )
    images = draw(quiet(painter), prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[1])
    assert same(images, draw(pipe))
    with pytest.raises(ValueError, match="has no text encoders: give prompt_embeds"):
        draw(painter)
    with pytest.raises(ValueError, match="or neither"):
        draw(pipe, prompt_embeds=embeds[0])
    with pytest.raises(ValueError, match="not both"):
        draw(pipe, prompt=CORPUS[0], prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[1])


def test_embeddings_of_another_length_than_the_negative_ones_are_refused(pipe):
    embeds = {
        "prompt_embeds": torch.randn(1, 4, 96),
        "pooled_prompt_embeds": torch.randn(1, 64),
        "negative_prompt_embeds": torch.randn(1, 5, 96),
        "negative_pooled_prompt_embeds": torch.randn(1, 64),
    }
    with pytest.raises(ValueError, match="must have the same shape when passed directly"):
        draw(pipe, **embeds, true_cfg_scale=2.0)
    draw(pipe, **embeds, true_cfg_scale=1.0)
    with pytest.raises(ValueError, match="give one of them"):
        draw(pipe, text_guidance=2.0, true_cfg_scale=2.0)


def test_negative_prompt_and_joint_attention_scale_act(pipe):
    plain = draw(pipe, text_guidance=3.0)
    assert torch.equal(draw(pipe, text_guidance=3.0, negative_prompt=""), plain)
    assert not same(draw(pipe, text_guidance=3.0, negative_prompt=CORPUS[1]), plain)
    base = EC2FacePipeline(**pipe.components, text_length=LENGTH, image_size=32)
    off = draw(quiet(base), joint_attention_kwargs={"scale": 0.0})
    assert not same(off, draw(pipe))
    base.disable_lora()
    expected = draw(base)
    base.enable_lora()
    assert same(off, expected)


# -------------------------------------------------------------------------------------- callbacks


def test_callbacks_are_given_what_they_ask_for_and_may_change_it(pipe):
    seen = []

    def look(pipe, step, time, tensors):
        seen.append((step, float(time), sorted(tensors), pipe.num_timesteps))
        return tensors

    expected = draw(pipe)
    names = pipe._callback_tensor_inputs
    images = draw(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(images, expected)
    assert [s[0] for s in seen] == [0, 1] and seen[0][2:] == (["latents", "prompt_embeds"], 2)
    assert seen[0][1] == 1000.0

    def erase(pipe, step, time, tensors):
        last = step == pipe.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else {}

    assert draw(pipe, callback_on_step_end=erase, output_type="latent").abs().sum() == 0
    draw(pipe, callback_on_step_end=lambda *_: None)
    with pytest.raises(ValueError, match="callbacks are given"):
        draw(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["nothing"])


def test_a_callback_may_interrupt(pipe):
    steps = []

    def stop(pipe, step, time, tensors):
        steps.append(tensors["latents"])
        pipe._interrupt = True
        return tensors

    tokens = draw(pipe, num_inference_steps=5, callback_on_step_end=stop, output_type="latent")
    assert len(steps) == 1 and torch.equal(tokens, steps[0])
    assert pipe.interrupt and draw(pipe).isfinite().all() and not pipe.interrupt


def test_a_callback_may_change_the_guidance(pipe):
    def more(pipe, step, time, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    images = draw(pipe, guidance_scale=2.0, callback_on_step_end=more)
    assert pipe.guidance_scale == 4.0
    assert not same(images, draw(pipe, guidance_scale=2.0))


# -------------------------------------------------------------------------- files, classes, the hub


def saved(pipe, folder: Path, **kwargs) -> Path:
    pipe.save_pretrained(folder, **kwargs)
    return folder


def test_components_and_types(pipe, backbone):
    assert set(pipe.components) == set(backbone.components())
    types = EC2FacePipeline._get_signature_types()
    assert types["transformer"] == (type(pipe.transformer),) and types["vae"] == (type(pipe.vae),)


@pytest.mark.parametrize("attention", ["joint", "decoupled"])
def test_saving_leaves_the_pipeline_and_loading_restores_it(backbone, tmp_path, attention):
    pipe = pipeline(backbone, attention)
    expected = draw(pipe)
    folder = saved(pipe, tmp_path / "pipe")
    assert same(draw(pipe), expected) and pipe.transformer.active_adapters() == [ADAPTER]
    index = json.loads((folder / "model_index.json").read_text())
    assert index[LORA_FOLDER] == ["ec2face_core.io.lora_file", "MaskLora"]
    assert (folder / LORA_FOLDER / WEIGHTS / LORA_FILE).is_file()
    assert "EC2FacePipeline.from_pretrained" in (folder / "README.md").read_text()
    for loaded in (
        EC2FacePipeline.from_pretrained(folder),
        DiffusionPipeline.from_pretrained(
            folder, custom_pipeline="pipeline", trust_remote_code=True
        ),
        DiffusionPipeline.from_pretrained(
            folder, custom_pipeline=str(folder / "pipeline.py"), trust_remote_code=True
        ),
    ):
        assert type(loaded) is EC2FacePipeline
        assert loaded.config.image_size == 32 and loaded.config.text_length == LENGTH
        assert same(draw(quiet(loaded)), expected)


def test_saved_base_is_a_flux_without_lora(pipe, backbone, tmp_path):
    folder = saved(pipe, tmp_path / "pipe")
    flux = FluxPipeline.from_pretrained(folder)
    expected = backbone.transformer.state_dict()
    state = flux.transformer.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_without_a_lora_nothing_is_written(backbone, tmp_path):
    pipe = EC2FacePipeline(**backbone.components(), text_length=LENGTH, image_size=32)
    folder = saved(pipe, tmp_path / "pipe", variant="fp16", safe_serialization=False)
    assert not (folder / LORA_FOLDER).exists()
    loaded = quiet(EC2FacePipeline.from_pretrained(folder, variant="fp16"))
    assert same(draw(loaded, mask=None), draw(quiet(pipe), mask=None))
    with pytest.raises(ValueError, match="variant=fp32"):
        EC2FacePipeline.from_pretrained(folder, variant="fp32")


def test_from_pipe_in_both_directions(backbone, pipe):
    expected = draw(pipe)
    kontext = FluxKontextPipeline.from_pipe(pipe)
    assert kontext.transformer is pipe.transformer
    again = EC2FacePipeline.from_pipe(kontext, text_length=LENGTH, image_size=32)
    assert same(draw(quiet(again), guidance_scale=3.5), expected)
    twin = EC2FacePipeline.from_pipe(pipe)
    assert twin.config.image_size == 32 and same(draw(quiet(twin)), expected)
    plain = EC2FacePipeline.from_pipe(
        FluxPipeline(**backbone.components()), text_length=LENGTH, image_size=32
    )
    assert plain.mask_lora is None and not same(draw(quiet(plain)), expected)


def test_dtypes(backbone, pipe, tmp_path):
    folder = saved(pipe, tmp_path / "pipe")
    loaded = EC2FacePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    parts = [part for part in loaded.components.values() if isinstance(part, nn.Module)]
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert draw(quiet(loaded)).isfinite().all()
    other = pipeline(backbone).to(dtype=torch.bfloat16)
    assert other.transformer.dtype == torch.bfloat16 and draw(other).isfinite().all()


@pytest.fixture
def hub(monkeypatch):
    """A hub of folders: `hub["owner/name"] = folder`; every file that was asked for is noted."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    folders: dict[str, Path] = {}

    def hf_hub_download(repository, filename, *, subfolder=None, revision=None, **_):
        place = folders[repository] / (subfolder or "") / filename
        if not place.is_file():
            raise EntryNotFoundError(str(place))
        return str(place)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return folders


def test_a_mask_lora_from_the_hub(pipe, backbone, lora_folder, hub, tmp_path):
    hub["me/lora"] = lora_folder
    hub["me/pipeline"] = saved(pipe, tmp_path / "pipe")
    expected = draw(pipe)
    for name in ("me/lora", "me/pipeline"):
        other = EC2FacePipeline(**copy.deepcopy(backbone).components(), text_length=LENGTH)
        other.load_mask_lora(name, revision="main")
        assert same(draw(quiet(other)), expected)
    with pytest.raises(FileNotFoundError, match="no mask LoRA"):
        pipe.load_mask_lora("nowhere")


@pytest.mark.parametrize("own_class", [True, False])
def test_a_pushed_pipeline_is_downloaded_with_its_lora(pipe, hub, monkeypatch, tmp_path, own_class):
    """By the class itself and by DiffusionPipeline: no file is missing of what diffusers asks."""
    import fnmatch
    import shutil
    from types import SimpleNamespace

    from diffusers.pipelines import pipeline_utils
    from diffusers.utils import dynamic_modules_utils

    expected = draw(pipe)
    remote = saved(pipe, tmp_path / "remote")
    names = [p.relative_to(remote).as_posix() for p in remote.rglob("*") if p.is_file()]
    local = tmp_path / "local"

    def fetch(name: str) -> str:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(remote / name, local / name))

    def snapshot_download(_, allow_patterns, ignore_patterns, **__):
        for name in names:
            wanted = any(fnmatch.fnmatch(name, p) for p in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, p) for p in ignore_patterns):
                fetch(name)
        return str(local)

    siblings = [SimpleNamespace(rfilename=name) for name in names]
    info = SimpleNamespace(siblings=siblings, sha="0" * 40)
    monkeypatch.setattr(pipeline_utils, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", lambda _, name, **__: fetch(name))
    monkeypatch.setattr(pipeline_utils, "snapshot_download", snapshot_download)
    module = dynamic_modules_utils
    monkeypatch.setattr(module, "hf_hub_download", lambda _, name, **__: fetch(name))
    monkeypatch.setattr(module, "model_info", lambda *_, **__: info)
    hub["me/faces"] = remote
    hub["me/flux"] = tmp_path / "nothing"
    if own_class:
        loaded = EC2FacePipeline.from_pretrained("me/faces")
    else:
        loaded = DiffusionPipeline.from_pretrained(
            "me/faces", custom_pipeline="pipeline", trust_remote_code=True
        )
    assert type(loaded) is EC2FacePipeline and same(draw(quiet(loaded)), expected)
    assert saved_mask_lora("me/flux", {"revision": "main"}) is None


def test_pushing_takes_the_lora_and_our_card(pipe, monkeypatch, tmp_path):
    from diffusers.utils import hub_utils

    pushed = {}

    class Api:
        def upload_folder(self, *, folder_path, **_):
            pushed.update(
                (p.relative_to(folder_path).as_posix(), p.read_bytes())
                for p in Path(folder_path).rglob("*")
                if p.is_file()
            )

    monkeypatch.setattr(hub_utils, "upload_folder", Api().upload_folder)
    generic = tmp_path / "generic"
    pipe.save_pretrained(generic)
    (generic / "README.md").write_text("This model card has been automatically generated.")
    pipe._upload_folder(generic, "me/faces")
    assert f"{LORA_FOLDER}/{WEIGHTS}/{LORA_FILE}" in pushed and "pipeline.py" in pushed
    assert b"EC2FacePipeline.from_pretrained" in pushed["README.md"]
    (generic / "README.md").write_text("My own words.")
    pipe._upload_folder(generic, "me/faces")
    assert pushed["README.md"] == b"My own words."


def test_what_lies_beside_a_lora(lora_folder, backbone):
    """peft opens its description, and the card says what the LoRA is."""
    from huggingface_hub import ModelCard
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    record = read_mask_lora(lora_folder)
    assert (record.size, record.base) == (32, "owner/base")
    assert record.settings == {"loss.clip": 30.0, "trainer.steps": 5}
    config = PeftConfig.from_pretrained(str(lora_folder))
    assert config.r == 4 and config.lora_alpha == 8.0
    transformer = inject_adapter_in_model(config, copy.deepcopy(backbone.transformer), ADAPTER)
    weights = {
        name.removeprefix("transformer."): value
        for name, value in load_file(lora_folder / LORA_FILE).items()
    }
    result = set_peft_model_state_dict(transformer, weights, ADAPTER)
    assert not result.unexpected_keys
    assert {n for n, _ in transformer.named_parameters() if "lora" in n}.isdisjoint(
        result.missing_keys
    )
    card = ModelCard.load(lora_folder / "README.md")
    assert card.data.base_model == "owner/base" and card.data.library_name == "diffusers"
    assert "| loss.clip | 30.0 |" in card.text


# ------------------------------------------------------------------------------------------- sizes


def test_the_loras_size_is_the_default_and_another_is_told(backbone, lora_folder, recwarn):
    pipe = EC2FacePipeline(**copy.deepcopy(backbone).components())
    assert pipe.config.image_size == 64
    quiet(pipe).load_mask_lora(lora_folder)
    assert pipe.config.image_size == 32 and pipe.config.text_length == LENGTH
    recwarn.clear()
    assert pipe(CORPUS[0], MASK, num_inference_steps=1, output_type="pt").images.shape[-1] == 32
    draw(pipe, mask=None, height=64, width=64)
    assert not recwarn
    with pytest.warns(UserWarning, match="trained at 32x32 pixels, and 64x64") as told:
        pipe(CORPUS[0], MASK, num_inference_steps=1, output_type="pt", height=64, width=64)
    assert told[0].filename == __file__


# -------------------------------------------------------------------------- other LoRAs beside ours


@pytest.fixture(scope="module")
def style(backbone, tmp_path_factory) -> Path:
    """An ordinary LoRA for FLUX, float16, as style LoRAs are."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("style")
    transformer = copy.deepcopy(backbone.transformer)
    config = PeftConfig(r=2, target_modules=["to_q", "to_k", "proj_mlp"], init_lora_weights=False)
    torch.manual_seed(3)
    transformer.add_adapter(config, adapter_name="style")
    transformer.half()
    layers = get_peft_model_state_dict(transformer, adapter_name="style")
    FluxPipeline.save_lora_weights(str(folder), transformer_lora_layers=layers)
    return folder


@pytest.mark.parametrize("attention", ["joint", "decoupled"])
def test_a_style_and_the_mask_work_together_in_either_order(backbone, style, tmp_path, attention):
    config = LoraConfig(rank=4, alpha=8.0, attention=attention)
    save_mask_lora(with_lora(backbone, attention), tmp_path, config, LENGTH)
    alone = draw(pipeline(backbone, attention))
    first = quiet(EC2FacePipeline(**copy.deepcopy(backbone).components(), text_length=LENGTH))
    first.load_lora_weights(str(style), adapter_name="style")
    styled = draw(first, mask=None)
    first.load_mask_lora(tmp_path)
    assert set(first.get_active_adapters()) == {"style", ADAPTER}
    both = draw(first)

    second = pipeline(backbone, attention)
    second.load_lora_weights(str(style), adapter_name="style")
    assert set(second.get_active_adapters()) == {"style", ADAPTER}
    assert same(draw(second), both) and not same(both, alone)
    assert same(draw(second, mask=None), styled)

    second.set_adapters("style", 0.0)
    assert same(draw(second), alone)
    second.set_adapters(["style", ADAPTER], [1.0, 0.0])
    assert not same(draw(second), both)
    second.set_adapters(["style"], [1.0])
    assert same(draw(second), both)
    with pytest.raises(RuntimeError, match="no LoRA can be fused beside the mask LoRA"):
        second.fuse_lora(adapter_names=["style"])
    second.unload_lora_weights()
    assert second.get_active_adapters() == [ADAPTER] and same(draw(second), alone)
    second.delete_adapters(ADAPTER)
    assert second.mask_lora is None


def test_a_style_in_half_precision_beside_a_float_mask_lora(backbone, style):
    pipe = pipeline(backbone)
    pipe.transformer.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    for p in pipe.transformer.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    before = draw(pipe)
    pipe.load_lora_weights(str(style), adapter_name="style")
    assert draw(pipe).isfinite().all() and not same(draw(pipe), before)


def test_saving_with_a_style_keeps_it_in_the_pipeline(backbone, style, tmp_path):
    pipe = pipeline(backbone)
    alone = draw(pipe)
    pipe.load_lora_weights(str(style), adapter_name="style")
    both = draw(pipe)
    folder = saved(pipe, tmp_path / "pipe")
    assert same(draw(pipe), both)
    assert same(draw(quiet(EC2FacePipeline.from_pretrained(folder))), alone)


def test_fusing_is_refused_where_it_would_lose_the_mask(backbone, style, lora_folder):
    pipe = pipeline(backbone)
    with pytest.raises(RuntimeError, match="would leave the mask LoRA out"):
        pipe.transformer.fuse_qkv_projections()
    plain = quiet(EC2FacePipeline(**copy.deepcopy(backbone).components(), text_length=LENGTH))
    plain.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        plain.load_mask_lora(lora_folder)
    pipe.load_lora_weights(str(style), adapter_name="style")
    pipe.transformer.fuse_lora(adapter_names=["style"])
    with pytest.raises(RuntimeError, match="was fused into the base weights"):
        draw(pipe)


# ---------------------------------------------------------------------------------- short of memory


def hooked(module: nn.Module) -> bool:
    return any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in module.modules())


@pytest.mark.parametrize("attention", ["joint", "decoupled"])
@pytest.mark.parametrize("how", ["model", "sequential", "block_level", "leaf_level"])
def test_offloading_changes_nothing(backbone, attention, how):
    """The hooks of diffusers' and accelerate's offloading, onto the CPU."""
    pipe = pipeline(backbone, attention)
    expected = draw(pipe, text_guidance=2.0)
    cpu = torch.device("cpu")
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        part = getattr(pipe, name)
        if how == "model":
            accelerate.cpu_offload_with_hook(part, cpu)
        elif how == "sequential":
            accelerate.cpu_offload(part, cpu, offload_buffers=True)
            assert part.device.type == "meta"
        elif hasattr(part, "enable_group_offload"):
            part.enable_group_offload(cpu, offload_type=how, num_blocks_per_group=1)
        else:
            from diffusers.hooks import apply_group_offloading

            apply_group_offloading(part, cpu, offload_type=how, num_blocks_per_group=1)
        assert hooked(part)
    assert same(draw(pipe, text_guidance=2.0), expected)
    assert same(draw(pipe, text_guidance=2.0), expected)  # the hooks are still there


def test_slicing_and_tiling_of_the_autoencoder(backbone):
    pipe = pipeline(backbone)
    expected = draw(pipe, num_images_per_prompt=2)
    pipe.vae.enable_slicing()
    assert same(draw(pipe, num_images_per_prompt=2), expected)
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size = 4
    pipe.vae.tile_sample_min_size = 4 * pipe.vae_scale_factor
    tiled = draw(pipe, num_images_per_prompt=2)
    assert tiled.shape == expected.shape and not torch.equal(tiled, expected)


def test_caches_of_diffusers(backbone):
    from diffusers import FirstBlockCacheConfig

    pipe = pipeline(backbone)
    guided = {"text_guidance": 2.0, "mask_guidance": 1.5, "num_inference_steps": 4}
    expected = draw(pipe, **guided)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert same(draw(pipe, **guided), expected)  # nothing is close enough to be reused
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    cached = draw(pipe, **guided)
    assert cached.isfinite().all() and not same(cached, expected)
    pipe.transformer.disable_cache()
    assert same(draw(pipe, **guided), expected)

    decoupled = pipeline(backbone, "decoupled")
    decoupled.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(RuntimeError, match="does not know decoupled attention"):
        draw(decoupled)
