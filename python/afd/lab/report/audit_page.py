"""The page of an audit: audit.html with the worst clips as pictures, and audit.json."""

from __future__ import annotations

import datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from afd.audit.audit import Audit
from afd.audit.clip import Clip
from afd.files import write_bytes, write_json
from afd.lab.report.clips import png
from afd.lab.report.templates import render
from afd.listing import counted

# Clips with a picture on the page, frames in a picture, and its least height in pixels.
SHOWN, STRIP, HEIGHT = 48, 6, 64


def write_audit(found: Audit, out: Path, name: str) -> Path:
    """Write out/audit.json and out/audit.html; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    plain = found.plain()
    write_json(out / "audit.json", plain)
    html = render("audit.html", _page(found, plain, name))
    path = out / "audit.html"
    write_bytes(path, html.encode("utf-8", "backslashreplace"))
    return path


def _page(found: Audit, plain: dict[str, Any], name: str) -> dict[str, Any]:
    worst, trusted = found.worst(), found.trusted
    count, total = len(worst), len(found.clips)
    title = f"{count} of {total} clips are not to be trusted" if count else "Nothing was found"
    rows = [
        {
            "name": key,
            "count": sum(value > plain["limits"][key] for value in values),
            "limit": plain["limits"][key],
            "median": median(values),
            "worst": max(values),
        }
        for key, values in found.values.items()
    ]
    seconds = [clip.seconds for clip in found.clips if clip.problem is None]
    prompts = len({clip.prompt for clip in found.clips})
    lead = (
        f"{counted(total, 'clip')} of {counted(prompts, 'prompt')}, "
        f"{sum(seconds):.0f} s. Mean trust {np.mean(trusted):.2f}."
    )
    return {
        "title": title,
        "lead": lead,
        "basis": "Checks that need no network, and those of a discriminator where a run was given. "
        "A finding is a reason to look, not a verdict.",
        "name": f"audit of {name}",
        "date": datetime.datetime.now(),
        "sentences": plain["sentences"],
        "worst": [
            {
                "name": found.clips[i].name,
                "prompt": found.clips[i].prompt,
                "trust": trusted[i],
                "findings": found.findings(i),
                "picture": strip(found.clips[i]),
            }
            for i in worst[:SHOWN]
        ],
        "more": max(0, count - SHOWN),
        "checks": rows,
        "probe": plain["probe"],
    }


def strip(clip: Clip) -> str:
    """STRIP frames side by side as a PNG data URI; empty for a clip without frames."""
    frames = clip.frames_FHWC
    if not len(frames):
        return ""
    index = np.linspace(0, len(frames) - 1, STRIP).round().astype(int)
    picture = np.concatenate(list(frames[index]), axis=1)
    scale = max(1, -(-HEIGHT // picture.shape[0]))
    large = picture.repeat(scale, 0).repeat(scale, 1)
    return png((large * 255).round().clip(0, 255).astype(np.uint8))
