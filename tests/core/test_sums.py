"""Hashes of kept weights, whole tensors files, leftovers of killed processes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ec2face_core.io.paths import ROOT
from ec2face_core.io.sums import DamagedError, check_sums, list_sums, weights_digest
from ec2face_core.runs import (
    LARGE,
    part_name,
    path_digest,
    remove_leftovers,
    write_tensors,
)


@pytest.fixture
def bundle(tmp_path):
    """A folder like data/mini: weights in folders below it, listed above."""
    for name in ("flux/vae/w.safetensors", "flux/model_index.json", "clip/w.safetensors", "p.pt"):
        path = tmp_path / "bundle" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "bundle" / "flux" / "provenance.json").write_text("{}")
    (tmp_path / "bundle" / "SHA256SUMS").touch()
    for name in ("flux", "clip", "p.pt"):
        list_sums(tmp_path / "bundle" / name)
    return tmp_path / "bundle"


def test_the_list_is_sha256sums_own(bundle):
    lines = (bundle / "SHA256SUMS").read_text().splitlines()
    assert [line[66:] for line in lines] == [
        "clip/w.safetensors", "flux/model_index.json", "flux/vae/w.safetensors", "p.pt",
    ]  # fmt: skip
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=bundle, check=True)


@pytest.mark.parametrize("name", ["flux/vae/w.safetensors", "clip/w.safetensors", "p.pt"])
def test_a_changed_file_is_refused_by_name(bundle, name):
    path = bundle / name
    check_sums(bundle)
    stat = path.stat()
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had happened
    for what in (path, path.parent):
        with pytest.raises(DamagedError, match=f"{path.name} is damaged"):
            check_sums(what)
    list_sums(path)  # written anew on purpose
    check_sums(bundle)


def test_notes_beside_weights_are_no_content(bundle):
    before = [weights_digest(bundle), weights_digest(bundle / "p.pt")]
    (bundle / "flux" / "provenance.json").write_text('{"other": 1}')
    (bundle / "README.md").write_text("notes")
    assert [weights_digest(bundle), weights_digest(bundle / "p.pt")] == before
    (bundle / "p.pt").write_text("P.pt")  # of equal size, at once
    after = [weights_digest(bundle), weights_digest(bundle / "p.pt")]
    assert after[0] != before[0] and after[1] != before[1]


def test_what_is_not_listed_passes(bundle, tmp_path):
    (bundle / "flux" / "new.safetensors").write_text("x")
    (bundle / "flux" / "provenance.json").write_text("other")
    check_sums(bundle)
    (tmp_path / "alone.pt").write_text("x")
    check_sums(tmp_path / "alone.pt")
    check_sums(tmp_path / "absent")


def test_a_broken_list_lists_nothing_wrong(bundle):
    sums = bundle / "SHA256SUMS"
    sums.write_bytes(b"\xff\xfe garbage\n" + sums.read_bytes())
    check_sums(bundle)


def test_a_folder_alone_carries_its_list(tmp_path):
    (tmp_path / "final").mkdir()
    write_tensors(tmp_path / "final" / "w.safetensors", {"a": torch.ones(3)})
    list_sums(tmp_path / "final" / "w.safetensors")
    digest = path_digest(tmp_path / "final")
    copy = shutil.copytree(tmp_path / "final", tmp_path / "copy")
    (tmp_path / "final" / "SHA256SUMS").unlink()
    assert path_digest(tmp_path / "final") == digest  # the list adds nothing to the content
    (copy / "w.safetensors").write_bytes(b"half")
    with pytest.raises(DamagedError):
        check_sums(copy)


def test_the_clones_own_weights_are_those_that_were_kept():
    check_sums(ROOT / "data" / "mini")
    listed = {line[66:] for line in (ROOT / "data/mini/SHA256SUMS").read_text().splitlines()}
    weights = {
        path.relative_to(ROOT / "data" / "mini").as_posix()
        for path in (ROOT / "data" / "mini").rglob("*")
        if path.suffix in (".safetensors", ".pt")
    }
    assert weights <= listed


def test_equal_tensors_give_equal_files(tmp_path):
    """In other processes, too, whose hash order differs."""
    code = (
        "import sys, torch; from pathlib import Path; from ec2face_core.runs import write_tensors\n"
        "write_tensors(Path(sys.argv[1]), {'b': torch.ones(2), 'a': torch.zeros(3).half()},"
        " {k: k * 3 for k in 'zyxwvu'})"
    )
    contents = set()
    for k in range(2):
        path = tmp_path / f"{k}.safetensors"
        subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)
        contents.add(path.read_bytes())
    metadata = {k: k * 3 for k in "uvwxyz"}
    for k in range(8):
        path = tmp_path / f"here{k}.safetensors"
        write_tensors(path, {"b": torch.ones(2), "a": torch.zeros(3).half()}, metadata)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert torch.equal(load_file(path)["b"], torch.ones(2))


def test_large_files_are_known_by_samples_of_their_content(tmp_path):
    """A copy of FLUX.1-dev on another disk is the same, whatever its times are."""
    path = tmp_path / "large.bin"
    with open(path, "wb") as file:
        file.truncate(LARGE + 5 * 2**20)
    digest = path_digest(path)
    os.utime(path, ns=(0, 0))
    assert path_digest(path) == digest
    for place in (0, LARGE, LARGE + 5 * 2**20 - 1):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert path_digest(path) != digest
        digest = path_digest(path)


def test_leftovers_of_the_dead_are_removed_and_others_stay(tmp_path):
    node = platform.node()
    dead = (f".w.{node}.999999", f".step_000004.{node}.999999", f".a.b.png.{node}.999999")
    other = (
        f".w.{os.getpid()}",
        ".w.elsewhere.999999",
        ".hidden",
        "w",
        part_name(tmp_path / "w").name,
    )
    for name in dead[:1]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    for name in (*dead[1:], *other):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(other)
    remove_leftovers(tmp_path / "absent")
