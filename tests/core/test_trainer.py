"""The trainer, tested by training it, killing it and resuming it; and its parts against algebra."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
from collections import Counter

import pytest
import torch
from helpers import step_gradients
from safetensors.torch import load_file

from ec2face_core import train
from ec2face_core import trainer as trainer_module
from ec2face_core.backbone import encode_images, load_backbone
from ec2face_core.config import Config, ConfigError, load_profile
from ec2face_core.consistency import PixelConsistency
from ec2face_core.flow import interpolate, target_velocity
from ec2face_core.io.lora_file import load_mask_lora, read_mask_lora, training_settings
from ec2face_core.io.paths import ROOT, resolve
from ec2face_core.mask_branch import predict_velocity
from ec2face_core.runs import read_metrics
from ec2face_core.trainer import Trainer, learning_rate
from ec2face_core.training.checkpoints import newest_checkpoint
from ec2face_lab import launch

LORA = "pytorch_lora_weights.safetensors"


def final_lora(run_dir) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final" / LORA)


def assert_bitwise(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and left
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def straight(tiny_config: Config, tmp_path_factory):
    """Four uninterrupted steps of full EC2Face: the trainer, after fit."""
    trainer = Trainer(tiny_config, "both", tmp_path_factory.mktemp("run") / "straight")
    trainer.fit()
    return trainer


@pytest.mark.parametrize("tokens", ["mask", "all"])
def test_dropped_conditions_reach_the_transformer_as_null(exact, monkeypatch, tokens):
    """A dropped mask does so where it can teach something; else the sample is left out."""
    seen = {}
    monkeypatch.setattr(exact, "config", exact.config.replace(**{"lora.tokens": tokens}))

    def spy(model, z_t, t, text, mask_latents, keep_mask, **rest):
        seen.update(text=text, keep_mask=keep_mask)
        return predict_velocity(model, z_t, t, text, mask_latents, keep_mask, **rest)

    monkeypatch.setattr(trainer_module, "predict_velocity", spy)
    draws = exact.stream.sample(range(8))
    step_gradients(exact, draws)
    null = exact.cache.text([""]).tokens[0]
    if tokens == "mask":
        assert seen["keep_mask"] is None and not draws.keep_mask.all()
        draws = draws[draws.keep_mask.nonzero()[:, 0]]
    else:
        assert torch.equal(seen["keep_mask"], draws.keep_mask)
    told = exact.cache.batch(draws.ids, draws.caption_indices)["text"].tokens
    assert len(seen["text"]) == len(told)
    for i, keep in enumerate(draws.keep_text):
        assert torch.equal(seen["text"].tokens[i], told[i] if keep else null)


def test_a_sample_without_a_mask_has_no_gradient_and_is_not_computed(exact, monkeypatch):
    """The gradient is that of all samples with a key mask; alone, such a sample's is exactly 0."""
    samples = exact.stream.sample(range(8))
    dropped = (~samples.keep_mask).nonzero()[:, 0]
    assert 0 < len(dropped) < 8
    w = exact.long_tail_weights(range(8))
    gradients, _ = step_gradients(exact, samples, w)
    with monkeypatch.context() as patch:  # as if the LoRA were on all tokens
        patch.setattr(Trainer, "masks_only", False)
        expected, _ = step_gradients(exact, samples, w)
        alone, _ = step_gradients(exact, samples[dropped], w[dropped])
    for ours, whole, zero in zip(gradients, expected, alone, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-7)
        assert zero.abs().max() == 0
    skipped, means = step_gradients(exact, samples[dropped], w[dropped])
    assert all(g.abs().max() == 0 for g in skipped)  # there, though: DDP waits for them
    assert all(value.isfinite() for value in means.values())


def test_a_black_image_in_place_of_a_dropped_mask(tiny_config, tmp_path):
    """Its sample is computed: the gradient is that of a batch whose dropped masks are empty."""
    config = tiny_config.replace(
        trainer={"null_mask": "black", "mixed_precision": "no"}, loss={"long_tail": False}
    )
    trainer = Trainer(config, "none", tmp_path / "black")
    trainer.setup()
    samples = trainer.stream.sample(range(8))
    dropped = torch.arange(8) % 3 == 0
    samples = dataclasses.replace(samples, keep_mask=~dropped)
    gradients, _ = step_gradients(trainer, samples)
    batch = trainer.cache.batch(samples.ids, samples.caption_indices)
    vae = load_backbone(config.backbone, ("vae",)).vae
    black = -torch.ones(1, 3, config.data.size, config.data.size)
    masks = batch["z_mask"].clone()
    masks[dropped] = encode_images(vae, black)
    text = batch["text"].where(samples.keep_text, trainer.null_text)
    z_t = interpolate(batch["z"], samples.noise, samples.t)
    v = predict_velocity(trainer.model, z_t, samples.t, text, masks, None, guidance=1.0)
    trainer.optimizer.zero_grad()
    (v - target_velocity(batch["z"], samples.noise)).square().mean().backward()
    largest = max(float(g.abs().max()) for g in gradients)
    for ours, parameter in zip(gradients, trainer.parameters, strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4 * largest)
    with pytest.raises(ConfigError, match="noise_repeats 1"):
        config.replace(lora={"attention": "decoupled"}, trainer={"noise_repeats": 2})


def test_consistency_on_the_model_s_own_states(exact, monkeypatch):
    """The losses look at Eq. 5 of states that the model itself reaches from the sample's noise."""
    samples = exact.stream.sample(range(8))
    samples = samples[samples.keep_mask.nonzero()[:, 0]]
    plain, _ = step_gradients(exact, samples)
    loss = dataclasses.replace(exact.config.loss, states="own", own_steps=3, own_below=0.6)
    monkeypatch.setattr(exact, "config", dataclasses.replace(exact.config, loss=loss))
    seen = {}
    gradient = PixelConsistency.gradient

    def spy(pixels, z_hat, captions, label_map, t, *rest):
        seen["z_hat"], seen["t"] = z_hat.detach(), t
        return gradient(pixels, z_hat, captions, label_map, t, *rest)

    monkeypatch.setattr(PixelConsistency, "gradient", spy)
    own, means = step_gradients(exact, samples)
    assert torch.equal(seen["t"], 0.6 * samples.t)
    batch = exact.cache.batch(samples.ids, samples.caption_indices)
    text = batch["text"].where(samples.keep_text, exact.null_text)
    z, t = samples.noise, torch.ones(len(samples.t))
    with torch.no_grad():
        for k in (1, 2, 3, 4):  # three steps, and the one back of Eq. 5
            v = predict_velocity(exact.model, z, t, text, batch["z_mask"], None)
            later = 1 - (1 - seen["t"]) * k / 3 if k < 4 else torch.zeros_like(t)
            z, t = z - (t - later)[:, None, None, None] * v, later
    torch.testing.assert_close(seen["z_hat"], z, rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(a, b) for a, b in zip(plain, own, strict=True))
    assert all(value.isfinite() for value in means.values())


def test_consistency_losses_as_a_second_stage(exact, monkeypatch):
    """Before it begins, a step is one of flow matching alone; from then on, one of Eq. 12."""
    samples = exact.stream.sample(range(4))
    whole, _ = step_gradients(exact, samples)
    steps = exact.config.trainer.steps
    late = dataclasses.replace(exact.config.loss, begins=0.5)
    monkeypatch.setattr(exact, "config", dataclasses.replace(exact.config, loss=late))
    monkeypatch.setattr(exact, "steps_done", -(-steps // 2))
    second, _ = step_gradients(exact, samples)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    monkeypatch.setattr(exact, "steps_done", -(-steps // 2) - 1)
    first, means = step_gradients(exact, samples)
    assert means["text"] == means["mask"] == 0
    monkeypatch.setattr(exact, "consistency", None)
    flow, _ = step_gradients(exact, samples)
    assert all(torch.equal(a, b) for a, b in zip(flow, first, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, first, strict=True))


def test_no_step_has_a_key_mask(exact, monkeypatch):
    """At the paper's p, 97 % of the steps of 8 x 4 samples had one on some rank."""
    seen = []

    def spy(*arguments, **rest):
        seen.append(rest["keep_mask"])
        return predict_velocity(*arguments, **rest)

    monkeypatch.setattr(trainer_module, "predict_velocity", spy)
    exact.step(exact.stream.sample(range(4)))
    for p in exact.parameters:
        p.grad = None
    assert seen == [None]
    keep = exact.stream.sample(range(3200)).keep_mask
    with_all = keep.reshape(-1, 4).all(1).float().mean()  # micro-batches of four
    assert abs(float(with_all) - 0.6**4) < 0.05  # p is 0.4 here; at 0.1, 0.9**32 = 3 % of steps


@pytest.mark.parametrize(
    ("variant", "clip", "parser"), [("none", 0, 0), ("text", 1, 0), ("mask", 0, 1)]
)
def test_only_the_critics_that_a_variant_needs(
    straight, tiny_config, tmp_path, monkeypatch, variant, clip, parser
):
    opened = Counter()

    class Stop(Exception):
        pass

    def note(name):
        return lambda *_, **__: opened.update([name])

    for critic, name in (
        (trainer_module.ClipScorer, "clip"),
        (trainer_module.FaceParser, "parser"),
    ):
        monkeypatch.setattr(critic, "from_config", note(name))
    monkeypatch.setattr(
        trainer_module,
        "load_backbone",
        lambda c, parts: opened.update(parts) or load_backbone(c, parts),
    )
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        Trainer(tiny_config, variant, tmp_path).setup()
    wanted = {"transformer": 1, "clip": clip, "parser": parser, "vae": clip or parser}
    assert opened == {name: n for name, n in wanted.items() if n}


def test_focal_weights_stand_in_for_those_of_classes(exact, monkeypatch):
    monkeypatch.setattr(exact, "consistency", None)
    samples = exact.stream.sample(range(4))
    _, plain = step_gradients(exact, samples)
    torch.testing.assert_close(plain["flow"], plain["unweighted_flow"])
    focal = dataclasses.replace(exact.config.loss, weighting="focal", long_tail=True)
    monkeypatch.setattr(exact, "config", dataclasses.replace(exact.config, loss=focal))
    assert exact.long_tail_weights(range(4)) is None
    _, means = step_gradients(exact, samples)
    assert means["flow"] > 1.05 * means["unweighted_flow"]  # hard cells weigh more
    torch.testing.assert_close(means["unweighted_flow"], plain["unweighted_flow"])


def test_long_tail_weights_only_where_the_variant_says_so(tiny_config):
    assert Trainer(tiny_config, "without_ltal").long_tail_weights(range(2)) is None


def test_accumulation_and_batch_size_do_not_change_the_step(tiny_config, tmp_path):
    """4 x 1 = 2 x 2: also the normalisation of the weights sees the whole step."""
    loras = []
    for batch, accumulation in ((4, 1), (2, 2)):
        config = tiny_config.replace(
            trainer={
                "batch_size": batch, "accumulation": accumulation,
                "mixed_precision": "no", "steps": 2,
            }
        )  # fmt: skip
        trainer = Trainer(config, "none", tmp_path / f"{batch}x{accumulation}")
        trainer.fit()
        loras.append(final_lora(trainer.run_dir))
    for name in loras[0]:
        torch.testing.assert_close(loras[0][name], loras[1][name], rtol=1e-3, atol=2e-5)


# --------------------------------------------------------------------------------- the run


def test_a_run_trains_the_lora_only_and_explains_itself(straight, tiny_config, tmp_path):
    run = straight.run_dir
    original = load_backbone(tiny_config.backbone, ("transformer",)).transformer
    before = original.state_dict()
    after = {k.replace(".base_layer", ""): v for k, v in straight.transformer.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(float(v.abs().max()) > 0 for k, v in final_lora(run).items() if "lora_B" in k)

    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["samples"] for row in rows] == [2, 4, 6, 8]
    assert [row["lr"] for row in rows] == [5e-4, 1e-3, 1e-3, 1e-3]  # two steps of warm-up
    for row in rows:  # Eq. 12 holds in the log; beta is a mean, hence only bounds
        guided = row["total"] - row["flow"]
        assert 0 < guided <= 0.5 * 2 * (row["text"] + row["mask"])
        assert row["seconds"] > 0 and row["grad_norm"] > 0
    saved = load_profile("mini", **json.loads(json.dumps(_yaml(run / "config.yaml"))))
    assert saved == straight.config

    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step_000002",
        "step_000004",
    ]
    about = json.loads((run / "final" / "provenance.json").read_text())
    assert about["parameters"]["variant"] == "both" and about["parameters"]["steps"] == 4
    record = read_mask_lora(run / "final")
    assert (record.lora, record.text_length) == (tiny_config.lora, tiny_config.backbone.text_length)
    assert record.size == tiny_config.data.size and record.base == tiny_config.backbone.path
    assert record.settings == training_settings(tiny_config, "both")
    load_mask_lora(original, run / "final")
    loaded = {n: p for n, p in original.named_parameters() if "lora_" in n}
    trained = {n: p for n, p in straight.transformer.named_parameters() if "lora_" in n}
    assert_bitwise(dict(loaded), dict(trained))


def test_a_finished_run_is_left_alone(straight, tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "setup", lambda self: pytest.fail("set up again"))
    assert Trainer(tiny_config, "both", straight.run_dir).fit() == straight.run_dir / "final"
    assert "done already" in capsys.readouterr().out


def test_resumed_after_a_truncated_checkpoint_ends_bit_for_bit_alike(
    straight, tiny_config, tmp_path
):
    begun = tiny_config.replace(trainer={"steps": 3, "checkpoint_every": 1})
    Trainer(begun, "both", tmp_path).fit()
    newest = tmp_path / "checkpoints" / "step_000003"
    content = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(content[: len(content) // 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "tot')  # killed while writing

    torch.manual_seed(20261126)  # no global generator may matter
    with pytest.warns(RuntimeWarning, match="step_000003 is damaged"):
        Trainer(tiny_config, "both", tmp_path).fit()
    assert_bitwise(final_lora(tmp_path), final_lora(straight.run_dir))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    kept = [p.name for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == ["step_000003", "step_000004"] or kept == ["step_000004"]


def test_another_configuration_is_refused_by_name(straight, tiny_config):
    other = tiny_config.replace(**{"loss.alpha_mask": 1.0, "trainer.steps": 9})
    with pytest.raises(ConfigError, match=r"loss\.alpha_mask 0\.5 -> 1\.0\)"):
        Trainer(other, "both", straight.run_dir).fit()
    with pytest.raises(ConfigError, match="variant both -> mask"):
        Trainer(tiny_config, "mask", straight.run_dir).fit()


def test_a_diverged_loss_stops_and_no_checkpoint_is_kept_of_it(tiny_config, tmp_path, monkeypatch):
    step = Trainer.step

    def diverges(self, samples, w=None):
        means = step(self, samples, w)
        if self.steps_done == 1:
            means["total"] *= float("nan")
        return means

    monkeypatch.setattr(Trainer, "step", diverges)
    config = tiny_config.replace(trainer={"checkpoint_every": 1})
    with pytest.raises(FloatingPointError, match="step 2 is not finite"):
        Trainer(config, "none", tmp_path).fit()
    assert newest_checkpoint(tmp_path / "checkpoints")[1]["step"] == 1


def test_wrong_launches_are_named(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="num_processes is 2"):
        Trainer(tiny_config.replace(**{"trainer.num_processes": 2}), "none", tmp_path).setup()
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        config = tiny_config.replace(**{"trainer.mixed_precision": "fp16"})
        Trainer(config, "none", tmp_path, device="cpu").setup()
    with pytest.raises(ConfigError, match="variant 'bth' does not exist"):
        Trainer(tiny_config, "bth", tmp_path)


def test_learning_rates():
    """The paper's constant rate, and the miniature's cosine that ends at 0."""
    rates = [learning_rate(step, 20, 1e-3, 4) for step in range(20)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4] + [1e-3] * 17)
    rates = [learning_rate(step, 20, 1e-3, 4, "cosine") for step in range(21)]
    assert rates[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert rates[12] == pytest.approx(5e-4) and rates[20] == pytest.approx(0, abs=1e-12)
    assert all(left >= right for left, right in itertools.pairwise(rates[4:]))


# -------------------------------------------------------------------------- command line


def test_command_line(tiny_config, tmp_path, capsys, monkeypatch):
    path = tmp_path / "config.yaml"
    tiny_config.save(path)
    trained = []
    monkeypatch.setattr(Trainer, "fit", lambda self, **_: trained.append(self.config))
    assert train.main(["--config", str(path), "--set", "loss.alpha_text=2", "--steps", "7"]) == 0
    assert trained == [tiny_config.replace(**{"loss.alpha_text": 2.0, "trainer.steps": 7})]
    monkeypatch.undo()

    for arguments, message in (
        (["--set", "trainer.stepz=3"], "did you mean 'steps'"),
        (["--profile", "minni"], "did you mean 'mini'"),
        (["--config", str(tmp_path / "absent.yaml")], "no such file"),
        (["--config", str(path), "--set", f"data.root={tmp_path / 'nothing'}",
          "--set", "data.procedural=false", "--run-dir", str(tmp_path)], "does not exist"),
        (["--config", str(path), "--set", f"backbone.path={tmp_path / 'nothing'}",
          "--run-dir", str(tmp_path)], "backbone.path"),
    ):  # fmt: skip
        assert train.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error


# ---------------------------------------------------------------- processes (minutes, not seconds)


def _child(config: Config, run_dir, *more: str) -> list[str]:
    path = run_dir.with_suffix(".yaml")
    config.save(path)
    arguments = ["--config", str(path), "--run-dir", str(run_dir), *more]
    return launch.command_line("ec2face_core.train", *arguments)


@pytest.mark.slow
def test_killed_at_a_random_step_and_resumed_ends_bit_for_bit_alike(tiny_config, tmp_path):
    config = tiny_config.replace(trainer={"steps": 8, "checkpoint_every": 3})
    kill_after = random.Random(20261126).randrange(4, 8)  # there is something to resume from
    command = _child(config, tmp_path / "killed")
    start = {"cwd": ROOT, "env": launch.child_environment()}
    straight = subprocess.Popen(_child(config, tmp_path / "straight"), **start)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **start) as process:
        for line in process.stdout:
            if line.startswith(f"step {kill_after}/"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "final").exists()
    subprocess.run(command, check=True, **start)
    assert straight.wait() == 0
    assert_bitwise(final_lora(tmp_path / "killed"), final_lora(tmp_path / "straight"))
    assert [row["step"] for row in read_metrics(tmp_path / "killed")] == list(range(1, 9))


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_with_the_joined_batch(tiny_config, tmp_path):
    shared = {"mixed_precision": "no", "steps": 2, "checkpoint_every": 1}
    one = tiny_config.replace(trainer={**shared, "batch_size": 4})
    two = tiny_config.replace(trainer={**shared, "batch_size": 2, "num_processes": 2})
    Trainer(one, "both", tmp_path / "one").fit()
    path = tmp_path / "two.yaml"
    two.save(path)
    launch.run(
        "ec2face_core.train", "--config", str(path), "--run-dir", str(tmp_path / "two"),
        num_processes=2, env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )  # fmt: skip
    states = [
        load_file(tmp_path / name / "checkpoints" / "step_000001" / "state.safetensors")
        for name in ("one", "two")
    ]
    for name, value in states[0].items():
        if name.endswith("exp_avg"):  # after one step 0.1 x the clipped, averaged gradient
            torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-6)
    for left, right in zip(
        final_lora(tmp_path / "one").values(), final_lora(tmp_path / "two").values(), strict=True
    ):
        torch.testing.assert_close(right, left, rtol=1e-3, atol=2e-5)
    for left, right in zip(
        read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True
    ):  # the log is of all ranks
        for name in ("t", "flow", "text", "mask", "grad_norm", "samples"):
            assert left[name] == pytest.approx(right[name], rel=1e-3)


@pytest.mark.slow
def test_the_smoke_profile_trains_on_the_bundle(tmp_path):
    profile = load_profile("smoke")
    bundle = resolve(profile.backbone.path)
    parser, clip = resolve(profile.perception.parser), resolve("data/mini/clip_guiding")
    if not all(path.exists() for path in (bundle / "model_index.json", parser, clip)):
        pytest.skip(f"the bundle is incomplete: {bundle.parent} (make foundation)")
    config = load_profile(
        "smoke",
        profile=str(tmp_path / "runs"),
        data={"root": str(tmp_path / "faces"), "train": 8, "test": 2},
        trainer={"steps": 2, "batch_size": 2},
    )
    final = Trainer(config).fit()
    assert (final / LORA).is_file()
    rows = read_metrics(final.parent)
    assert len(rows) == 2 and rows[0]["unweighted_flow"] < 3


def _yaml(path):
    import yaml

    return yaml.safe_load(path.read_text())
