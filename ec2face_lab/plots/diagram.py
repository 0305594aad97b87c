"""Fig. 1: the training framework, drawn from the facts of a model and a configuration.

No size in it is fixed text: parameter and token counts, blocks, LoRA rank, loss coefficients, β(t)
and the class weights are arguments.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ec2face_core.attributes import CLASS_ID, GROUPS, display_name
from ec2face_core.losses import beta

from .style import BLUE, GREY, ORANGE, RED, new_figure, plain, show, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WIDTH = 100  # in units of a tenth of an inch
HEIGHT = 58
FROZEN = "#e8f0f7"
TRAINED = "#fdebd0"
LOSS = "#fbe3da"
TOKENS = {"text": BLUE, "noise": GREY, "mask": ORANGE}


@styled
def framework_diagram(facts: Mapping[str, Any]) -> Figure:
    """Fig. 1: the training framework with the numbers of a model and a configuration.

    Args:
        facts: mapping with
            names: part -> class name, for text_encoder, text_encoder_2, vae, transformer, clip,
                parser; parameters: the same parts and `lora` -> parameter count;
            tokens: text, noise, mask -> tokens of one sample;
            blocks: (double-stream, single-stream); rank: of the LoRA;
            loss: the `LossConfig`; weights: class name -> weight; t: time of the estimate;
            caption: str; pictures: image, mask, estimate (x̃), weights -> `h w 3` in [0, 1].
    """
    fig = new_figure(WIDTH / 10, HEIGHT / 10)
    fig.set_layout_engine("none")
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    _conditions(ax, facts)
    _transformer(ax, facts)
    _consistency(ax, facts)
    _long_tail(ax, facts)
    _legend(ax, facts)
    return fig


def _conditions(ax: Axes, facts: Mapping[str, Any]) -> None:
    """Left: caption, face and mask become text, noise and mask tokens."""
    names = facts["names"]
    counts = facts["parameters"]
    pictures = facts["pictures"]
    caption = plain(facts["caption"], 62)
    _box(ax, 1, 46, 12, 11, textwrap.fill(f"“{caption}”", 16), "white", italic=True)
    _picture(ax, 2, 33, 10, pictures["image"], "face x")
    _picture(ax, 2, 19.5, 10, pictures["mask"], "mask m")
    encoders = f"{names['text_encoder']}\n{names['text_encoder_2']}"
    size = counts["text_encoder"] + counts["text_encoder_2"]
    _box(ax, 16, 47, 14, 9, f"{encoders}\n{_count(size)}, frozen", FROZEN)
    vae = f"VAE encoder\n{names['vae']}\n{_count(counts['vae'])}, frozen\n(face and mask)"
    _box(ax, 16, 20, 14, 22.5, vae, FROZEN)
    rows = {"text": (51.5, "z_c"), "noise": (38, "z_t"), "mask": (24.5, "z_m")}
    for kind, (y, symbol) in rows.items():
        _arrow(ax, (13.4 if kind == "text" else 12.4, y), (15.8, y))
        _arrow(ax, (30.2, y), (33.3, y))
        _tokens(ax, 33.6, y, TOKENS[kind], f"{kind} tokens\n${symbol}$: {facts['tokens'][kind]}")
        _arrow(ax, (43, y), (46.6, y))
    ax.text(38.2, 32, "$z_t=(1-t)\\,z+t\\,\\varepsilon$", ha="center", va="center", fontsize=9)


def _transformer(ax: Axes, facts: Mapping[str, Any]) -> None:
    """Middle: the frozen transformer, and the LoRA applied to mask tokens only."""
    double, single = facts["blocks"]
    counts = facts["parameters"]
    total = sum(facts["tokens"].values())
    _box(ax, 47, 19, 21, 38, "", FROZEN)
    header = f"{facts['names']['transformer']}\n{_count(counts['transformer'])}, frozen"
    ax.text(57.5, 53.2, header, ha="center", va="center", fontsize=8.5, weight="bold")
    _box(ax, 49, 44, 17, 5.6, f"{double} double-stream blocks", "white")
    _box(ax, 49, 36.2, 17, 5.6, f"{single} single-stream blocks", "white")
    note = f"joint attention (Eqs. 1, 4)\nover [text · noise · mask]\n= {total} tokens"
    ax.text(57.5, 32, note, ha="center", va="center", fontsize=8.5)
    share = 100 * counts["lora"] / counts["transformer"]
    trained = f"{_count(counts['lora'])} ({share:.2g} %) trained"
    lora = f"LoRA, rank {facts['rank']}, mask tokens\n{trained}"
    _box(ax, 49, 21.2, 17, 6.6, lora, TRAINED, ORANGE)


def _consistency(ax: Axes, facts: Mapping[str, Any]) -> None:
    """Bottom: reverse estimate, decoder, the guides CLIP and parser, β(t)."""
    loss = facts["loss"]
    names = facts["names"]
    counts = facts["parameters"]
    _band(ax, 30.5, 0.4, 69.1, 16.8)
    _arrow(ax, (52, 18.8), (52, 12.2))
    ax.text(52.8, 17.9, "$v_\\theta$", fontsize=10, va="center")
    _box(ax, 46, 5, 12, 7, "$\\tilde z=z_t-t\\,v_\\theta$\n(Eq. 5)", "white")
    _arrow(ax, (58.2, 8.5), (59.8, 8.5))
    _box(ax, 60, 5, 9.5, 7, "VAE decoder\nfrozen", FROZEN)
    _arrow(ax, (69.7, 8.5), (71.3, 8.5))
    _picture(ax, 71.5, 3.5, 9.4, facts["pictures"]["estimate"], f"$\\tilde x$, t = {facts['t']:g}")
    for y, part, name, equation in ((9.6, "clip", "text", 6), (2.0, "parser", "mask", 7)):
        _arrow(ax, (81.1, 8.5), (83.3, y + 2.8))
        text = (
            f"$\\mathcal{{L}}_{{{name}}}$ (Eq. {equation})\n{names[part]}, {_count(counts[part])}"
        )
        _box(ax, 83.5, y, 15.5, 5.6, text, LOSS)
    formula = (
        f"$\\mathcal{{L}}_{{mcc}}=\\beta(t)\\,({loss.alpha_text:g}\\,\\mathcal{{L}}_{{text}}+"
        f"{loss.alpha_mask:g}\\,\\mathcal{{L}}_{{mask}})$  (Eq. 9)"
    )
    ax.text(31.3, 15.6, "Consistency guidance", fontsize=8.5, weight="bold", va="center")
    ax.text(82.5, 15.9, formula, fontsize=8.5, va="center", ha="right")
    inset = ax.inset_axes((32.5, 3.6, 11.3, 8.8), transform=ax.transData)
    t = torch.from_numpy(np.linspace(0, 1, 101))
    inset.plot(t, beta(t, loss.steepness, loss.center), color=RED)
    inset.set(xticks=[0, 1], yticks=[0, 1], xlim=(0, 1), ylim=(0, 1.05))
    inset.set_xlabel("t", labelpad=-8, fontsize=8.5)
    heading = f"β(t): $\\gamma_s$={loss.steepness:g}, $t_c$={loss.center:g}"
    inset.set_title(heading, fontsize=8, pad=2)


def _long_tail(ax: Axes, facts: Mapping[str, Any]) -> None:
    """Right: the reweighted flow-matching loss and the weights of some classes."""
    _band(ax, 71.4, 18.6, 28.2, 39)
    ax.text(72.3, 56, "Long-tail adaptive learning", fontsize=8.5, weight="bold", va="center")
    weighted = "w\\cdot" if facts["loss"].long_tail else ""
    formula = f"$\\|{weighted}(v_\\theta-(\\varepsilon-z))\\|^2$"
    _arrow(ax, (68.3, 50.3), (73, 50.3))
    ax.text(70.1, 51.6, "$v_\\theta$", fontsize=10, ha="center")
    _box(ax, 73.2, 46.9, 25.4, 6.8, f"$\\mathcal{{L}}_{{opt-fm}}$ = {formula}  (Eq. 11)", LOSS)
    _picture(ax, 73, 26.5, 10, facts["pictures"]["weights"], "w(i, j)")
    _arrow(ax, (78, 38.6), (78, 46.6))

    ranked = sorted(facts["weights"].items(), key=lambda item: item[1])
    shown = [ranked[i] for i in np.unique(np.linspace(0, len(ranked) - 1, 9).round().astype(int))]
    ids = [CLASS_ID[name] for name, _ in shown]
    bars = ax.inset_axes((90.6, 22.6, 8.2, 21.5), transform=ax.transData)
    colours = [RED if i in GROUPS["RFA"] else BLUE if i in GROUPS["HFA"] else GREY for i in ids]
    bars.barh(range(len(ids)), [weight for _, weight in shown], color=colours, height=0.7)
    bars.set_xscale("log")
    bars.set_yticks(range(len(ids)), [display_name(i) for i in ids], fontsize=8)
    bars.tick_params(axis="y", length=0)
    bars.minorticks_off()
    bars.set_title("w, as trained", fontsize=8.5, pad=2)


def _legend(ax: Axes, facts: Mapping[str, Any]) -> None:
    for y, colour, text in ((12, FROZEN, "frozen"), (7.5, TRAINED, "trained"), (3, LOSS, "loss")):
        _box(ax, 2, y, 4, 2.6, "", colour, ORANGE if colour == TRAINED else "0.45")
        ax.text(7, y + 1.3, text, va="center", fontsize=8.5)
    total = "$\\mathcal{L}_{total}=\\mathcal{L}_{opt-fm}+\\mathcal{L}_{mcc}$\n(Eq. 12)"
    ax.text(21.5, 7.5, total, ha="center", va="center", fontsize=9.5)


# -------------------------------------------------------------------------------- primitives


def _box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str,
    edge: str = "0.45", italic: bool = False,
) -> None:  # fmt: skip
    from matplotlib.patches import FancyBboxPatch

    style = {"boxstyle": "round,pad=0,rounding_size=0.7", "facecolor": colour, "edgecolor": edge}
    ax.add_patch(FancyBboxPatch((x, y), width, height, lw=1.4 if edge == ORANGE else 0.9, **style))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8,
            style="italic" if italic else "normal", linespacing=1.25)  # fmt: skip


def _band(ax: Axes, x: float, y: float, width: float, height: float) -> None:
    from matplotlib.patches import Rectangle

    frame = {"facecolor": "none", "edgecolor": "0.6", "ls": (0, (4, 3)), "lw": 0.9}
    ax.add_patch(Rectangle((x, y), width, height, **frame))


def _picture(ax: Axes, x: float, y: float, side: float, image: np.ndarray, label: str) -> None:
    inset = ax.inset_axes((x, y, side, side), transform=ax.transData)
    show(inset, image)
    ax.text(x + side / 2, y + side + 0.4, label, ha="center", va="bottom", fontsize=8.5)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": "0.25", "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


def _tokens(ax: Axes, x: float, y: float, colour: str, label: str) -> None:
    """A short row of token squares with its label above."""
    from matplotlib.patches import Rectangle

    for i in range(4):
        square = {"facecolor": colour, "edgecolor": "white", "alpha": 0.85, "lw": 0.8}
        ax.add_patch(Rectangle((x + 2.25 * i, y - 1.1), 2.2, 2.2, **square))
    ax.text(
        x + 4.5, y + 1.7, label.replace("tokens ", "tokens\n"), ha="center", va="bottom", fontsize=8
    )


def _count(n: int) -> str:
    """A parameter count with a unit: 216 k, 2.3 M, 11.9 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)
