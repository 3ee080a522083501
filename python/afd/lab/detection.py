"""How well an audit finds the simulator's wrong videos.

    python -m afd.lab.detection AUDIT_DIR/audit.json TEACHER_DIR/faults.json

prints, per way in which videos are wrong, the AUC of the audit's trust and of each of its checks
against the videos without a fault.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afd.audit.probe import auc
from afd.files import parse_json, read_text


def detection(audit: Mapping[str, Any], faults: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """AUCs by fault and check; "trust" is that of the audit's trust.

    `audit`: the contents of audit.json; `faults`: the fault of each file, "" without one.
    """
    clips = {str(clip["file"]): clip for clip in audit["clips"]}
    sound = [clips[name] for name, fault in faults.items() if not fault]
    found: dict[str, dict[str, float]] = {}
    for fault in dict.fromkeys(filter(None, faults.values())):
        wrong = [clips[name] for name, own in faults.items() if own == fault]
        found[fault] = {
            "trust": auc([-clip["trust"] for clip in wrong], [-clip["trust"] for clip in sound])
        }
        for check in wrong[0]["values"]:
            values = [[clip["values"][check] for clip in part] for part in (wrong, sound)]
            found[fault][check] = auc(*values)
    return found


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit("detection: needs audit.json and faults.json")
    audit, faults = (parse_json(read_text(Path(name))) for name in arguments)
    for fault, values in detection(audit, faults).items():
        best = max(values, key=lambda name: values[name])
        shown = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
        print(f"{fault}: best {best} {values[best]:.3f}   ({shown})")


if __name__ == "__main__":
    main(sys.argv[1:])
