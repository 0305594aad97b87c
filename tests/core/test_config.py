"""Profiles, overrides and what the loader refuses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from ec2face_core.command_line import parse_override
from ec2face_core.config import (
    PROFILES,
    SETTINGS,
    VARIANTS,
    Config,
    ConfigError,
    adapter_dir,
    load_config,
    load_profile,
)
from ec2face_core.io.paths import ROOT, resolve, user_path


def test_the_paper_profile_has_the_values_of_the_paper():
    config = load_profile("paper")
    ours = {"trainer": {"batch_size": 4, "accumulation": 1}, "data": {"texts": "disk"}}
    assert config.replace(**ours) == Config()  # how it is computed, not what
    t = config.trainer
    assert t.steps == 5000
    assert t.learning_rate == 1e-4
    assert t.num_processes * t.batch_size * t.accumulation == 8 * 4
    assert config.trainer.drop_probability == 0.1
    assert (config.loss.steepness, config.loss.center) == (10, 0.4)
    assert (config.loss.alpha_text, config.loss.alpha_mask, config.loss.balance) == (0.5, 0.5, 0.5)
    assert (config.sampling.steps, config.sampling.seed) == (28, 42)
    assert (config.data.train, config.data.test) == (27000, 3000)
    assert config.backbone.path == "black-forest-labs/FLUX.1-dev"


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_profiles_load_and_change_only_what_they_name(name):
    config = dataclasses.asdict(load_profile(name))
    written = yaml.safe_load((PROFILES / f"{name}.yaml").read_text())
    base = written.pop("base", None)
    expected = dataclasses.asdict(load_profile(base) if base else Config()) | {"profile": name}
    for key, value in written.items():
        expected[key] = expected[key] | value if isinstance(value, dict) else value
    assert config == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trainer": {"setps": 5}}, r"trainer\.setps: unknown option, did you mean 'steps'"),
        ({"trainer.setps": 5}, r"trainer\.setps: unknown option, did you mean 'steps'"),
        ({"trianer": {"steps": 5}}, "trianer: unknown option, did you mean 'trainer'"),
        ({"trainer.steps": "many"}, r"trainer\.steps: .*valid integer, got 'many'"),
        ({"trainer.steps": 2.5}, r"trainer\.steps: .*valid integer, got 2.5"),
        ({"trainer.steps": True}, r"trainer\.steps: .*valid integer, got True"),
        ({"loss.long_tail": 1}, r"loss\.long_tail: .*valid boolean, got 1"),
        ({"trainer.learning_rate": "fast"}, r"trainer\.learning_rate: .*valid number.*got 'fast'"),
        ({"trainer.learning_rate": True}, r"trainer\.learning_rate: .*not a number, got True"),
        ({"trainer": 5}, "trainer: expected options, got 5"),
        ({"trainer.steps": -1}, r"trainer\.steps: .*greater than or equal to 1, got -1"),
        ({"trainer.drop_probability": 1000}, r"drop_probability: .*less than or equal to 1"),
        ({"loss.clip": float("nan")}, r"loss\.clip: .*finite number, got nan"),
        ({"loss.clip": float("inf")}, r"loss\.clip: .*finite number, got inf"),
        ({"loss.scope": "mosr"}, r"loss\.scope: .*'dataset' or 'sample', got 'mosr'"),
        ({"loss.reduction": "mosr"}, r"loss\.reduction: .*'max', 'mean' or 'nearest'"),
        ({"loss.normalize": "mosr"}, r"loss\.normalize: .*'mean' or 'none'"),
        (
            {"loss.scope": "sample", "loss.normalize": "constant"},
            "normalize constant .* give normalize mean or none",
        ),
        ({"lora.attention": "mosr"}, r"lora\.attention: .*'joint' or 'decoupled'"),
        ({"data.train": 0}, r"data\.train: .*greater than or equal to 1"),
        ({"trainer": {"noise_repeats": 3}}, "batch_size 16 must be a multiple of noise_repeats 3"),
        ({"trainer": {"noise_repeats": 2}}, r"needs lora\.attention decoupled"),
        ({"trainer.shard": True}, "raise num_processes"),
        ({"evaluation.niqe_refit": False}, "niqe_block 32 needs niqe_refit"),
        ({"seed.low": 5}, "seed: is a single value"),
    ],
)
def test_wrong_options_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_profile("mini", **overrides)


def test_an_unknown_profile_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="'mnii' does not exist, did you mean 'mini'"):
        load_profile("mnii")
    for name in (None, 5, [], b"x", "", "mini.yaml", "../profiles/mini"):
        with pytest.raises(ConfigError, match=r"does not exist.* known: \['mini', "):
            load_profile(name)
        with pytest.raises(ConfigError, match="does not exist"):
            adapter_dir(load_profile("mini"), name)
        with pytest.raises(ConfigError):
            load_config(name)  # a mapping or a Path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", f"{SETTINGS} is no JSON object"),
        ("5", f"{SETTINGS} is no JSON object"),
        ("null", f"{SETTINGS} is no JSON object"),
        ('["seed"]', f"{SETTINGS} is no JSON object"),
        ("[" * 100_000, f"{SETTINGS} is no JSON object"),
        ('{"sede": 5}', f"sede: unknown option, did you mean 'seed'.*{SETTINGS}"),
        ('{"self": 5}', f"self: unknown option.*{SETTINGS}"),
        ('{"seed": "042"}', f"seed: .*valid integer, got '042'.*{SETTINGS}"),
    ],
)
def test_settings_of_the_environment_are_named_with_it(monkeypatch, text, message):
    monkeypatch.setenv(SETTINGS, text)
    with pytest.raises(ConfigError, match=message):
        load_profile("mini")


def test_settings_of_the_environment_may_be_empty(monkeypatch):
    plain = load_profile("mini")
    for text in ("", "{}"):
        monkeypatch.setenv(SETTINGS, text)
        assert load_profile("mini") == plain


def test_numbers_that_yaml_reads_as_text_become_numbers(tmp_path):
    assert isinstance(yaml.safe_load("1e-4"), str)  # YAML 1.1
    file = tmp_path / "config.yaml"
    file.write_text("base: mini\ntrainer:\n  learning_rate: 1e-4\n  weight_decay: 0\n")
    config = load_config(file)
    assert config.trainer.learning_rate == 1e-4
    assert config.trainer.weight_decay == 0.0 and isinstance(config.trainer.weight_decay, float)


def test_nested_dotted_and_command_line_overrides_are_the_same():
    nested = load_profile("mini", trainer={"steps": 7}, seed=3)
    dotted = load_profile("mini", **{"trainer.steps": 7, "seed": 3})
    command = load_profile("mini", **parse_override("trainer.steps=7"), **parse_override("seed=3"))
    assert nested == dotted == command == load_profile("mini").replace(trainer={"steps": 7}, seed=3)
    assert nested.trainer.steps == 7 and nested.trainer.batch_size == 16
    with pytest.raises(ConfigError, match="option=value"):
        parse_override("trainer.steps")
    empty = parse_override("backbone.pixel_decoder=")
    assert load_profile("mini", **empty).backbone.pixel_decoder == ""
    with pytest.raises(ConfigError, match="steps"):
        load_profile("mini", **parse_override("trainer.steps="))


def test_save_and_load_round_trip(tmp_path):
    config = load_profile("smoke", **{"loss.center": 0.35})
    config.save(tmp_path / "run" / "config.yaml")
    again = load_config(tmp_path / "run" / "config.yaml")
    assert again == config and again.digest() == config.digest()
    assert len(config.digest()) == 12
    assert config.digest() != config.replace(seed=43).digest()


def test_a_config_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_profile("mini").trainer.steps = 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_the_rows_of_tables_3_and_4(variant):
    loss = load_profile("mini").replace(**VARIANTS[variant]).loss
    assert loss.long_tail == (variant != "without_ltal")
    assert (loss.alpha_text > 0) == (variant in ("text", "both"))
    assert (loss.alpha_mask > 0) == (variant in ("mask", "both"))


def test_paths_start_at_the_repository_root_wherever_one_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve("data/mini") == ROOT / "data" / "mini"
    assert resolve(tmp_path) == tmp_path
    mini = load_profile("mini")
    # a run can never replace a published figure
    assert mini.run_dir == ROOT / "runs" / "mini" and mini.figure_dir == mini.run_dir / "figures"
    assert mini.published_dir == ROOT / "figures" / "mini"


def test_adapters_come_from_the_profile_and_unknown_variants_are_named():
    config = load_profile("mini", profile="nobody")  # a profile that retrained nothing
    assert adapter_dir(config, "both") == ROOT / "data" / "mini" / "adapters" / "both"
    with pytest.raises(ConfigError, match="did you mean 'both'"):
        adapter_dir(config, "bot")


def test_each_seed_has_its_adapters(tmp_path):
    from ec2face_core.config import trained_seeds

    config = load_profile("mini", profile="nobody", adapters=str(tmp_path))
    other = config.replace(seed=43)
    assert adapter_dir(other, "both") == tmp_path / "both-seed43"
    assert trained_seeds(config) == 0
    for variant in VARIANTS:
        adapter_dir(config, variant).mkdir()
        adapter_dir(other, variant).mkdir()
    assert trained_seeds(config) == 2
    adapter_dir(other, "text").rmdir()
    assert trained_seeds(config) == 1


def test_digests_of_kept_results_stay_valid():
    """Settings that were added or renamed after results were kept do not change their names."""
    digests = {name: load_profile(name).digest() for name in ("mini", "paper", "photos64")}
    assert digests == {"mini": "0503a7b89228", "paper": "d7826da6f07d", "photos64": "fae0a2f13343"}
    mini = load_profile("mini")
    assert mini.replace(data={"maker": "mine:faces"}).digest() != mini.digest()
    assert mini.replace(trainer={"low_discrepancy_t": True}).digest() != mini.digest()


def test_a_file_that_is_not_yaml_is_one_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("trainer: [5\nloss: }")
    with pytest.raises(ConfigError, match="not valid YAML") as refusal:
        load_config(path)
    assert "\n" not in str(refusal.value)
    path.write_text("- 5")
    with pytest.raises(ConfigError, match="expected settings, got list"):
        load_config(path)


def test_a_setting_in_a_file_is_named_with_the_file_and_an_override_without(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: mini\ntrainer: {steps: 3p}")
    with pytest.raises(ConfigError, match=r"mine\.yaml: trainer\.steps"):
        load_config(path)
    path.write_text("base: mini\ntrainer: {steps: 3}")
    with pytest.raises(ConfigError, match=r"^trainer\.steps"):
        load_config(path, **{"trainer.steps": -1})


def test_paths_on_a_command_line_are_the_users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert user_path("runs") == tmp_path / "runs"
    assert user_path("~/runs") == Path.home() / "runs"
    assert resolve("~/weights") == Path.home() / "weights"


# -------------------------------------------------------------------------------------- YAML files


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("trainer: {mixed_precision: no}", "mixed_precision", "no"),
        ("trainer: {compile: off}", "compile", False),
        ("trainer: {compile: True}", "compile", True),
        ("trainer: {learning_rate: 5}", "learning_rate", 5.0),
        ("trainer: {learning_rate: 2.E-3}", "learning_rate", 2e-3),
        ("trainer: {weight_decay: .5}", "weight_decay", 0.5),
        ("trainer: {steps: +7}", "steps", 7),
        ("trainer.steps: 7", "steps", 7),
    ],
)
def test_a_plain_value_is_of_its_settings_type(tmp_path, text, key, value):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: smoke\n{text}\n")
    found = getattr(load_config(path).trainer, key)
    assert found == value and type(found) is type(value)


def test_a_text_in_a_file_is_what_was_written(tmp_path):
    path = tmp_path / "mine.yaml"
    for text in ("no", "on", "042", "1e5", "1:30", "12345678", "2020-01-01", "0x1f", "'a #b'"):
        path.write_text(f"base: smoke\nbackbone: {{revision: {text}}}")
        config = load_config(path)
        assert config.backbone.revision == text.strip("'")
        config.save(path)  # as YAML 1.1 with its quotes
        assert load_config(path) == config
    path.write_text("base: smoke\ndata:\n  cache:\n")
    assert load_config(path).data.cache == ""


@pytest.mark.parametrize(
    "text",
    [
        "seed: 042", "seed: 0o42", "seed: 0x1f", "seed: 0b11", "seed: 1_000", "seed: 1:30",
        "seed: 1e3", "seed: 5.0", "seed: no", "seed: null", "seed: ~", "seed:", "seed: .inf",
        "seed: '5'", "seed: [5]", "seed: {a: 5}", "seed: !!int 010", "seed: ٣", "seed: 1 000",
        "seed: 2020-01-01", "seed: " + "9" * 5000, "loss: {center: 010}", "loss: {center: 1:30}",
        "loss: {center: 1_0.5}", "loss: {center: .nan}", "loss: {center: nan}",
        "loss: {center: -.inf}", "loss: {center: Infinity}", "loss: {center: 1e999}",
        "loss: {clip: 1e-999}", "loss: {center: true}", "loss: {center: 0x1p3}",
        "loss: {center: 1d3}", "loss: {long_tail: 1}", "loss: {long_tail: y}",
        "loss: {long_tail: 'true'}", "loss: {long_tail: }", "loss: {scope: no}", "loss:", "loss: 5",
        "data: {root: [a]}", "data: {root: {a: b}}", "data: {root: }", 'data: {root: "a\\nb"}',
        'data: {root: "a\\0b"}', "data: {root: ' '}", "data: {root: 'a '}",
    ],
)  # fmt: skip
def test_a_value_that_may_mean_something_else_is_refused(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: smoke\n{text}\n")
    with pytest.raises(ConfigError, match=r"^[^ ]*mine\.yaml") as refusal:
        load_config(path)
    message = str(refusal.value)
    assert re.search(
        "seed|center|clip|long_tail|scope|loss|root", message.partition("mine.yaml")[2]
    )
    assert "\n" not in message and len(message) < 400


def test_a_whole_number_in_another_notation_is_refused_with_its_decimal_digits():
    for text, digits in (("042", 42), ("-007", -7), ("1_000", 1000), ("1e3", 1000), ("5.0", 5)):
        with pytest.raises(ConfigError, match=f"decimal digits, got '{text}'; write {digits}$"):
            parse_override(f"seed={text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: mini\nseed: 1\nseed: 2", r"'seed' is given twice \(lines 2 and 3\)"),
        ("base: mini\nloss:\n  clip: 1\ndata: {}\nloss: {}", r"'loss' .* \(lines 2 and 5\)"),
        ("base: mini\nloss: {clip: 1, 'clip': 1}", r"'clip' is given twice"),
        ("base: mini\nloss.clip: 1\nloss: {clip: 2}", r"loss\.clip: is given twice"),
        ("base: mini\nbase: paper", "'base' is given twice"),
    ],
)
def test_a_setting_that_is_given_twice_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"mine\.yaml.*{message}"):
        load_config(path)


def test_one_mapping_may_be_merged_into_another(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: mini\nloss: {<<: {clip: 2, floor: 1}, floor: 0.5}")
    loss = load_config(path).loss
    assert (loss.clip, loss.floor) == (2.0, 0.5)


def test_a_file_begins_with_the_profile_that_it_names_as_its_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: mini\nseed: 3\n")
    assert load_config(path) == load_profile("mini", seed=3)
    path.write_text("base: mini\nprofile: mine\n")
    assert load_config(path, seed=4) == load_profile("mini", seed=4, profile="mine")
    path.write_text("profile: mine\nseed: 3\n")  # a name of its own: over the defaults
    assert load_config(path) == Config(profile="mine", seed=3)
    assert load_config(PROFILES / "smoke.yaml") == load_profile("smoke")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("profile: mini", "name of profile mini, but no adapters.*write `base: mini`"),
        ("profile: smoke\nadapters: data/mini/adapters", "name of profile smoke.*`base: smoke`"),
        ("trainer: {steps: 3}", "neither a `profile`.*write `base: mini`"),
        ((PROFILES / "mini.yaml").read_text(), "neither a `profile`"),
        ("base: mnii", "'mnii' does not exist, did you mean 'mini'"),
        ("base: [mini]", "does not exist"),
        ("base:", "profile '' does not exist"),
        ("", "expected settings, got nothing"),
        ("# seed: 5", "expected settings, got nothing"),
        ("mini", "expected settings, got text"),
    ],
)
def test_a_file_with_a_profiles_name_alone_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"mine\.yaml: .*{message}"):
        load_config(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_a_saved_file_of_a_former_version_still_loads(tmp_path, name):
    """It lacks the settings that were added since, which no profile of its time had."""
    config = load_profile(name)
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del values["loss"]["own_steps"], values["trainer"]["ema"], values["sampling"]["consistency"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "config.yaml") == config
