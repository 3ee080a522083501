"""Title and first paragraph of a toy run's report, which summarise its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from afd.lab.report.metrics import number
from afd.lab.report.run_files import LABELS, RUNS

Metrics = Mapping[str, Mapping[str, float]]

# The look counts as kept up to this rise of `rend`, and physics errors this close (relative) count
# as equal: two seeds of one recipe differ by about as much.
LOOK_KEPT = 0.01
EQUAL = 0.10


def headline(metrics: Metrics, unfinished: Mapping[str, str]) -> tuple[str, str]:
    """Title and paragraph. `unfinished`: progress of unfinished runs ("update 150 of 400")."""
    runs = [name for name in RUNS if "phys" in metrics.get(name, {})]
    if not runs:
        return "No trained student has been evaluated", "This folder holds no student’s evaluation."
    if "phys" not in metrics.get("base", {}):
        return (
            "Results without the base student",
            "The base student has not been evaluated, so the runs have no reference.",
        )
    sentences = [
        _change("The physics error", "phys", " px", runs, metrics),
        _change("The gravity error", "g_mae", "", runs, metrics),
        _change("The look error", "rend", "", runs, metrics),
    ]
    base, teacher = metrics["base"].get("rend"), metrics.get("teacher", {}).get("rend")
    if base is not None and teacher is not None and teacher - base <= LOOK_KEPT:
        sentences.append("This teacher looks like the student, so there was no look to resist.")
    if {"afd", "sft"} <= set(runs):
        sentences.append(_comparison(metrics["afd"], metrics["sft"]))
    for name, progress in unfinished.items():
        sentences.append(f"{LABELS[name]} is unfinished ({progress}); its numbers are provisional.")
    return _title(runs, metrics), " ".join(filter(None, sentences))


def _title(runs: Sequence[str], metrics: Metrics) -> str:
    """'Both runs learned most of the teacher’s physics; AFD kept the student’s look, SFT ...'"""
    physics = {run: _physics(run, metrics) for run in runs}
    looks = {run: _look(run, metrics) for run in runs}
    if len(runs) == 2 and len(set(physics.values())) == 1 and all(looks.values()):
        same = len(set(looks.values())) == 1
        each = ", ".join(f"{LABELS[run]} {look}" for run, look in looks.items())
        return f"Both runs {physics[runs[0]]}" + (f" and {looks[runs[0]]}" if same else f"; {each}")
    return "; ".join(
        f"{LABELS[run]} {physics[run]}" + (f" and {looks[run]}" if looks[run] else "")
        for run in runs
    )


def _physics(run: str, metrics: Metrics) -> str:
    """How much of the gap to the teacher's physics error a run closed, in words."""
    base = metrics["base"]["phys"]
    way = base - metrics.get("teacher", {}).get("phys", 0.0)
    gain = (base - metrics[run]["phys"]) / way if way > 0 else 0.0
    if gain >= 0.1:
        return f"learned {'most' if gain >= 0.5 else 'some'} of the teacher’s physics"
    return "did not change the physics" if gain > -0.1 else "moved away from the teacher’s physics"


def _look(run: str, metrics: Metrics) -> str:
    """How the student's look changed, in words; empty if unknown."""
    base, own = metrics["base"].get("rend"), metrics[run].get("rend")
    if base is None or own is None:
        return ""
    if own - base <= LOOK_KEPT:
        return "kept the student’s look"
    foreign = metrics.get("teacher", {}).get("rend", base) - base
    copied = foreign > LOOK_KEPT and own - base >= 0.5 * foreign
    return "copied the teacher’s look" if copied else "lost some of the student’s look"


def _change(what: str, key: str, unit: str, runs: Sequence[str], metrics: Metrics) -> str:
    """'The look error rose from 0.030 to 0.033 with AFD and to 0.153 with SFT (teacher 0.171).'"""
    ends = {run: number(metrics[run][key]) for run in runs if key in metrics[run]}
    if key not in metrics["base"] or not ends:
        return ""
    start, teacher = number(metrics["base"][key]), metrics.get("teacher", {})
    note = f" (teacher {number(teacher[key])})." if key in teacher else "."
    if set(ends.values()) == {start}:
        return f"{what} stayed at {start}{unit} with {_join([LABELS[run] for run in ends])}{note}"
    changes = [float(end) - float(start) for end in ends.values()]
    verb = "fell" if max(changes) < 0 else "rose" if min(changes) > 0 else "went"
    values = [f"to {end}{unit} with {LABELS[run]}" for run, end in ends.items()]
    return f"{what} {verb} from {start} {_join(values)}{note}"


def _comparison(afd: Mapping[str, float], sft: Mapping[str, float]) -> str:
    """'AFD is ahead on look and neither is ahead on physics.'"""
    margins = {"phys": EQUAL * max(afd["phys"], sft["phys"]), "rend": LOOK_KEPT}
    ahead: dict[str, list[str]] = {"AFD": [], "SFT": [], "neither": []}
    for key, what in (("phys", "physics"), ("rend", "look")):
        if key in afd and key in sft:
            lead = sft[key] - afd[key]
            winner = "neither" if abs(lead) <= margins[key] else "AFD" if lead > 0 else "SFT"
            ahead[winner].append(what)
    text = _join([f"{who} is ahead on {' and '.join(what)}" for who, what in ahead.items() if what])
    return text[0].upper() + text[1:] + "."


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
