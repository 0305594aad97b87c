"""Steps that a GPU replays are the steps that are called."""

from __future__ import annotations

import pytest
import torch

from ec2face_lab.world.graphs import WARM_UP, Replayed, optimiser_options
from ec2face_lab.world.training import descend, set_learning_rates

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_replayed_steps_train_as_called_ones(device):
    device = torch.device(device)
    results = []
    for replay in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
        net.to(device)
        optimizer = torch.optim.AdamW(net.parameters(), **optimiser_options(device, 0.05))

        def update(part, x, y, net=net, optimizer=optimizer):
            loss = (net(x[part:]) - y[part:]).square().mean()
            descend(optimizer, loss, clip=1.0)
            return {"loss": loss}

        step = Replayed(update, device)
        step.on_gpu &= replay
        losses = []
        for number in range(4 * WARM_UP):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(16, 4, generator=generator).to(device)
            set_learning_rates(optimizer, number / 12, warmup=0.2)
            losses.append(step(number % 2, x=x, y=x.sum(1, keepdim=True))["loss"].detach().cpu())
        assert step.on_gpu == (replay and device.type == "cuda"), "the capture has failed"
        results.append(losses)
    called, replayed = results
    assert torch.stack(replayed).diff().abs().min() > 0, "inputs and weights change"
    torch.testing.assert_close(replayed, called, rtol=1e-4, atol=1e-5)


def test_without_a_key_the_function_gets_the_tensors_alone():
    step = Replayed(lambda x: {"twice": 2 * x}, torch.device("cpu"))
    assert step(x=torch.ones(1))["twice"] == 2
