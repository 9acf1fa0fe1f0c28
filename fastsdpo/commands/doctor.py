"""`fastsdpo doctor`: what runs on this machine, what is missing and what to do about it.

Versions and devices; which backend the losses get on each device, why another is missing, and whether each
computes right (small losses against float64). Exit status 0; 1 where a backend computes something wrong or fails.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastsdpo.commands.parser import Parser
from fastsdpo.commands.running import DONE, FAILED, run_command


def main(argv: list[str] | None = None) -> int:
    """Runs the command; see the module for the exit status."""
    parser = Parser("doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="Print the report as JSON.")
    return run_command(parser, check, parser.parse_args(argv))


def check(options: argparse.Namespace) -> int:
    """Makes the report and prints it."""
    from fastsdpo import doctor

    report = doctor.report()
    print(json.dumps(report, indent=1) if options.json else describe(report))
    return FAILED if report["wrong"] else DONE


def describe(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [
        "versions   " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"platform   {report['platform']}",
    ]
    lines += [f"device     {name}: {text}" for name, text in report["devices"].items()]
    lines += [f"backend    {name}: {reason}" for name, reason in report["backends"].items()]
    for device, choices in report["auto"].items():
        lines.append(f"auto       {device}: " + ", ".join(f"{dtype} {name}" for dtype, name in choices.items()))
    for device, backends in report["problems"].items():
        for name, problems in backends.items():
            lines.append(f"check      {device} {name}: " + ("WRONG" if problems else "right"))
            lines += [f"           {problem}" for problem in problems]
    lines += [f"to do      {text}" for text in report["advice"]]
    lines.append(f"{report['checked'] - report['wrong']} of {report['checked']} checks right")
    return "\n".join(lines)
