"""The comparison systems of Tables 1 and 2 as faithful miniatures: one file each, one interface.

    from ec2face_lab.baselines import load
    images = load(config, "UaC").generate(["A smiling woman."], masks, [generator])

`system.py` defines a system; `style.py`, `unets.py` and `flux.py` are blocks that several share;
`train.py` trains one system.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from ec2face_core.config import Config, ConfigError
from ec2face_core.io.paths import resolve

if TYPE_CHECKING:
    import torch

    from .system import System


WEIGHTS = "weights.safetensors"

# row of Tables 1 and 2, in their order -> where its class is
PAPER: dict[str, str] = {
    "TediGAN": "tedigan.TediGAN",
    "UaC": "uac.UaC",
    "PixelFace+": "pixelface.PixelFace",
    "CoDiffusion": "codiffusion.CoDiffusion",
    "ControlNeXt": "controlnext.ControlNeXt",
    "MM2Latent": "mm2latent.MM2Latent",
}

# further rows, of systems that the paper does not compare with
NEWER: dict[str, str] = {"Face-MoGLE": "mogle.FaceMoGLE", "MDiTFace": "mditface.MDiTFace"}

SYSTEMS = PAPER | NEWER


def systems() -> dict[str, type[System]]:
    """The class of each system by its row of Tables 1 and 2, in their order."""
    return {name: _class(name) for name in SYSTEMS}


def build(name: str, config: Config, device: torch.device | str | None = None) -> System:
    """The untrained system of a row, on the device; None: a GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such row; the message lists them.
    """
    return _class(name)(config, device=device)


def load(config: Config, name: str, device: torch.device | str | None = None) -> System:
    """The trained system of a row, on the device; None: a GPU if there is one, else the CPU.

    Raises:
        FileNotFoundError: there are no weights; the message names the remedy.
    """
    system = build(name, config, device)
    system.load(weights_dir(config, name))
    return system


def weights_dir(config: Config, name: str) -> Path:
    """Folder of a system's weights: the retrained one of this profile if it exists, else the kept.

    They lie beside the LoRA adapters: `data/mini/baselines/uac`, `runs/mini/baselines/uac`.
    """
    _known(name)
    folder = SYSTEMS[name].partition(".")[0]
    retrained = config.run_dir / "baselines" / folder
    if (retrained / WEIGHTS).is_file():
        return retrained
    return resolve(config.adapters).with_name("baselines") / folder


def trained(config: Config) -> list[str]:
    """The rows whose weights are there, in the tables' order."""
    return [name for name in SYSTEMS if (weights_dir(config, name) / WEIGHTS).is_file()]


def _class(name: str) -> type[System]:
    _known(name)
    module, _, cls = SYSTEMS[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)


def _known(name: str) -> None:
    if name not in SYSTEMS:
        raise ConfigError(f"system {name!r} does not exist; known: {', '.join(SYSTEMS)}")
