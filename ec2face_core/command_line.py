"""What the command lines of both packages share: settings, and exit codes with a sentence."""

from __future__ import annotations

import argparse
import functools
import reprlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from .config import Config, ConfigError, UserError, load_config, load_profile, profiles, read_yaml
from .io.paths import ROOT, user_path, user_setting


def cli(main: Callable[..., int | None]) -> Callable[..., int]:
    """Give `main` an exit code: its own or 0; 2 after one line on stderr for a `UserError`.

    `OSError` (a file that is missing or cannot be read or written) and a child process that ended
    with 2 are reported in the same way. Any other exception is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def cli_main(*arguments: Any) -> int:
        try:
            return main(*arguments) or 0
        except (UserError, OSError, subprocess.CalledProcessError) as error:
            if isinstance(error, subprocess.CalledProcessError) and error.returncode != 2:
                raise
            print(f"error: {error}", file=sys.stderr)  # a child's error ends with its message
            return 2
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
                raise
            print(
                f"error: the GPU's memory is short ({str(error).splitlines()[0]}). In training "
                "lower trainer.batch_size and raise trainer.accumulation by the same factor, or "
                "set trainer.gradient_checkpointing or trainer.shard to true; in sampling lower "
                "sampling.batch_size",
                file=sys.stderr,
            )
            return 2

    return cli_main


def add_config_options(parser: argparse.ArgumentParser, default: str = "mini") -> None:
    """Add --profile or --config, and --set; `config_from_args` reads them."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--profile", default=default, help=f"one of {', '.join(profiles())}")
    source.add_argument("--config", type=user_path, metavar="FILE", help="a saved config.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting, e.g. loss.alpha_mask=1; repeatable; paths begin at "
        f"{ROOT}, with ./ or ../ where you stand",
    )  # fmt: skip


def config_from_args(options: argparse.Namespace, **overrides: Any) -> Config:
    """The configuration that the options of `add_config_options` ask for.

    Args:
        options: parsed arguments.
        overrides: settings that win over --set, e.g. `**{"trainer.steps": 7}`.

    Raises:
        ConfigError: an unknown profile, file or setting.
    """
    settings = {key: value for text in options.set for key, value in parse_override(text).items()}
    if options.config is None:
        return load_profile(options.profile, **(settings | overrides))
    if not options.config.is_file():
        raise ConfigError(f"--config {options.config}: no such file")
    return load_config(options.config, **(settings | overrides))


def parse_override(text: str) -> dict[str, Any]:
    """`trainer.steps=5` from a command line -> `{"trainer.steps": 5}`; the value is YAML.

    Nothing after the `=` is the empty text.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text!r}: expected option=value, for example trainer.steps=10")
    if not value.strip():
        return {key: ""}
    return {key: user_setting(read_yaml(value, f"--set {reprlib.repr(text)}: the value"))}
