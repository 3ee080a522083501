"""The pages of the public Python names, which mkdocstrings fills from the docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from docs.builder.repository import ROOT

# Page and its modules; the names are those of `__all__`, or all that have no underscore.
MODULES = {
    "afd": ("afd",),
    "ops": ("afd.ops", "afd_kernels.block_attention.intervals"),
    "optimality": ("afd.optimality",),
    "schedules": ("afd.schedules",),
    "rollout": ("afd.rollout",),
    "cache": ("afd.cache",),
    "integrations": ("afd.integrations.nft", "afd.integrations.diffusers"),
}
# Modules among those names, which have an entry of their own.
OWN = ("afd.ops", "afd.rollout", "afd.ops.intervals")
# What a package of one's own builds on is what the example package imports, and what it names.
EXTENDING = ROOT / "docs" / "EXTENDING.md"
NAMED = {
    "afd.errors": ["Unanswered"],
    "afd.teachers.base": ["Teacher"],
    "afd.trainer.evaluate": ["Metrics"],
    "afd_kernels.registry": ["define"],
}


def pages() -> dict[str, str]:
    """Markdown by the page's name on the site."""
    made = {}
    for name, modules in MODULES.items():
        parts = [_directive(module, public_names(module)) for module in modules]
        made[f"reference/api/{name}.md"] = _page(name, parts)
    parts = [_directive(module, names) for module, names in extension_points().items()]
    made["reference/api/extending.md"] = _page("extension points", parts)
    return made


def public_names(module: str) -> list[str]:
    """`__all__` of a module, or its definitions without an underscore; nothing is imported."""
    tree = ast.parse(_file(module).read_text(encoding="utf-8"))
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
            names = ast.literal_eval(node.value)
            return [str(name) for name in names if f"{module}.{name}" not in OWN]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node.name)
    return found


def extension_points() -> dict[str, list[str]]:
    """The names that docs/EXTENDING.md is about, by module."""
    found = {module: list(names) for module, names in NAMED.items()}
    for block in re.findall(r"```python\n(.*?)```", EXTENDING.read_text(encoding="utf-8"), re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("afd"):
                names = [a.name for a in node.names if f"{node.module}.{a.name}" not in found]
                own = found.setdefault(str(node.module), []) if names else []
                own += [name for name in names if name not in own]
    return dict(sorted(found.items()))


def _file(module: str) -> Path:
    home = ROOT if module.startswith("afd_kernels") else ROOT / "python"
    base = home / module.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _page(title: str, parts: Iterable[str]) -> str:
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def _directive(module: str, names: list[str]) -> str:
    shown = "".join(f"\n        - {name}" for name in names)
    return f"::: {module}\n    options:\n      members:{shown}"
