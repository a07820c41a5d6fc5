"""``kvshare doctor``: what is installed, what is missing and the next step for each.

The report is plain text without any library: it must print where everything else is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from megatron_kvshare import __version__
from megatron_kvshare.doctor.checks import Finding, all_findings

EXIT_NOT_READY = 1
DESCRIPTION = (
    "Looks at Python, the packages, the CPU backend and the GPUs, and names the next step for"
    " everything that is missing. Exit code: 0 when training can start, 1 otherwise."
)


def run(argv: Sequence[str]) -> int:
    """Print the report; return 0 when nothing required is missing or unsupported."""
    if "--distributed" in argv:
        # Needs torch, which may be what is missing without the flag.
        from megatron_kvshare.doctor import job

        return job.run(argv)
    parser = argparse.ArgumentParser("kvshare doctor", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="check a whole job, on all its processes: kvshare doctor --distributed --help",
    )
    wants_json = parser.parse_args(argv).json
    findings = all_findings()
    stops = [finding for finding in findings if finding.stops_work]
    if wants_json:
        report = {"version": __version__, "ok": not stops, "findings": [*map(asdict, findings)]}
        print(json.dumps(report, indent=2))
    else:
        print(report_text(findings))
    return EXIT_NOT_READY if stops else 0


def report_text(findings: Sequence[Finding]) -> str:
    """The findings as text, one block per section and a verdict at the end."""
    lines = [f"megatron_kvshare {__version__}"]
    for section, group in groupby(findings, key=lambda finding: finding.section):
        lines += ["", section]
        for finding in group:
            lines += _finding_lines(finding)
    stops = [finding.name for finding in findings if finding.stops_work]
    verdict = f"Not ready: {', '.join(stops)}." if stops else "Ready to train."
    return "\n".join([*lines, "", verdict])


def _finding_lines(finding: Finding) -> list[str]:
    mark = finding.state.upper() if finding.state in ("missing", "wrong") else finding.state
    lines = [f"  {mark:<8}{finding.name:<19}{finding.found or '-'}", f"{'':10}{finding.detail}"]
    if finding.next_step:
        lines.append(f"{'':10}next: {finding.next_step}")
    return lines
