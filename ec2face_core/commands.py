"""What the command lines share: which configuration is meant, and how a refusal ends them.

@told
def main(arguments=None):
    options = parser.parse_args(arguments)
    config = chosen(options)
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import (
    PROFILES,
    Config,
    ConfigError,
    Refusal,
    load_config,
    load_profile,
    parse_override,
)
from .launch import LaunchError


def told(main: Callable[..., int | None]) -> Callable[..., int]:
    """`main` with an exit code: its own or 0, or 2 after one line on stderr for a `Refusal`.

    A file that is missing or cannot be read or written (`OSError`) is told in the same way, and so
    is a child process that was refused; any other exception is a mistake of ours and keeps its
    traceback.
    """

    @functools.wraps(main)
    def told_main(*arguments: Any) -> int:
        try:
            return main(*arguments) or 0
        except (Refusal, OSError, LaunchError) as error:
            if isinstance(error, LaunchError) and error.returncode != 2:
                raise
            print(f"error: {error}", file=sys.stderr)  # a child's ends with its own refusal
            return 2

    return told_main


def add_config_options(parser: argparse.ArgumentParser, default: str = "mini") -> None:
    """--profile or --config, and --set; `chosen` reads them."""
    profiles = ", ".join(sorted(path.stem for path in PROFILES.glob("*.yaml")))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--profile", default=default, help=f"one of {profiles}")
    source.add_argument("--config", type=Path, metavar="FILE", help="a saved config.yaml instead")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting, e.g. loss.alpha_mask=1; repeatable",
    )  # fmt: skip


def chosen(options: argparse.Namespace, **overrides: Any) -> Config:
    """The configuration that the options of `add_config_options` ask for.

    Args:
        overrides: settings that win over --set, e.g. `**{"trainer.steps": 7}`.

    Raises:
        ConfigError: an unknown profile, file or setting.
    """
    said = {key: value for text in options.set for key, value in parse_override(text).items()}
    if options.config is None:
        return load_profile(options.profile, **(said | overrides))
    if not options.config.is_file():
        raise ConfigError(f"--config {options.config}: no such file")
    return load_config(options.config, **(said | overrides))
