"""Write runs/<profile>/figures/REPORT.md: claim by claim the paper's number, ours, the verdict.

    python -m ec2face_lab report --profile mini

It is made from the tables that the notebooks wrote.
"""

from __future__ import annotations

import argparse

from ec2face_core.command_line import add_config_options, config_from_args

from ..study.report import save_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The profile."""
    add_config_options(parser)


def run(options: argparse.Namespace) -> None:
    """Write the report and print its path."""
    print(save_report(config_from_args(options)))
