"""What a training step and a sampling cost on this machine: time, FLOPs and memory.

    .venv/bin/python benchmarks/step.py                              tiny networks, on the CPU
    .venv/bin/python benchmarks/step.py --size flux --device cuda    the paper's, at random weights
    .venv/bin/python benchmarks/step.py --size flux --count          counted only, on any machine

Writes `benchmarks/step-<size>.csv` and `.json` (`step-<size>-count` with --count). All rows are run
in turn, `--repeats` times, in one process, and the best time of each is kept, because a disturbance
only adds time. Columns:

    draws        samples that share one pass over a mask (decoupled attention, noise repeats)
    batch        samples of one call
    seconds      of one call, a training step without its optimiser
    TF           counted on the very call (1 MAC = 2 FLOP), recomputation and all terms included
    TFLOP/s, share   TF over seconds, and that over the rate of one large matrix product
    saved_MB     per sample: the most that autograd kept for backward at any time, each storage
                 once, without parameters. It omits the mask's keys and values that decoupled
                 attention with recomputation also holds (0.7 GB of FLUX.1-dev), and with --count
                 the casts of autocast.
    peak_GB      on a GPU: the most memory that was allocated, weights included
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from networks import SIZES, Inputs, Networks, Size, build, flash_on_meta, inputs, place_lora
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ec2face_core.backbone import decode_latents
from ec2face_core.config import LoraConfig, LossConfig, load_profile
from ec2face_core.consistency import PixelConsistency
from ec2face_core.flow import reverse_estimate
from ec2face_core.losses import flow_matching_loss
from ec2face_core.mask_branch import install_mask_branch, precompute_mask_kv, predict_velocity
from ec2face_core.runs import provenance

STEPS = 28
COLUMNS = (
    "component", "attention", "checkpointing", "draws", "batch", "seconds", "samples_per_s", "TF",
    "TFLOP/s", "share", "saved_MB", "peak_GB",
)  # fmt: skip
TAIL = "transformer, LoRA on mask tokens only"
EVERYWHERE = "transformer, LoRA times 0 or 1 on all"
CACHED = "sampling, mask once"
UNCACHED = "sampling, mask every step"


@dataclass
class Case:
    """A row: the call, and how the transformer is set up for it."""

    component: str
    work: Callable[[], object]
    attention: str = ""
    checkpointing: str = ""
    draws: int = 1
    seconds: list[float] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)  # flops, saved, peak; bytes
    failed: str = ""


def cases(n: Networks, x: Inputs, size: Size) -> Iterator[Case]:
    """Every row of the table."""
    b = len(x.t)
    target = torch.randn_like(x.z)
    consistency = PixelConsistency(n.vae, n.clip, n.parser, LossConfig())

    def mixed() -> AbstractContextManager:
        """As in training at paper scale: weights in bfloat16, the LoRA float32 under autocast."""
        return torch.autocast("cuda", torch.bfloat16) if x.z.is_cuda else nullcontext()

    def velocity(attention: str = "joint", draws: int = 1) -> Tensor:
        mask = x.z_mask[: b // draws]
        if attention == "decoupled":
            mask = precompute_mask_kv(n.transformer, mask)[torch.arange(b) // draws]
        return predict_velocity(n.transformer, x.z, x.t, x.text, mask)

    def step(attention: str = "joint", draws: int = 1, pixels: bool = False) -> tuple[Tensor, ...]:
        """Gradient of the LoRA: flow matching, and the two-stage pixel losses as in training."""
        with mixed():
            v = velocity(attention, draws)
        loss = flow_matching_loss(v, target).mean()
        if pixels:
            z_hat = reverse_estimate(x.z, v, x.t)
            with mixed():
                g, *_ = consistency.gradient(z_hat, ["face"] * b, x.label_map, x.t)
            loss = loss + (z_hat * g).sum() / b
        return torch.autograd.grad(loss, n.parameters)

    def through(network: Callable[[Tensor], Tensor], given: Tensor) -> tuple[Tensor, ...]:
        leaf = given.detach().requires_grad_()
        with mixed():
            loss = network(leaf).float().square().mean()
        return torch.autograd.grad(loss, leaf)

    @torch.no_grad()
    def sample(attention: str, cache: bool) -> None:
        z = x.z
        mask = precompute_mask_kv(n.transformer, x.z_mask) if cache else x.z_mask
        for i in range(STEPS):
            t = torch.full_like(x.t, 1 - i / STEPS)
            z = z - predict_velocity(n.transformer, z, t, x.text, mask) / STEPS

    yield Case(TAIL, step, "joint", "none")
    yield Case(EVERYWHERE, step, "joint", "none")
    kinds = [("joint", "full", 1), ("decoupled", "none", 1), ("decoupled", "full", 1)]
    kinds += [("decoupled", "none", draws) for draws in (2, 4)]
    for kind in kinds:
        yield Case("transformer", lambda k=kind: step(k[0], k[2]), *kind)
    yield Case("autoencoder's decoder", lambda: through(partial(decode_latents, n.vae), x.z))
    pictures = torch.rand_like(x.label_map[:, None].expand(-1, 3, -1, -1), dtype=torch.float32)
    yield Case("parser", lambda: through(n.parser.probabilities, pictures))
    yield Case("CLIP image encoder", lambda: through(n.clip.image_features, pictures))
    for kind in (("joint", "none", 1), *kinds):
        yield Case("whole step", lambda k=kind: step(k[0], k[2], pixels=True), *kind)
    yield Case("sampling", lambda: sample("joint", False), "joint")
    yield Case(UNCACHED, lambda: sample("decoupled", False), "decoupled")
    yield Case(CACHED, lambda: sample("decoupled", True), "decoupled")


def prepare(case: Case, n: Networks, size: Size) -> None:
    """Bring the transformer into the state of a row."""
    config = LoraConfig(rank=size.rank, alpha=size.rank, attention=case.attention or "joint")
    install_mask_branch(n.transformer, config)
    change = "enable" if case.checkpointing == "full" else "disable"
    getattr(n.transformer, f"{change}_gradient_checkpointing")()
    place_lora(n.transformer, size, everywhere=case.component == EVERYWHERE)


class Saved(saved_tensors_hooks):
    """The most bytes that autograd keeps for backward at once: each storage once, no parameters."""

    def __init__(self, n: Networks) -> None:
        nets = (n.transformer, n.vae, n.parser.net, n.clip.model)
        weights = {t.untyped_storage()._cdata for net in nets for t in net.state_dict().values()}
        holders: Counter[int] = Counter()
        total = self
        self.bytes = 0
        self.peak = 0

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                storage = tensor.untyped_storage()
                self.tensor = tensor
                self.key = storage._cdata
                self.nbytes = 0 if self.key in weights else storage.nbytes()
                holders[self.key] += 1
                if holders[self.key] == 1:
                    total.bytes += self.nbytes
                    total.peak = max(total.peak, total.bytes)

            def __del__(self) -> None:
                holders[self.key] -= 1
                if not holders[self.key]:
                    total.bytes -= self.nbytes

        super().__init__(Kept, lambda kept: kept.tensor)


def count(case: Case, n: Networks, size: Size) -> None:
    """FLOPs, bytes saved and, on a GPU, peak memory of one call, which also warms up."""
    prepare(case, n, size)
    saved = Saved(n)
    flops = FlopCounterMode(display=False)
    if cuda := n.parameters[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with flash_on_meta(), saved, flops:
        case.work()
    case.counted = {"flops": flops.get_total_flops(), "saved": saved.peak}
    if cuda:
        case.counted["peak"] = torch.cuda.max_memory_allocated()


def clock(work: Callable[[], object], device: str) -> float:
    """Seconds of a call, to its end on the device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin


def matmul_rate(size: Size, device: str) -> float:
    """FLOP/s of a large matrix product in the dtype of the weights, best of three."""
    d = 8192 if device == "cuda" else 2048
    a = torch.randn(d, d, device=device, dtype=size.dtype)
    return 2 * d**3 / min(clock(lambda: a @ a, device) for _ in range(3))


def row_of(case: Case, batch: int, rate: float) -> dict[str, Any]:
    """A row of the table; empty where nothing was measured."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {k: getattr(case, k) for k in ("component", "attention", "checkpointing", "draws")}
    row |= {"batch": batch, "seconds": case.failed}
    if case.counted:
        row |= {"TF": case.counted["flops"] / 1e12, "saved_MB": case.counted["saved"] / batch / 1e6}
        row["peak_GB"] = case.counted["peak"] / 1e9 if "peak" in case.counted else ""
    if case.seconds:
        best = min(case.seconds)
        speed = case.counted["flops"] / best
        row |= {"seconds": best, "samples_per_s": batch / best}
        row |= {"TFLOP/s": speed / 1e12, "share": speed / rate}
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Factors by which the LoRA and the sampling are faster, or by which they need fewer FLOPs."""
    cost = {row["component"]: row["seconds"] or row["TF"] for row in rows}
    pairs = {TAIL: EVERYWHERE, CACHED: UNCACHED}
    ran = {k: v for k, v in pairs.items() if "out of memory" not in (cost[k], cost[v])}
    return {k: round(float(cost[v]) / float(cost[k]), 3) for k, v in ran.items()}


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--count", action="store_true", help="run nothing")
    parser.add_argument("--batch", type=int, help="samples of a call, a multiple of 4")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of a row, at least 3")
    args = parser.parse_args()
    args.batch = args.batch or SIZES[args.size].batch
    if args.batch % 4 or args.repeats < 3:
        parser.error("--batch has to be a multiple of 4, --repeats at least 3")
    if not args.count and (args.size, args.device) == ("flux", "cpu"):
        parser.error("FLUX.1-dev needs a GPU: --device cuda; or --count, which runs nothing")
    if not args.count and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU that PyTorch can use")
    return args


def main() -> None:
    """Count, measure, print and write the table."""
    from tqdm.auto import tqdm

    args = arguments()
    begin = time.perf_counter()
    size = SIZES[args.size]
    device = "meta" if args.count else args.device
    n = build(size, device)
    x = inputs(size, args.batch, device)
    rows_to_do = list(cases(n, x, size))
    rate = 0.0
    rounds = 0 if args.count else args.repeats
    with tqdm(total=len(rows_to_do) * (1 + rounds), unit="call", mininterval=1) as bar:
        for case in rows_to_do:
            try:
                count(case, n, size)
            except torch.OutOfMemoryError:
                case.failed = "out of memory"
            bar.update()
        for _ in range(rounds):
            rate = max(rate, matmul_rate(size, device))
            for case in rows_to_do:
                if not case.failed:
                    prepare(case, n, size)
                    case.seconds.append(clock(case.work, device))
                bar.update()
    rows = [row_of(case, args.batch, rate) for case in rows_to_do]
    widths = {c: max(len(c), *(len(str(row[c])) for row in rows)) for c in COLUMNS}
    for row in (dict(zip(COLUMNS, COLUMNS, strict=True)), *rows):
        print("  ".join(f"{row[c]!s:{widths[c]}}" for c in COLUMNS))
    print("times faster" if rounds else "times fewer FLOPs", ratios(rows))

    record = provenance(
        load_profile("mini" if args.size == "tiny" else "paper"),
        notebook=Path(__file__).name, seconds=time.perf_counter() - begin, size=args.size,
        device=device, repeats=rounds, threads=torch.get_num_threads(), dtype=str(size.dtype),
        matmul_tflops=round(rate / 1e12, 4), ratios=ratios(rows),
        cpu=torch.backends.cpu.get_cpu_capability(), date=time.strftime("%Y-%m-%d"),
    )  # fmt: skip
    name = f"step-{args.size}{'-count' if args.count else ''}"
    path = Path(__file__).with_name(f"{name}.csv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
