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

from .exit_codes import exits
from .terminal import clean, command, count, print_json, say

COLOURS = {"ok": "green", "absent": "yellow", "broken": "red"}


@command(epilog="Exit codes: 0 nothing is broken, whatever is absent; 1 a part is broken.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@exits
def doctor(as_json: bool) -> None:
    """Driver, GPUs, CuPy, Numba CUDA, NVRTC and cache, and whether every part computes what the reference does.

    ok: it works. absent: this machine lacks it, and nothing is wrong. broken: it is there and does not work. The first run
    compiles a few kernels, which takes seconds.
    """
    findings = []
    for finding in ss.diagnose():
        findings.append(finding)
        if not as_json:
            mark = click.style(f"{finding.state:<6}", fg=COLOURS[finding.state])
            click.echo(f"{mark} {finding.part:<20} {clean(' '.join(finding.text.split()))}")
    broken = sum(finding.state == "broken" for finding in findings)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    elif broken:
        say(f"{count(broken, 'part')} broken")
    else:
        gpu = any(finding.part.startswith("matmul") for finding in findings)
        say("nothing is broken; " + ("the GPU is used" if gpu else "NumPy arrays are computed on the CPU, and no GPU is used"))
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    doctor(prog_name="doctor.py")
