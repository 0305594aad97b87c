"""A training that is resumed otherwise than it was begun goes on, or says why not, early."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file

from ec2face_core import trainer as trainer_module
from ec2face_core.config import Config, ConfigError
from ec2face_core.guards.ranks import locked
from ec2face_core.io.lora_file import LORA_FILE, read_mask_lora
from ec2face_core.runs import read_metrics
from ec2face_core.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return tiny_config.replace(trainer={"steps": 2, "checkpoint_every": 1, "warmup": 0})


@pytest.fixture(scope="module")
def begun(config, tmp_path_factory):
    """Two steps of two samples."""
    folder = tmp_path_factory.mktemp("run") / "begun"
    Trainer(config, "none", folder).fit()
    return folder


@pytest.fixture
def run_dir(begun, tmp_path):
    """A copy of them."""
    return shutil.copytree(begun, tmp_path / "run")


def final(folder):
    return load_file(folder / "final" / LORA_FILE)


def test_another_batch_and_more_steps(config, run_dir):
    Trainer(config.replace(trainer={"steps": 4, "batch_size": 4}), "none", run_dir).fit()
    rows = read_metrics(run_dir)
    assert [row["samples"] for row in rows] == [2, 4, 8, 12]
    settings = read_mask_lora(run_dir / "final").settings
    assert settings["trainer.samples"] == 3  # on average: found by no configuration
    with pytest.raises(ConfigError, match=r"holds a training of 4 steps, more than.* 2"):
        Trainer(config, "none", run_dir).fit()


def test_a_final_folder_of_fewer_steps_is_not_taken_for_the_result(config, begun, run_dir):
    """As after a kill between the last checkpoint and the LoRA."""
    longer = config.replace(trainer={"steps": 3})
    Trainer(longer, "none", run_dir).fit()
    expected = final(run_dir)
    shutil.rmtree(run_dir / "final")
    shutil.copytree(begun / "final", run_dir / "final")
    Trainer(longer, "none", run_dir).fit()
    assert all((final(run_dir)[name] == value).all() for name, value in expected.items())


def test_stopped_by_sigterm_after_a_step_and_resumed_to_the_same_bits(
    config, begun, tmp_path, monkeypatch
):
    trainer = Trainer(config.replace(trainer={"checkpoint_every": 100}), "none", tmp_path)
    update = Trainer.update

    def interrupted(self):
        update(self)
        self.stop()

    monkeypatch.setattr(Trainer, "update", interrupted)
    with pytest.raises(SystemExit) as ended:
        trainer.fit()
    assert ended.value.code == 143
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    monkeypatch.undo()
    Trainer(config, "none", tmp_path).fit()
    assert all((final(tmp_path)[name] == value).all() for name, value in final(begun).items())


def test_a_moved_data_root_goes_on_and_an_edited_one_is_refused(config, run_dir, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(config.data.root, moved)
    other = config.replace(trainer={"steps": 3}, data={"root": str(moved)})
    Trainer(other, "none", run_dir).fit()
    caption = moved / "text" / "0.txt"
    caption.write_text(caption.read_text().replace("e", "a", 1))
    with pytest.raises(ConfigError, match=r"the content of data\.root"):
        Trainer(other.replace(trainer={"steps": 4}), "none", run_dir).fit()


def test_two_trainings_in_one_folder(config, run_dir):
    with locked(run_dir), pytest.raises(ConfigError, match="another training"):
        Trainer(config, "none", run_dir).fit()


def test_a_size_that_does_not_divide_is_refused_before_anything_is_encoded(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        trainer_module.LatentCache, "__init__", lambda *_: pytest.fail("it was encoded")
    )
    wrong = config.replace(data={"size": 70, "cache": str(tmp_path / "cache")})
    with pytest.raises(ConfigError, match=r"data\.size 70: must be a multiple of 8"):
        Trainer(wrong, "none", tmp_path).fit()


def test_strange_neighbours_and_a_linked_checkpoint(config, run_dir, tmp_path):
    checkpoints = run_dir / "checkpoints"
    shutil.copytree(checkpoints / "step_000002", checkpoints / "step_best")
    shutil.copytree(checkpoints / "step_000002", checkpoints / "step_000250 copy")
    (checkpoints / "step_000001").rename(tmp_path / "elsewhere")
    (checkpoints / "step_000001").symlink_to(tmp_path / "elsewhere")
    Trainer(config.replace(trainer={"steps": 4}), "none", run_dir).fit()
    assert (tmp_path / "elsewhere" / "state.json").is_file()
    assert len(read_metrics(run_dir)) == 4
