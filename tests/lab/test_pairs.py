"""Files are given to faces whose names differ by zeros, where it is clear whose they are."""

from __future__ import annotations

import pytest

from ec2face_lab.prepare.pairs import paired


@pytest.mark.parametrize(
    ("names", "files", "expected"),
    [
        (["1", "2"], ["00001", "2"], {"1": "00001", "2": "2"}),
        (["00001"], ["1"], {"00001": "1"}),
        (["a_01_x", "0"], ["a_1_x", "000"], {"a_01_x": "a_1_x", "0": "000"}),
        (["1", "01"], ["001"], {"001": "001"}),  # whose is it?
        (["1"], ["01", "001"], {"01": "01", "001": "001"}),
        (["1", "01"], ["1", "01"], {"1": "1", "01": "01"}),
        (["10"], ["1"], {"1": "1"}),
    ],
)
def test_names_that_differ_by_zeros_pair_up(names, files, expected):
    assert paired(names, {name: name for name in files}) == expected
