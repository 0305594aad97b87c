"""Gradient norms of the losses against a derivation by hand."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from ec2face_core.backbone import load_backbone
from ec2face_core.config import Config
from ec2face_core.data import open_dataset
from ec2face_core.io.lora_file import save_mask_lora
from ec2face_core.losses import beta
from ec2face_core.mask_branch import add_mask_lora
from ec2face_lab.study import gradients
from ec2face_lab.study.gradients import FLOW, MASK, TEXT


@pytest.fixture(scope="module")
def config(tiny_config: Config, tmp_path_factory) -> Config:
    """With an adapter that is not zero, and batches of two."""
    folder = tmp_path_factory.mktemp("adapters")
    transformer = load_backbone(tiny_config.backbone, ("transformer",)).transformer
    generator = torch.Generator().manual_seed(0)
    for p in add_mask_lora(transformer, tiny_config.lora):
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    length = tiny_config.backbone.text_length
    save_mask_lora(transformer, folder / "both", tiny_config.lora, length)
    return tiny_config.replace(adapters=str(folder))


def wide(table: pd.DataFrame, modulated: bool) -> pd.DataFrame:
    return table[table["modulated"] == modulated].pivot(index="t", columns="loss", values="norm")


@pytest.mark.slow
def test_norms_follow_the_equations(config):
    """d z_hat / d v = -t: nothing at t = 0; alpha and beta(t) are factors; kept and read again."""
    table = gradients.gradient_norms(config, batches=1)
    plain, faded = wide(table, False), wide(table, True)
    assert (plain[FLOW] > 0).all()
    for name in (TEXT, MASK):
        assert plain.loc[0.0, name] == 0 and (plain.loc[0.1:, name] > 0).all()
        t = torch.tensor(plain.index.to_numpy())
        expected = plain[name].to_numpy() * beta(t, 10.0, 0.4).numpy()
        assert faded[name].to_numpy() == pytest.approx(expected, rel=1e-4)
    double = config.replace(loss={"alpha_mask": 2 * config.loss.alpha_mask})
    more = wide(gradients.gradient_norms(double, batches=1), False)
    assert more[MASK].to_numpy() == pytest.approx(2 * plain[MASK].to_numpy(), rel=1e-3)
    assert more[TEXT].to_numpy() == pytest.approx(plain[TEXT].to_numpy(), rel=1e-3)


@pytest.mark.slow
def test_systematic_gradients_are_those_of_training_batches(config, monkeypatch):
    """More batches than faces: they begin again with other noise; alpha is a factor."""
    table = gradients.systematic_gradients(config, batches=8).set_index("loss")
    assert (table["batch_norm"] > 0).all() and (table["systematic"] <= table["batch_norm"]).all()
    terms = gradients.Terms(config, "both", open_dataset(config, "train"))
    batch = terms.batch(7)
    norms = []
    for k in range(8):
        batch = terms.batch(k)
        loss = terms.losses(batch, batch["t"])[MASK]
        whole = (beta(batch["t"], 10.0, 0.4) * loss).mean()
        norms.append(float(terms.gradient(whole, last=True).norm()) ** 2)
    expected = (sum(norms) / 8) ** 0.5
    assert table.loc[MASK, "batch_norm"] == pytest.approx(expected, rel=1e-3)
    whole = terms.gradients(batch, batch["t"], modulated=True)
    monkeypatch.setattr(gradients, "pictures_at_once", lambda area: 1)  # one face after another
    for name, apart in terms.gradients(batch, batch["t"], modulated=True).items():
        torch.testing.assert_close(apart, whole[name], rtol=1e-3, atol=1e-6)
    assert (batch["captions"], len(set(batch["t"].tolist()))) == (terms.batch(1)["captions"], 2)


def test_the_sentence_and_the_figure():
    t = [0.2, 0.4]
    rows = [
        {"t": at, "loss": name, "modulated": modulated, "norm": norm * at}
        for at in t
        for name, norm in ((FLOW, 2.0), (TEXT, 1.0), (MASK, 0.5))
        for modulated in ((False,) if name == FLOW else (False, True))
    ]
    rows[-1]["norm"] = 0.4
    said = gradients.describe_gradients(pd.DataFrame(rows))
    share = "at most 50 % of the norm of flow matching's gradient in a batch"
    assert f"{TEXT}, β ≡ 1: {share}, at t = 0.2" in said
    assert f"{MASK}, with β(t): {share}, at t = 0.4" in said
    fig = gradients.gradient_figure(pd.DataFrame(rows))
    assert len(fig.axes[0].lines) == 5


def test_the_systematic_part_is_the_norm_of_the_mean():
    """Unbiased in the square, whatever the noise; bounds two standard errors of it away."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, generator=generator)
    true = float(mean.norm())
    squares = []
    inside = 0
    for _ in range(300):
        draws = mean + 5 * torch.randn(12, 50, generator=generator)
        part = gradients.systematic_part(draws)
        assert part["batch_norm"] == pytest.approx(float(draws.square().sum(1).mean() ** 0.5))
        naive = [float(a @ b) for i, a in enumerate(draws) for j, b in enumerate(draws) if i != j]
        assert part["systematic"] ** 2 == pytest.approx(max(sum(naive) / len(naive), 0), rel=1e-3)
        squares.append(sum(naive) / len(naive))
        inside += part["ci_low"] <= true <= part["ci_high"]
    error = torch.tensor(squares).std() / 300**0.5
    assert abs(sum(squares) / 300 - true**2) < 3 * error
    assert 0.88 < inside / 300 <= 1
    assert pd.isna(gradients.systematic_part(draws[:2])["systematic"])


def test_the_sentence_of_the_systematic_parts():
    row = {"batch_norm": 0.12, "systematic": 0.0075, "ci_low": 0.0, "ci_high": 0.012}
    table = pd.DataFrame([{"loss": name} | row for name in (FLOW, TEXT, MASK)])
    said = gradients.describe_systematic(table)
    assert f"{FLOW}: 0.12 in one batch, of which 0.0075 [0, 0.012] is systematic" in said
    assert f"{MASK}, with β(t): 0.12" in said
