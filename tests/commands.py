"""`slidesparse` as a user calls it, in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from tools.cli import main


def slidesparse(*arguments: object) -> Result:
    """`slidesparse` with these arguments."""
    return CliRunner().invoke(main, [str(each) for each in arguments])
