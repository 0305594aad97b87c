"""Where relative paths begin: settings at `ROOT`, command lines where their user stands."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

CODE = Path(__file__).resolve().parents[2]  # the clone, or where the package is installed
LONGEST = 1024  # characters of a path that messages show whole
NAMED = os.environ.get("EC2FACE_ROOT", "")
ROOT = Path(NAMED).expanduser().absolute() if NAMED else CODE


class PathError(FileNotFoundError, ValueError, argparse.ArgumentTypeError):
    """A path that leads nowhere; the message names the remedy, also where argparse reports it."""


def resolve(path: str | Path) -> Path:
    """A configured path: absolute, or relative to `ROOT`; `~` is expanded.

    Raises:
        PathError: it is relative, but there is no clone and EC2FACE_ROOT names no folder.
    """
    own = _at_home(path)
    there = ROOT.is_dir() if NAMED else (ROOT / "pyproject.toml").is_file()
    if not own.is_absolute() and not there:
        raise PathError(
            f"{own} is relative to a clone of the repository, but {ROOT} is none: name one in the "
            "environment variable EC2FACE_ROOT, or give an absolute path"
        )
    return ROOT / own  # an absolute right-hand side wins


def user_path(text: str | Path) -> Path:
    """A path on a command line or of a call: relative to the working directory; `~` is expanded.

    Raises:
        PathError: it is empty, or names a home that does not exist.
    """
    if not str(text):
        raise PathError("an empty path: name a file or a folder")
    return _at_home(text).absolute()


def user_file(text: str | Path, kind: str) -> Path:
    """The path of a file that a call names, as `user_path` reads it.

    Args:
        text: the path.
        kind: what it should be; errors call it so.

    Raises:
        PathError: nothing is there, or it can be no path: it is empty, too long, or holds a NUL.
    """
    name = str(text)
    shown = name if len(name) <= LONGEST else f"{name[:60]}...{name[-60:]}"
    try:
        path = user_path(text)
        path.lstat()
    except PathError as error:
        raise PathError(f"{kind}: {error}") from error
    except FileNotFoundError as error:
        raise PathError(f"{kind} {path} does not exist") from error
    except OSError as error:
        raise PathError(f"{kind} {shown}: {error.strerror}") from error
    except ValueError as error:  # a NUL
        raise PathError(f"{kind} {shown!r}: {error}") from error
    return path


def user_setting(value: object) -> object:
    """A setting of a command line, in which `./faces` and `../faces` mean the working directory."""
    prefix, separator, path = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if prefix in ("", "local-dir") and path.startswith(("./", "../")):
        return f"{prefix}{separator}{user_path(path)}"
    return value


def _at_home(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise PathError(f"{path}: {error}") from error
