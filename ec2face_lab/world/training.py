"""The one training loop of the laboratory: limited by steps or by time, and resumable.

    folder/checkpoints/step_000250/    modules and optimisers, see `ec2face_core.runs`
    folder/metrics.jsonl               one line per step

Whoever trains gives `train` a function that makes one step. Random numbers of a step are a function
of the seed and of its number, so resuming is bitwise identical to an uninterrupted run, as long as
the learning rate does not depend on the time.

Under torchrun the ranks share every step: each draws its own samples, and `descend` averages their
gradients. On two cores two ranks of one thread train faster than two threads of one process.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ec2face_core.config import ConfigError
from ec2face_core.fast.blocks import avoid_cudnn_attention
from ec2face_core.fast.sharding import average_gradients
from ec2face_core.guards.ranks import locked
from ec2face_core.runs import add_metrics, cut_metrics
from ec2face_core.trainer import learning_rate
from ec2face_core.training.checkpoints import (
    newest_checkpoint,
    restore_training,
    save_checkpoint,
    training_tensors,
)

from .ranks import rank_of

CHECKPOINT_SECONDS = 240.0  # of all cores between two checkpoints; an eighth of it on a GPU

Step = Callable[[int, float, torch.Generator], Mapping[str, "Tensor | float"]]

State = Mapping[str, nn.Module | Optimizer]


def train(
    folder: Path,
    step: Step,
    state: State,
    seed: int,
    *,
    steps: int = 0,
    seconds: float = 0.0,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """Call `step` until the steps or the seconds are spent; the same call again resumes.

    Args:
        folder: of checkpoints and metrics log; its name labels the progress bar.
        step: (number, progress in [0, 1], generator of this step) -> values for the metrics log.
            It updates the weights itself. Progress is the share of the time that is spent, or
            without a time limit the share of the steps.
        state: modules and optimisers to keep in checkpoints, by name.
        seed: of the generators.
        steps: limit of the steps; 0: none.
        seconds: limit of the seconds over all runs; 0: none. On the CPU they are those of one core,
            which other work on the machine does not shorten, and those of all ranks together; on a
            GPU those of the clock.
        evaluate: measures the model at every checkpoint, for the metrics log; on rank 0 alone.
        device: of the steps and of their generators.

    Returns:
        Seconds of optimisation over all runs.

    Raises:
        ConfigError: there is no limit; another training is at work in the folder; or several ranks
            have a GPU, or a limit of seconds, at which each would end by its own clock.
    """
    from tqdm.auto import tqdm

    if not (steps or seconds):
        raise ConfigError(
            f"the training {folder.name} has no limit: give --seconds, or at least as many "
            "--samples as a step has"
        )
    avoid_cudnn_attention()
    rank, ranks = rank_of()
    is_main = rank == 0
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    if ranks > 1 and (seconds or not on_cpu):
        raise ConfigError("several ranks train on the CPU, for --samples: not --seconds, not cuda")
    alone = ExitStack()
    if is_main:
        alone.enter_context(locked(folder))
    number = 0
    spent = 0.0
    if found := newest_checkpoint(folder / "checkpoints", ("seconds",)):
        _restore(state, found[0])
        number = found[1]["step"]
        spent = found[1]["seconds"]
    if is_main:
        cut_metrics(folder, number)
    saved = spent
    clock = time.process_time if on_cpu else time.perf_counter
    interval = CHECKPOINT_SECONDS if on_cpu else CHECKPOINT_SECONDS / 8
    rows: list[dict[str, Tensor | float]] = []  # read only when saved: reading waits for a GPU

    def save() -> None:
        if is_main:
            rows[-1] |= evaluate() if evaluate else {}
            add_metrics(
                folder, [{k: torch.as_tensor(v).item() for k, v in r.items()} for r in rows]
            )
            about = {"seconds": spent}
            save_checkpoint(folder / "checkpoints", number, _tensors(state), about, keep=1)
        rows.clear()

    total = round(seconds) if seconds else steps
    unit = "s" if seconds else "step"
    bar = tqdm(desc=folder.name, total=total, unit=unit, mininterval=1, disable=not is_main)
    with alone, bar:
        while spent < (seconds or math.inf) and not (steps and number >= steps):
            began = clock()
            progress = min(1.0, spent / seconds) if seconds else number / steps
            generator = torch.Generator(device)
            generator.manual_seed(seed * 1_000_003 + number + rank * 10**15)
            values = step(number, progress, generator)
            number += 1
            if not on_cpu and number % 16 == 0:
                torch.cuda.synchronize()  # so that the clock does not run ahead of the GPU
            spent += (clock() - began) * ranks
            kept = {name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()}
            rows.append({"step": number, "seconds": spent} | kept)
            bar.update(min(round(spent) if seconds else number, total) - bar.n)
            if spent - saved > interval:
                save()
                saved = spent
        if rows:
            save()
    return spent


def warmup_cosine(
    step: float, steps: float, peak: float, warmup: float, hold: float = 0.0
) -> float:
    """Learning rate of a step: a linear warm-up, then a half cosine down to 0.

    Args:
        step: number of the step, from 0.
        steps: all steps.
        peak: the highest rate.
        warmup: steps of the warm-up.
        hold: share of the steps, the warm-up included, before the cosine begins.
    """
    flat = hold * steps
    if step < flat:
        return learning_rate(step, steps=steps, peak=peak, warmup=warmup, schedule="constant")
    rest = 0 if flat else warmup
    return learning_rate(step - flat, steps=steps - flat, peak=peak, warmup=rest, schedule="cosine")


def set_learning_rates(
    optimizer: Optimizer, progress: float, warmup: float = 0.02, hold: float = 0.0
) -> None:
    """Set `warmup_cosine` at a progress in [0, 1]; the rates at construction are the peaks.

    warmup, hold: shares of the training.
    """
    for group in optimizer.param_groups:
        peak = group.setdefault("initial_lr", float(group["lr"]))
        rate = warmup_cosine(1000 * progress, 1000, peak, 1000 * warmup, hold)
        if isinstance(group["lr"], Tensor):  # a CUDA graph reads it there (`graphs`)
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def descend(optimizer: Optimizer, loss: Tensor, clip: float = 0.0) -> None:
    """One optimiser step down the ranks' mean gradient of `loss`, whose norm is clipped to `clip`.

    clip: 0: the norm is not clipped.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    if rank_of()[1] > 1:
        average_gradients(parameters)
    if clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def moving_average(net: nn.Module, decay: Callable[[int], float]) -> AveragedModel:
    """Exponential moving average of a network's parameters; buffers are copied.

    decay: number of updates so far, from 1 -> weight of the average so far. Update 0 copies.
    """
    return AveragedModel(net, avg_fn=lambda old, new, n: old.lerp(new, 1 - decay(int(n))))


class Bf16Twin:
    """A bf16 copy of a network, whose gradients train the float32 original.

    A GPU computes it faster than autocast does, which keeps normalisations in float32 and casts
    every weight at every step.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.twin = copy.deepcopy(net).to(torch.bfloat16)

    def __call__(self, *args: Any) -> Any:
        """The copy's forward pass."""
        return self.twin(*args)

    def descend(self, optimizer: Optimizer, loss: Tensor, clip: float) -> None:
        """One step of the original's optimiser down the copy's gradient; the copy follows."""
        self.twin.zero_grad(set_to_none=True)
        loss.backward()
        pairs = [
            (p, q.grad)
            for p, q in zip(self.net.parameters(), self.twin.parameters(), strict=True)
            if q.grad is not None
        ]
        optimizer.zero_grad(set_to_none=True)
        for p, gradient in pairs:
            p.grad = gradient.float()
        nn.utils.clip_grad_norm_([p for p, _ in pairs], clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(self.twin.parameters()), list(self.net.parameters()))


@torch.no_grad()
def blend(average: nn.Module, net: nn.Module, share: float) -> None:
    """Move an average's parameters towards a network's by `share` in [0, 1], all at once."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), share)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights as a function of the seed, with the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------------ checkpoints


def _tensors(state: State) -> dict[str, Tensor]:
    """Flat copies of what modules and optimisers hold, by `<name>/<key>`."""
    flat: dict[str, Tensor] = {}
    for name, part in state.items():
        if isinstance(part, nn.Module):
            tensors = part.state_dict()
        else:
            tensors = training_tensors(_numbered(part), part)
        flat |= {f"{name}/{k}": v.clone() for k, v in tensors.items() if not k.endswith("/value")}
    return flat


def _restore(state: State, tensors: Mapping[str, Tensor]) -> None:
    for name, part in state.items():
        prefix = f"{name}/"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if isinstance(part, nn.Module):
            part.load_state_dict(own)
            continue
        restore_training(_numbered(part), part, own)
        for p, values in part.state.items():  # fused steps take for granted that strides agree
            for key, value in values.items():
                if value.shape == p.shape:
                    values[key] = torch.empty_like(p).copy_(value)


def _numbered(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {str(i): p for i, p in enumerate(parameters)}
