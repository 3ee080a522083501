"""The report's sentences: what each metric means and, from the numbers alone, who did what."""

from __future__ import annotations

from dataclasses import dataclass

from afd.lab.physics import DEFINITIONS
from afd.lab.report.read import LABELS, RUNS

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """`better`: "lower", "higher", "teacher" (the closer to the teacher's value, the better), or
    "far" (only too near is bad, so there is no best)."""

    key: str
    name: str
    better: str

    @property
    def meaning(self) -> str:
        return DEFINITIONS.get(self.key, "")


METRICS = (
    Metric("phys", "Physics error", "lower"),
    Metric("g_mae", "Gravity error", "lower"),
    Metric("rend", "Look error", "lower"),
    Metric("traj_fd", "Trajectory distance", "lower"),
    Metric("fit_res", "Roughness", "lower"),
    Metric("motion", "Motion", "teacher"),
    Metric("adh", "Prompt kept", "higher"),
    Metric("div", "Diversity", "teacher"),
    Metric("nn", "Nearest in training", "far"),
)
DIRECTION = {
    "lower": "lower is better",
    "higher": "higher is better",
    "teacher": "best like the teacher’s",
    "far": "near 0 is memorised",
}

# The look counts as kept up to this rise of `rend`, and values this close (relative) as equal:
# two seeds of one recipe differ by about as much.
LOOK_KEPT = 0.01
EQUAL = 0.10


@dataclass(frozen=True)
class Headline:
    title: str
    paragraph: str


def number(value: float) -> str:
    """A value as the report prints it: 0.043, 1.32, 12.6."""
    size = abs(value)
    return f"{value:.3f}" if size < 1 else f"{value:.2f}" if size < 10 else f"{value:.1f}"


def best(metric: Metric, values: dict[str, float]) -> set[str]:
    """The columns but the teacher's whose printed value is the best one; none without a rival."""
    own = {name: value for name, value in values.items() if name != "teacher"}
    if (
        len(own) < 2
        or metric.better == "far"
        or (metric.better == "teacher" and "teacher" not in values)
    ):
        return set()
    badness = {
        "lower": lambda value: value,
        "higher": lambda value: -value,
        "teacher": lambda value: abs(value - values["teacher"]),
    }[metric.better]
    printed = {name: badness(float(number(value))) for name, value in own.items()}
    least = min(printed.values())
    return {name for name, value in printed.items() if value <= least + 1e-9}


def headline(metrics: Metrics, unfinished: dict[str, str]) -> Headline:
    """Title and paragraph. `unfinished` says of a run how far it is ("update 150 of 400")."""
    runs = [name for name in RUNS if "phys" in metrics.get(name, {})]
    base = metrics.get("base", {})
    if not runs:
        return Headline(
            "No student has been measured here", "This folder holds no student’s evaluation."
        )
    if "phys" not in base:
        told = [f"{LABELS[r]}’s physics error is {number(metrics[r]['phys'])} px" for r in runs]
        return Headline(
            "The students, without the base to compare with",
            f"{_join(told)}; the base student’s evaluation is missing.",
        )
    title = _title({name: _deeds(name, metrics) for name in runs})
    sentences = [_physics(runs, metrics), _gravity(runs, metrics), _look(runs, metrics)]
    if {"afd", "sft"} <= set(runs):
        sentences.append(_compare(metrics))
    for name, progress in unfinished.items():
        sentences.append(f"{LABELS[name]} is unfinished ({progress}): its numbers are provisional.")
    return Headline(title, " ".join(sentence for sentence in sentences if sentence))


def _title(deeds: dict[str, tuple[str, str]]) -> str:
    """'Both took most of the teacher’s physics; AFD kept the student’s look, SFT ...'"""
    if len(deeds) == 2:
        (first, first_look), (second, second_look) = deeds.values()
        if first == second and first_look and second_look:
            if first_look == second_look:
                return f"Both runs {first} and {first_look}"
            return f"Both runs {first}; AFD {first_look}, SFT {second_look}"
    told = (
        f"{LABELS[name]} {physics}" + (f" and {look}" if look else "")
        for name, (physics, look) in deeds.items()
    )
    # Right after "the teacher's physics" the teacher needs no second naming.
    return "; ".join(told).replace(
        "s physics and took over the teacher’s", "s physics and took over its"
    )


def _deeds(name: str, metrics: Metrics) -> tuple[str, str]:
    """What one run did to the physics and to the look, in words (the look's empty if unknown)."""
    base, own, teacher = metrics["base"], metrics[name], metrics.get("teacher", {})
    way = base["phys"] - teacher.get("phys", 0.0)
    gain = (base["phys"] - own["phys"]) / way if way > 0 else 0.0
    if gain >= 0.5:
        physics = "took most of the teacher’s physics"
    elif gain >= 0.1:
        physics = "took some of the teacher’s physics"
    elif gain > -0.1:
        physics = "left the physics as it was"
    else:
        physics = "moved away from the teacher’s physics"
    return physics, _look_of(base, own, teacher)


def _look_of(base: dict[str, float], own: dict[str, float], teacher: dict[str, float]) -> str:
    if "rend" not in base or "rend" not in own:
        return ""
    rise = own["rend"] - base["rend"]
    if rise <= LOOK_KEPT:
        return "kept the student’s look"
    foreign = teacher.get("rend", base["rend"]) - base["rend"]
    if foreign > LOOK_KEPT and rise >= 0.5 * foreign:
        return "took over the teacher’s look"
    return "lost some of the student’s look"


def _physics(runs: list[str], metrics: Metrics) -> str:
    return _from_to("The physics error", "phys", " px", runs, metrics)


def _gravity(runs: list[str], metrics: Metrics) -> str:
    return _from_to("The error of the fitted gravity", "g_mae", "", runs, metrics)


def _look(runs: list[str], metrics: Metrics) -> str:
    text = _from_to("The look error", "rend", "", runs, metrics)
    base, teacher = metrics["base"].get("rend"), metrics.get("teacher", {}).get("rend")
    if text and base is not None and teacher is not None and teacher - base <= LOOK_KEPT:
        text += " This teacher looks like the student, so there was no foreign look to resist."
    return text


def _from_to(what: str, key: str, unit: str, runs: list[str], metrics: Metrics) -> str:
    """'The look error went from 0.030 to 0.033 with AFD and to 0.153 with SFT (teacher 0.171).'"""
    runs = [name for name in runs if key in metrics[name]]
    if key not in metrics["base"] or not runs:
        return ""
    start = number(metrics["base"][key])
    teacher = metrics.get("teacher", {})
    note = f" (teacher {number(teacher[key])})" if key in teacher else ""
    if all(number(metrics[name][key]) == start for name in runs):
        return f"{what} stayed at {start}{unit} with {_join([LABELS[n] for n in runs])}{note}."
    ends = [f"to {number(metrics[name][key])} with {LABELS[name]}" for name in runs]
    ends[0] = ends[0].replace(" with", f"{unit} with", 1)
    changes = [float(number(metrics[name][key])) - float(start) for name in runs]
    verb = "fell" if max(changes) < 0 else "rose" if min(changes) > 0 else "went"
    return f"{what} {verb} from {start} {_join(ends)}{note}."


def _compare(metrics: Metrics) -> str:
    """Who is ahead in what; one word for values that two seeds would not tell apart."""
    afd, sft = metrics["afd"], metrics["sft"]
    ahead: dict[str, list[str]] = {"AFD": [], "SFT": [], "neither": []}
    if _leads(afd["phys"], sft["phys"], EQUAL * max(afd["phys"], sft["phys"])):
        ahead["AFD"].append("physics")
    elif _leads(sft["phys"], afd["phys"], EQUAL * max(afd["phys"], sft["phys"])):
        ahead["SFT"].append("physics")
    else:
        ahead["neither"].append("physics")
    if "rend" in afd and "rend" in sft:
        first = _leads(afd["rend"], sft["rend"], LOOK_KEPT)
        second = _leads(sft["rend"], afd["rend"], LOOK_KEPT)
        ahead["AFD" if first else "SFT" if second else "neither"].append("look")
    told = [f"{who} is ahead on {' and '.join(what)}" for who, what in ahead.items() if what]
    text = _join(told)
    return text[0].upper() + text[1:] + "."


def _leads(mine: float, theirs: float, margin: float) -> bool:
    return theirs - mine > margin


def _join(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
