"""What the command lines of both packages share: settings, and exit codes with a sentence."""

from __future__ import annotations

import argparse
import functools
import json
import reprlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import (
    DEFAULTS,
    Config,
    ConfigError,
    UserError,
    load_config,
    load_profile,
    named,
    profiles,
)
from .io.paths import ROOT, user_path, user_setting
from .io.settings import Written, read_yaml


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
            print(f"error: {_sentence(error)}", file=sys.stderr)  # a child's ends with its message
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


def _sentence(error: Exception) -> str:
    """An error in words, with the remedy where a file is in the place of a folder or vice versa."""
    name = error.filename if isinstance(error, OSError) else None
    if name is not None and isinstance(error, IsADirectoryError):
        return f"{name}: is a folder; name a file"
    occupied = isinstance(error, FileExistsError) and not Path(name or "").is_dir()
    if name is not None and (occupied or isinstance(error, NotADirectoryError)):
        return f"{name}: a file is in the place of a folder of this path; name another folder"
    return str(error)


def add_config_options(parser: argparse.ArgumentParser, default: str = "mini") -> None:
    """Add --profile or --config, and --set; `config_from_args` reads them."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--profile", default=default, help=f"one of {', '.join(profiles())}")
    source.add_argument(
        "--config", type=user_path, metavar="FILE",
        help="a saved config.yaml, or a file of settings whose `base` is a profile",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting, e.g. loss.alpha_mask=1; repeatable, the last one of "
        f"a setting counts; paths begin at {ROOT}, with ./ or ../ where you stand",
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
    if options.config.is_dir():
        raise ConfigError(f"--config {options.config} is a folder: name the file in it")
    if not options.config.is_file():
        raise ConfigError(f"--config {options.config}: no such file")
    return load_config(options.config, **(settings | overrides))


def parse_override(text: str) -> dict[str, Any]:
    """`trainer.steps=5` from a command line -> `{"trainer.steps": 5}`, of the setting's type.

    A text is taken as it stands, nothing after the `=` as the empty one. In quotes it is exact: it
    may begin with a space, and `"./faces"` begins at `ROOT`. Options of a group are YAML:
    `loss={center: 0.3, clip: 2}`.

    Raises:
        ConfigError: no setting of this name, or a value of another type.
    """
    key, separator, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not separator or not key or value.startswith("="):
        raise ConfigError(f"--set {text!r}: expected option=value, for example trainer.steps=10")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if quoted or isinstance(DEFAULTS.get(key), dict):
        given = read_yaml(value, f"--set {key}: {reprlib.repr(value)}")
    else:
        given = Written(value)
    try:
        settings = named({key: given})
    except ConfigError as error:
        raise ConfigError(f"--set {error}") from error
    return settings if quoted else {name: user_setting(x) for name, x in settings.items()}


def override(key: str, value: Any) -> str:
    """What `parse_override` reads as this value of this setting."""
    plain = f"{key}={str(value).lower() if isinstance(value, bool) else value}"
    try:
        if parse_override(plain) == {key: value}:
            return plain
    except ConfigError:
        pass
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
