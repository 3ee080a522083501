"""The reports' templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from afd.lab.report import metrics, phase_times


def render(template: str, page: dict[str, Any]) -> str:
    """A template of this folder with a page's variables; HTML in them is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": metrics.number, "duration": phase_times.duration}
    environment.filters["phase_color"] = phase_times.phase_color
    return environment.get_template(template).render(page)
