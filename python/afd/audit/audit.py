"""The result of an audit: numbers and findings per clip, and sentences about the set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from afd.audit.checks import CHECKS, Check, check_all, overlay, trust
from afd.audit.clip import Clip
from afd.audit.probe import STATISTICS, separability, statistics
from afd.errors import ConfigError
from afd.files import parse_json, read_text

# Checks that need a discriminator. A normal set has one of 15 000 clips above 4 deviations.
SCORED = {
    "prompt": Check(
        4.0, 1.0, "fits its prompt unlike the others fit theirs, {:.1f} deviations from the usual"
    ),
    "worse": Check(
        4.0,
        1.0,
        "scores below the student's own videos of its prompt, {:.1f} deviations from what is usual",
    ),
}
# Above this AUC the probe's finding is reported; the share of a set that makes it inconsistent.
CHEATING = 0.75
_ALL = CHECKS | SCORED


@dataclass
class Audit:
    """An audit of clips.

    Attributes:
        clips: in the manifest's order.
        values: per check its number for every clip.
        probe: AUCs against the student's videos (`probe.separability`); empty without any.
        common: percentage of the picture that is the same still mark in most clips.
    """

    clips: Sequence[Clip]
    values: dict[str, list[float]]
    probe: dict[str, float] = field(default_factory=dict)
    common: float = 0.0

    @property
    def trusted(self) -> list[float]:
        """Per clip the probability that nothing is wrong with it."""
        return trust(self.values, _ALL)

    def findings(self, index: int) -> list[tuple[str, str]]:
        """(check, sentence) for every fault found in a clip."""
        clip, found = self.clips[index], []
        for name, values in self.values.items():
            check, value = _ALL[name], values[index]
            if value > check.limit:
                shown = -value if name == "duplicate" else value
                text = check.sentence.format(shown)
                found.append((name, f"{text}: {clip.problem}" if name == "unreadable" else text))
        return found

    def worst(self) -> list[int]:
        """Clips with findings, the least trusted first."""
        order = np.argsort(self.trusted, kind="stable").tolist()
        return [i for i in order if self.findings(i)]

    def sentences(self) -> Iterator[str]:
        """One sentence per kind of finding, and those about the whole set."""
        for name in self.values:
            clips = [i for i in range(len(self.clips)) if name in dict(self.findings(i))]
            if clips:
                first = dict(self.findings(clips[0]))[name]
                example = self.clips[clips[0]].name
                yield (
                    f"{name}: {len(clips)} of {len(self.clips)} clips, such as {example}, which "
                    f"{first}"
                )
        if self.common > 0.2:
            yield (
                f"overlay: {self.common:.1f} % of the picture is the same still mark in most "
                "clips; a discriminator on pixels can use it"
            )
        readable = [clip for clip in self.clips if clip.problem is None]
        for what, of in {
            "sizes": lambda c: f"{c.height}x{c.width}",
            "frame rates": lambda c: f"{c.fps:.4g}",
            "codecs": lambda c: c.codec,
        }.items():
            counts = Counter(of(clip) for clip in readable)
            if len(counts) > 1:
                listed = ", ".join(f"{value} ({count})" for value, count in counts.most_common(4))
                yield f"{what}: the clips differ, {listed}"
        if self.probe.get("probe", 0.5) > CHEATING:
            best = max(STATISTICS, key=lambda name: self.probe.get(name, 0.5))
            yield (
                f"look: a linear probe on {', '.join(STATISTICS)} tells the teacher's clips from "
                f"the student's with AUC {self.probe['probe']:.2f} ({best} alone "
                f"{self.probe[best]:.2f}): a discriminator can do without the motion; hide the "
                "look, or set teacher.robust.balance"
            )

    def plain(self) -> dict[str, Any]:
        """The audit as plain data for JSON."""
        trusted = self.trusted
        return {
            "clips": [
                {
                    "file": clip.name,
                    "prompt": clip.prompt,
                    "trust": round(trusted[i], 6),
                    "findings": dict(self.findings(i)),
                    "values": {name: round(v[i], 6) for name, v in self.values.items()},
                    "frames": clip.frames,
                    "size": [clip.height, clip.width],
                    "fps": round(clip.fps, 4),
                    "codec": clip.codec,
                }
                for i, clip in enumerate(self.clips)
            ],
            "probe": self.probe,
            "sentences": list(self.sentences()),
            "limits": {name: _ALL[name].limit for name in self.values},
        }


def audit(
    clips: Sequence[Clip], *, needed_s: float | None = None, student: Sequence[Clip] = ()
) -> Audit:
    """Make every check that needs no network. `student`: its videos, for the probe."""
    marks, common = overlay(clips)
    values = check_all(clips, needed_s) | {"overlay": marks}
    found = Audit(list(clips), values, common=common)
    readable = [clip for clip in clips if clip.problem is None]
    if len(student) >= 5 and len(readable) >= 5:
        found.probe = separability(statistics(readable), statistics(list(student)))
    return found


def read_trust(path: Path) -> dict[str, float]:
    """Per file name the trust that an audit.json gives its clip. Raises ConfigError."""
    try:
        rows = parse_json(read_text(path))["clips"]
        return {str(row["file"]): float(row["trust"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"teacher.robust.audit {path}: is no audit.json of afd teacher audit ({error})"
        ) from None
