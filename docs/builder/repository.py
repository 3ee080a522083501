"""Files of the repository as pages of the site: which ones, and where links between them lead.

The pages in docs/ are the site's own. README.md is its home, and every file outside docs/ that a
page links to becomes a page, too: Markdown as it is, notebooks cell by cell, anything else as its
source. Needs the standard library alone, because the tests check the links with it.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = "README.md"
# Code, which is left as it is, or the target of a link or picture.
_PARTS = re.compile(r"^```.*?^```$|`[^`\n]+`|(?<=\]\()[^)\s]+(?=\))", re.M | re.S)
# A paragraph's last line before a list, which GitHub ends there and Python-Markdown does not.
_LIST = re.compile(r"^```.*?^```$|^(?![-#>|\s]|\d+\. )[^\n]+\n(?=(?:-|1\.) )", re.M | re.S)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "sh", ".json": "json", ".toml": "toml"}


def uri(path: str) -> str:
    """The Markdown file of the site that shows a file of the repository, or a picture in docs/."""
    if path == HOME:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(".md") else f"source/{path}.md"


def targets(page: str, text: str) -> Iterator[tuple[str, str]]:
    """The file and the anchor of every link within the repository, from a page's Markdown."""
    for part in _PARTS.findall(text):
        if _is_link(part) and "://" not in part:
            yield _target(page, part)


def rewritten(page: str, text: str) -> str:
    """A page's Markdown with the links that are right on the site and the lists of GitHub."""

    def one(match: re.Match[str]) -> str:
        link = match[0]
        if not _is_link(link) or "://" in link or link.startswith("#"):
            return link
        path, anchor = _target(page, link)
        found = posixpath.relpath(uri(path), posixpath.dirname(uri(page)) or ".")
        return f"{found}#{anchor}" if anchor else found

    text = _LIST.sub(lambda m: m[0] if m[0].startswith("```") else f"{m[0]}\n", text)
    return _PARTS.sub(one, text)


def linked_pages() -> dict[str, str]:
    """The Markdown of every page outside docs/ by its path in the repository."""
    own = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
    seen, waiting = {HOME, *own}, [HOME, *own]
    while waiting:
        page = waiting.pop()
        text = (ROOT / page).read_text(encoding="utf-8")
        for path, _ in targets(page, text) if page.endswith(".md") else ():
            if path not in seen and not (path.startswith("docs/") and not path.endswith(".md")):
                seen.add(path)
                waiting.append(path)
    return {path: _markdown(path) for path in sorted(seen - set(own))}


def _is_link(part: str) -> bool:
    return not part.startswith("`")


def _target(page: str, link: str) -> tuple[str, str]:
    name, _, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), name)) if name else page
    return path, anchor


def _markdown(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    kind = os.path.splitext(path)[1]
    if kind == ".md":
        return text
    if kind == ".ipynb":
        return "\n\n".join(_cells(json.loads(text)["cells"]))
    return f"# {posixpath.basename(path)}\n\n`{path}`\n\n{_fenced(text, _LANGUAGES.get(kind, ''))}"


def _cells(cells: list[dict[str, str | list[str]]]) -> Iterator[str]:
    shown: dict[str, Callable[[str], str]] = {"code": lambda text: _fenced(text, "python")}
    for cell in cells:
        text = "".join(cell["source"])
        yield shown.get(str(cell["cell_type"]), str)(text)


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"
