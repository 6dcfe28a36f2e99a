"""Say what of this machine the library can use: python tools/doctor.py, or slidesparse doctor."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "tools"

from dataclasses import asdict

import click

import slidesparse_nb as ss

from .terminal import print_json


@click.command(epilog="Exit codes: 0 every part works; 1 a part is missing or wrong.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Driver, devices, CuPy, Numba, NVRTC and cache, and whether every part computes what the reference does.

    The first run compiles a few kernels, which takes seconds.
    """
    findings = []
    for finding in ss.diagnose():
        findings.append(finding)
        if not as_json:
            mark = click.style("ok  ", fg="green") if finding.ok else click.style("FAIL", fg="red")
            click.echo(f"{mark} {finding.part:<20} {' '.join(finding.text.split())}")
    if as_json:
        print_json([asdict(finding) for finding in findings])
    raise SystemExit(0 if all(finding.ok for finding in findings) else 1)


if __name__ == "__main__":
    doctor()
