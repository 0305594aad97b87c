"""The command line `python -m ec2face_lab`, installed as `ec2face`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each sub-command is a module of `commands/` with `add_arguments(parser)` and `run(options)`. Only
# the one that is used is imported, so the list below appears at once.
COMMANDS = {
    "prepare": "report what a profile needs, convert the downloads, check folders of faces",
    "generate": "generate the pictures of a split",
    "evaluate": "generate a split and score it, or score a folder of pictures",
    "reproduce": "run the notebooks: every figure and table",
    "pretrain": "train the miniature's foundation and perception models",
    "baselines": "train the comparison systems, or study whether the comparison is fair",
    "sweeps": "train and score every point of the sweeps over settings",
    "report": "write the report that holds our numbers against the paper's",
    "keep": "put trained LoRAs in place of those that come with a clone",
    "gallery": "render the executed notebooks as pages",
    "publish": "make the figures, tables and pages of a run the published ones",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of a description, and names defaults that are numbers, names or paths."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.default or isinstance(action.default, list):
            return action.help
        return super()._get_help_string(action)


def build_parser(selected: str = "") -> argparse.ArgumentParser:
    """The parser of all sub-commands; only the selected one has its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m ec2face_lab",
        description="Everything that reproduces the paper. `python -m ec2face_core.train` trains.",
        epilog="Exit codes: 0 success; 1 a notebook failed; 2 the request cannot be met; "
        "3 a verdict is not the published one.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=HelpFormatter)
        if name == selected:
            module = importlib.import_module(f"ec2face_lab.commands.{name}")
            command.description = module.__doc__
            command.set_defaults(run=module.run)
            module.add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser(*words[:1]).parse_args(words)
    from ec2face_core.command_line import cli
    from ec2face_core.guards.parent import end_with_parent

    end_with_parent()
    return cli(options.run)(options)


if __name__ == "__main__":
    sys.exit(main())
