"""The sentence about one condition alone."""

from __future__ import annotations

import pandas as pd

from ec2face_lab.study.unimodal import describe_one_condition


def test_sentence_of_one_condition():
    values = {
        "Text, text alone": 44,
        "OAA, mask alone": 80,
        "Text, EC2Face": 45,
        "OAA, EC2Face": 82,
    }
    rows = pd.DataFrame(
        [{"critic": "independent", "metric": m, "value": float(v)} for m, v in values.items()]
    )
    assert "Text score 44.0 from text alone, 45.0 from both" in describe_one_condition(rows)
