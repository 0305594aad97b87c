"""TorchScript is a program: archives whose code touches files, and damaged ones, are refused."""

from __future__ import annotations

import zipfile

import pytest
import torch
from torch import nn

from ec2face_core.io.paths import ROOT
from ec2face_core.perception import WeightsError, check_torchscript


class Writes(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = torch.from_file(self.path, shared=True, size=4, dtype=torch.uint8)
        shared.copy_(torch.tensor([101, 118, 105, 108], dtype=torch.uint8))
        return x + shared.sum()  # else the compiler leaves it out


class Saves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "evil")
        return x


class Harmless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.load = nn.Conv2d(3, 19, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        saved = self.load(x)
        return saved.softmax(1)


def scripted(net: nn.Module, path):
    torch.jit.script(net).save(str(path))
    return path


def test_networks_that_write_files_are_refused_before_they_are_opened(tmp_path):
    with pytest.raises(WeightsError, match=r"its code has torch\.from_file"):
        check_torchscript(scripted(Writes(str(tmp_path / "evil.pth")), tmp_path / "net.pt"))
    try:
        path = scripted(Saves(), tmp_path / "saves.pt")
    except RuntimeError:  # this torch cannot script it
        return
    with pytest.raises(WeightsError, match=r"torch\.save"):
        check_torchscript(path)


@pytest.mark.parametrize(
    "code", [b"ops.image.write_file(p, x)", b"torch.classes.evil.Files()", b"ops.aten.save(x, p)"]
)
def test_so_are_operations_of_other_libraries(tmp_path, code):
    source = scripted(Harmless(), tmp_path / "net.pt")
    path = tmp_path / "other.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content + b"\n# " + code if name.endswith(".py") else content)
    with pytest.raises(WeightsError, match="may read or write files"):
        check_torchscript(path)


def test_a_harmless_network_passes_whatever_its_parts_are_called(tmp_path):
    check_torchscript(scripted(Harmless(), tmp_path / "net.pt"))
    for role in ("guiding", "scoring"):
        check_torchscript(ROOT / "data" / "mini" / f"parser_{role}.pt")


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path):
    """Torch does not compare the checksums of the archive."""
    content = (ROOT / "data" / "mini" / "parser_guiding.pt").read_bytes()
    path = tmp_path / "parser.pt"
    with zipfile.ZipFile(ROOT / "data" / "mini" / "parser_guiding.pt") as archive:
        whole = {name: archive.read(name) for name in archive.namelist()}
    noticed = 0
    for place in range(1000, len(content), len(content) // 40):
        changed = bytearray(content)
        changed[place] ^= 0x80
        path.write_bytes(changed)
        try:
            check_torchscript(path)
        except WeightsError as error:
            assert str(path) in str(error)
            noticed += 1
        else:
            with zipfile.ZipFile(path) as archive:
                assert {name: archive.read(name) for name in archive.namelist()} == whole
    assert noticed > 30
