"""`slidesparse NAME`: the commands of this folder under one name, each loaded when it is called."""

from __future__ import annotations

import importlib
import importlib.util

import click

from . import __name__ as package
from .exit_codes import EXIT_CODES

COMMANDS = {
    "prune": "Prune a checkpoint, by a text that it is run on.",
    "pack": "Pack a checkpoint.",
    "eval": "Perplexity of a dense, pruned or packed model on a text.",
    "show": "Show, verify or unpack a checkpoint.",
    "build": "Compile the GPU kernels ahead, on any machine.",
    "tune": "Choose tiles by timing them on your GPU and shapes.",
    "bench": "Time the GPU kernels beside dense and 2:4 libraries.",
    "doctor": "Say what of this machine can be used.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f".{name}", package), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="slidesparse_nb")
def main() -> None:
    """(2N-2):2N structured-sparse models on 2:4 sparse tensor cores."""


if __name__ == "__main__":
    main()
