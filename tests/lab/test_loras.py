"""The LoRAs that come with a clone."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ec2face_core.config import VARIANTS, load_profile, trained_dir
from ec2face_core.io.lora_file import LORA_FILE, read_mask_lora
from ec2face_core.io.paths import resolve
from ec2face_core.io.sums import DamagedError
from ec2face_lab.__main__ import main


def test_trained_loras_are_kept_in_half_precision(tmp_path, monkeypatch, capsys):
    profile = load_profile("mini")
    kept = tmp_path / "kept"
    config = profile.replace(profile=str(tmp_path / "runs"), adapters=str(kept))
    monkeypatch.setattr("ec2face_lab.commands.keep.load_profile", lambda _: config)
    for variant in VARIANTS:
        shutil.copytree(resolve(profile.adapters) / variant, trained_dir(config, variant))
    assert main(["keep", "--seeds", "2"]) == 2  # the second seed is not trained
    assert "none-seed43" in capsys.readouterr().err and not kept.exists()
    assert main(["keep", "--seeds", "1"]) == 0
    assert capsys.readouterr().out.split() == [str(kept / variant) for variant in VARIANTS]
    for variant in VARIANTS:
        trained = load_file(trained_dir(config, variant) / LORA_FILE)
        half = load_file(kept / variant / LORA_FILE)
        assert half.keys() == trained.keys()
        for name, value in half.items():
            assert value.dtype == torch.float16
            torch.testing.assert_close(value.float(), trained[name], rtol=1e-3, atol=1e-6)
        assert read_mask_lora(kept / variant) == read_mask_lora(trained_dir(config, variant))
        assert (kept / variant / "provenance.json").is_file()
    with open(kept / "none" / LORA_FILE, "ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedError):
        read_mask_lora(kept / "none")
