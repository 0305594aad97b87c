"""What the training notebook says of a run."""

from __future__ import annotations

import json

from ec2face_lab.study import ablation


def test_sentence_of_a_run(tmp_path):
    rows = [{"step": i, "unweighted_flow": 1.0 - 0.1 * i} for i in range(8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = ablation.describe_training(tmp_path)
    assert "0.950 over the first 2 steps, 0.350 over the last 2" in said
