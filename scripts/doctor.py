#!/usr/bin/env python3
"""What is installed and works here: one line for each finding, with what to do about it.

ok is fine, -- is worth knowing, !! is broken. Exit code 1 if anything is broken.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import entry
from ldm.cli import parser as cli


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("doctor.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--outdir", default="outputs", help="folder to try for images (outputs)")
    parser.add_argument("--json", action="store_true", help="print one JSON list of the findings")
    parser.add_argument("--debug", action="store_true", help="show where a probe fails")
    args = parser.parse_args(argv)

    from ldm.cli.doctor import examine

    findings = []
    for finding in examine(args.outdir, args.debug):
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    return int(any(finding.state == "broken" for finding in findings))


if __name__ == "__main__":
    sys.exit(entry.run(main))
