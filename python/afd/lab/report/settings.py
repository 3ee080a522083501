"""The report's last part: what ran, on what, with which settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from afd.config.run import flatten
from afd.lab.report.read import Part, runs


def progress(part: Part) -> str:
    steps = part.config.get("updates")
    return f"update {part.step}" + (f" of {steps}" if steps else "")


def facts(parts: dict[str, Part]) -> Iterator[tuple[str, str]]:
    """Versions, machine and backends of the newest run."""
    doctor = next((part.doctor for part in runs(parts) if part.doctor), {})
    for part in runs(parts):
        if part.folder is not None:
            state = "finished" if part.finished else "unfinished"
            when = part.when.strftime(", %Y-%m-%d %H:%M") if part.when else ""
            yield (
                part.label,
                f"{state}, {progress(part)}, seed {part.config.get('seed', '?')}{when}",
            )
    teacher = next((t for p in runs(parts) if isinstance(t := p.config.get("teacher"), dict)), {})
    source = parts["teacher"].source
    if source is not None:
        look = f", look “{teacher.get('style', '?')}”" if teacher.get("kind") == "simulator" else ""
        yield "Teacher", f"{len(source.requests)} finished videos{look}"
    ops = doctor.get("ops")
    for op, state in ops.items() if isinstance(ops, dict) else ():
        chosen = state.get("chosen") if isinstance(state, dict) else state
        yield f"afd.ops.{op}", f"{chosen} backend"
    cpu = doctor.get("cpu")
    if isinstance(cpu, dict):
        model, threads, capability = (cpu.get(k, "?") for k in ("model", "threads", "capability"))
        yield "CPU", f"{model}, {threads} threads, {capability}"
    for key in ("afd", "python", "platform"):
        if key in doctor:
            yield key if key == "afd" else key.capitalize(), str(doctor[key])
    packages = doctor.get("packages")
    if isinstance(packages, dict):
        yield "Packages", ", ".join(f"{name} {version}" for name, version in packages.items())


def config_table(parts: dict[str, Part]) -> dict[str, Any] | None:
    """The resolved configurations side by side; keys in which they differ are marked."""
    ran = [part for part in runs(parts) if part.config]
    if not ran:
        return None
    flat = [dict(flatten(part.config)) for part in ran]
    rows = []
    for key in dict.fromkeys(k for data in flat for k in data):
        cells = [str(data.get(key, "–")) for data in flat]
        rows.append({"key": key, "cells": cells, "differs": len(set(cells)) > 1})
    return {"labels": [part.label for part in ran], "rows": rows}
