"""What EC²Face's training step and sampling cost on this GPU, by part and beside a plain loop.

    bash benchmarks/gpu/step.sh          FLUX.1-dev's configuration at random weights, 512 px
    bash benchmarks/gpu/step.sh tiny     networks of the miniature's classes, also on the CPU

The step is the trainer's own (`Trainer.update`): data, transformer with its LoRA, decoder, parser
and CLIP with their gradients, clipping and optimiser. Weights are random, made on the device and
never written. Rows are measured in the order of their importance until the time is over. Rows that
the table has already, of the same card and torch, are kept, so the same command goes on; where OUT
has none, the table beside this script is continued.

Columns of `step-<size>.csv`:

    what               training step; a part of it; plain loop; sampling
    attention, text, batch, repeats, recompute, compile, dropped
                       settings, see `random_trainer.Settings`
    ms                 of a call, the median
    ms_a_sample        of a sample, or of a picture with all its steps
    TF_a_sample        counted on the call without compilation (1 MAC = 2 FLOP), recomputation
                       and all terms included
    TFLOP/s, share     and that over the rate of a large matrix product in the weights' dtype
    peak_GB            most memory allocated, all networks included
    times_the_loop     how many times faster a sample is than in the plain loop
    card, driver, torch, commit

`kernels-<size>.csv`: the ten kernels that take most time of a training step.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from networks import SIZES, Inputs, Networks, Size, build, inputs
from plain_loop import PlainLoop, loop_text
from random_trainer import RandomTrainer, Settings, configuration, reset
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ec2face_core.backbone import decode_latents
from ec2face_core.fast.blocks import avoid_cudnn_attention, prepare_blocks
from ec2face_core.fast.precision import guides_precision
from ec2face_core.mask_branch import precompute_mask_kv, predict_velocity
from ec2face_core.runs import provenance, whole_file
from ec2face_core.trainer import Batch

STEPS = 28  # of sampling
SETTINGS = ("attention", "text", "batch", "repeats", "recompute", "compile", "dropped")
COLUMNS = (
    "what", *SETTINGS, "ms", "ms_a_sample", "TF_a_sample", "TFLOP/s", "share", "peak_GB",
    "times_the_loop", "card", "driver", "torch", "commit",
)  # fmt: skip
STEP = "training step"
LOOP = "plain loop"
SAMPLING = "sampling"
BASE = Settings()  # joint, 128 text tokens, two samples


@dataclass
class Bench:
    """Networks, table and clock of a run.

    Attributes:
        size: of the networks.
        device: where they are.
        out: folder of the tables.
        seconds: until no new row begins.
        repeats: calls of a row.
    """

    size: Size
    device: torch.device
    out: Path
    seconds: float
    repeats: int
    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.facts = facts(self.device)
        self.path = self.out / f"step-{self.name}.csv"
        kept = self.path if self.path.is_file() else Path(__file__).parent / self.path.name
        if kept.is_file():
            with kept.open(newline="") as file:
                self.rows = [r for r in csv.DictReader(file) if self._is_ours(r)]
        self.rate = matmul_rate(self.size, self.device)
        self.networks = self._build()

    def _is_ours(self, row: dict[str, str]) -> bool:
        return all(row[key] == self.facts[key] for key in ("card", "torch"))

    def _build(self) -> Networks:
        n = build(self.size, str(self.device))
        n.parser.net.float()  # the trainer has them in float32, under autocast
        n.clip.model.float()
        return n

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.perf_counter() - self.began)

    def has(self, what: str, settings: Settings) -> bool:
        """Whether the table has a row."""
        wanted = [what, *(str(getattr(settings, name)) for name in SETTINGS)]
        return any(
            [row["what"], *(str(row[name]) for name in SETTINGS)] == wanted for row in self.rows
        )

    def measure(
        self,
        what: str,
        settings: Settings,
        call: Callable[[], object],
        flops: float | None = None,
        warm_up: Callable[[], object] | None = None,
        repeats: int = 0,
    ) -> None:
        """Warm up, time and count a call, and add its row; out of memory is a row, too.

        Args:
            what: the row's name.
            settings: of the row.
            call: the work.
            flops: of a call; None: counted on one.
            warm_up: called before; None: `call`.
            repeats: timed calls; 0: as many as the bench says.
        """
        samples = settings.batch
        row: dict[str, Any] = {"what": what} | asdict(settings) | self.facts
        try:
            counted = self.count(call) if flops is None else flops
            (warm_up or call)()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = median_seconds(call, self.device, repeats or self.repeats)
        except torch.OutOfMemoryError:
            row["ms"] = "out of memory"
        else:
            row |= {"ms": 1000 * seconds, "ms_a_sample": 1000 * seconds / samples}
            if counted:
                row |= {"TF_a_sample": counted / samples / 1e12}
                row |= {"TFLOP/s": counted / seconds / 1e12, "share": counted / seconds / self.rate}
            if self.device.type == "cuda":
                row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, write the table and print the row."""
        self.rows.append(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k in COLUMNS}
        )
        loops = [r["ms_a_sample"] for r in self.rows if r["what"] == LOOP and r.get("ms_a_sample")]
        for r in self.rows:
            if loops and r["what"] == STEP and r.get("ms_a_sample"):
                r["times_the_loop"] = f"{float(loops[-1]) / float(r['ms_a_sample']):.3g}"
        write_table(self.path, COLUMNS, self.rows)
        shown = [str(self.rows[-1].get(name, "")) for name in COLUMNS[:13]]
        print("  ".join(shown), f"({self.left:.0f} s left)", flush=True)

    def count(self, call: Callable[[], object]) -> float:
        """FLOP of a call."""
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()


# ------------------------------------------------------------------------------------ the rows


def training_rows(bench: Bench, all_settings: list[Settings]) -> None:
    """The trainer's own step in each of the settings."""
    for settings in all_settings:
        if bench.has(STEP, settings) or bench.left < (60 if settings.compile else 15):
            continue
        clean(bench.device)
        trainer = RandomTrainer(bench.networks, bench.size, settings)
        trainer.setup()
        flops = None
        if settings.compile:  # the counter does not see what is compiled
            flops = counted_before(bench, dataclasses.replace(settings, compile=False))
        bench.measure(STEP, settings, trainer.update, flops=flops)


def counted_before(bench: Bench, settings: Settings) -> float:
    """FLOP of a training step that a row without compilation has, else 0."""
    for row in bench.rows:
        same = all(str(row[name]) == str(getattr(settings, name)) for name in SETTINGS)
        if same and row["what"] == STEP and row.get("TF_a_sample"):
            return float(row["TF_a_sample"]) * 1e12 * settings.batch
    return 0.0


def part_rows(bench: Bench, settings: Settings) -> None:
    """The parts of a training step, each alone."""
    clean(bench.device)
    trainer = RandomTrainer(bench.networks, bench.size, settings)
    trainer.setup()
    b = settings.batch
    x = trainer._prepare(trainer.stream.sample(range(b)))
    images = torch.zeros(len(x.z), 3, bench.size.pixels, bench.size.pixels, device=trainer.device)
    n = bench.networks

    def velocity() -> Tensor:
        mask = trainer._mask_condition(x)
        return predict_velocity(trainer.model, x.z, x.t, x.text, mask)

    def gradient() -> object:
        return torch.autograd.grad(velocity().square().sum(), n.parameters)

    def through(network: Callable[[Tensor], Tensor], given: Tensor) -> Callable[[], object]:
        def call() -> object:
            leaf = given.detach().requires_grad_()
            with guides_precision(trainer.config, trainer.accelerator):
                loss = network(leaf).float().square().mean()
            return torch.autograd.grad(loss, leaf)

        return call

    def optimise() -> None:
        for p in n.parameters:
            p.grad = torch.ones_like(p)
        trainer.accelerator.clip_grad_norm_(n.parameters, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    def data() -> object:
        drawn = trainer.stream.sample(range(b))
        trainer.long_tail_weights(range(b))
        return trainer._prepare(drawn)

    def embed_captions() -> object:
        with guides_precision(trainer.config, trainer.accelerator):
            return n.clip.text_features(x.captions)

    parts = {
        "transformer, forward": velocity,
        "transformer, forward and backward": gradient,
        "decoder, forward and backward": through(lambda z: decode_latents(n.vae, z), x.z),
        "parser, forward and backward": through(n.parser.probabilities, images),
        "CLIP image, forward and backward": through(n.clip.image_features, images),
        "CLIP text, forward": embed_captions,
        "pixel losses": lambda: pixel_losses(trainer, x),
        "clipping and optimiser": optimise,
        "data": data,
    }
    for what, call in parts.items():
        if not bench.has(what, settings) and bench.left > 10:
            bench.measure(what, settings, call)


def pixel_losses(trainer: RandomTrainer, x: Batch) -> object:
    """The first stage of the consistency losses, as in the step."""
    assert trainer.consistency is not None
    with guides_precision(trainer.config, trainer.accelerator):
        return trainer.consistency.gradient(x.z, x.captions, x.m, x.t)


def loop_row(bench: Bench) -> None:
    """The plain loop."""
    settings = Settings(text=loop_text(bench.size), batch=1, recompute=1)
    if bench.has(LOOP, settings) or bench.left < 40:
        return
    clean(bench.device)
    loop = PlainLoop(bench.networks, bench.size)
    bench.measure(LOOP, settings, loop.update)
    del loop


def sampling_rows(bench: Bench, compile: bool) -> None:
    """Pictures of 28 steps: joint, and decoupled with the mask's keys and values kept."""
    for attention in ("joint", "decoupled"):
        for batch in (1, 4):
            settings = Settings(attention, bench.size.text, batch, compile=compile)
            if bench.has(SAMPLING, settings) or bench.left < (60 if compile else 30):
                continue
            clean(bench.device)
            config = configuration(bench.size, settings)
            reset(bench.networks.transformer, config, bench.size)
            prepare_blocks(bench.networks.transformer, config.trainer)
            x = inputs(bench.size, batch, str(bench.device))
            run = partial(sample, bench.networks, x, attention)
            bench.measure(
                SAMPLING, settings, partial(run, STEPS),
                flops=0.0 if compile else sampling_flops(bench, run),
                warm_up=partial(run, 2), repeats=2,
            )  # fmt: skip


@torch.no_grad()
def sample(n: Networks, x: Inputs, attention: str, steps: int) -> Tensor:
    """Euler steps and the decoder: pictures `b 3 h w`."""
    z = x.z
    mask = precompute_mask_kv(n.transformer, x.z_mask) if attention == "decoupled" else x.z_mask
    for i in range(steps):
        t = torch.full_like(x.t, 1 - i / steps)
        z = z - predict_velocity(n.transformer, z, t, x.text, mask) / steps
    return decode_latents(n.vae, z)


def sampling_flops(bench: Bench, run: Callable[[int], object]) -> float:
    """FLOP of a picture of 28 steps: that of one step, and 27 times what another one adds."""
    one = bench.count(partial(run, 1))
    two = bench.count(partial(run, 2))
    return one + (STEPS - 1) * (two - one)


def kernel_rows(bench: Bench, settings: Settings) -> None:
    """The ten kernels that take most time of a training step, with their shares."""
    if bench.device.type != "cuda" or bench.left < 20:
        return
    from torch.profiler import ProfilerActivity, profile

    clean(bench.device)
    trainer = RandomTrainer(bench.networks, bench.size, settings)
    trainer.setup()
    trainer.update()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        trainer.update()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    kernels = [e for e in kernels if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(e.self_device_time_total for e in kernels)
    largest = sorted(kernels, key=lambda e: -e.self_device_time_total)[:10]
    rows = [
        {
            "kernel": e.key[:160], "calls": e.count, "ms": f"{e.self_device_time_total / 1000:.4g}",
            "share": f"{e.self_device_time_total / total:.3g}",
        }
        for e in largest
    ]  # fmt: skip
    write_table(bench.out / f"kernels-{bench.name}.csv", ("kernel", "calls", "ms", "share"), rows)
    for row in rows:
        print(row["share"], row["ms"], row["calls"], row["kernel"][:100], flush=True)


# --------------------------------------------------------------------------------------- measuring


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of a call, the median of several that are asked for without a wait between them."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks))


def matmul_rate(size: Size, device: torch.device) -> float:
    """FLOP/s of a large product of random matrices in the dtype of the weights."""
    d = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, d, d, device=device).to(size.dtype)
    for _ in range(3):
        a @ b
    return 2 * d**3 / median_seconds(lambda: a @ b, device, 10)


def clean(device: torch.device) -> None:
    """Free what the last row left."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def facts(device: torch.device) -> dict[str, str]:
    """Card, driver, torch and commit."""
    card = "cpu"
    driver = ""
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    commit = provenance(configuration(SIZES["tiny"], BASE))["commit"] or ""
    return {"card": card, "driver": driver, "torch": torch.__version__, "commit": commit[:12]}


def write_table(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """A CSV, whole or not at all."""
    with whole_file(path) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="flux")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seconds", type=float, default=270.0, help="until no new row begins")
    parser.add_argument("--repeats", type=int, default=4, help="calls of a row")
    args = parser.parse_args()
    if (args.size, args.device) == ("flux", "cpu"):
        parser.error("FLUX.1-dev needs a GPU; --size tiny runs on the CPU")
    return args


def main() -> None:
    """Measure row after row."""
    args = arguments()
    avoid_cudnn_attention()
    size = SIZES[args.size]
    text = (77, 128) if args.size == "flux" else (size.text // 2, size.text)
    bench = Bench(size, torch.device(args.device), args.out, args.seconds, args.repeats, args.size)
    print(f"{bench.facts}, matrix product {bench.rate / 1e12:.4g} TFLOP/s", flush=True)

    def settings(**changes: Any) -> Settings:
        return Settings(**{"text": text[1]} | changes)

    first = [settings(), settings(batch=1), settings(attention="decoupled")]
    more = [
        settings(attention="decoupled", batch=4, repeats=4),
        settings(attention="decoupled", batch=2, repeats=2),
        settings(batch=4),
        settings(batch=4, recompute=1),
        settings(batch=2, recompute=1),
        settings(batch=2, recompute=2),
        settings(text=text[0]),
        settings(text=text[0], batch=1),
        settings(attention="decoupled", batch=1),
        settings(attention="decoupled", batch=4, repeats=2, recompute=2),
        settings(dropped=True),
        settings(text=loop_text(size), batch=1, recompute=1),
    ]
    compiled = [settings(compile=True), settings(attention="decoupled", compile=True)]
    compiled += [settings(attention="decoupled", batch=4, repeats=4, compile=True)]
    training_rows(bench, first)
    loop_row(bench)
    part_rows(bench, settings())
    kernel_rows(bench, settings())
    sampling_rows(bench, compile=False)
    training_rows(bench, more[:1])
    training_rows(bench, compiled)
    sampling_rows(bench, compile=True)
    training_rows(bench, more[1:])


if __name__ == "__main__":
    main()
