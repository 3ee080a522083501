"""The pages of the repository and of the site: links, anchors, alarms, letters, code."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.builder.repository import ROOT, linked_pages, targets, uri

PAGES = [
    line
    for line in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    if (ROOT / line).is_file()
]
LOGS = ("_log.warning", "_log.error")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """The headings of a page as links name them; one that stands twice has no anchor to rely on."""
    lines = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if re.match(r"#+ ", line)]
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    made = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain]
    return {one for one in made if made.count(one) == 1}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_anchor_resolves(page: str) -> None:
    for path, anchor in targets(page, read(page)):
        assert (ROOT / path).is_file(), f"{page}: {path}"
        assert not anchor or anchor in anchors(path), f"{page}: {path}#{anchor}"


def test_pages_of_the_site_have_names_of_their_own() -> None:
    own = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")]
    made = [uri(path) for path in (*own, *linked_pages())]
    assert len(set(made)) == len(made)
    assert {"index.md", "CONTRIBUTING.md", "source/examples/adapt_watch_export.ipynb.md"} <= set(
        made
    )


@functools.cache
def package() -> dict[Path, ast.Module]:
    """The syntax trees of the package's files."""
    files = sorted((ROOT / "python" / "afd").rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def messages() -> Iterator[str]:
    """Every sentence that the package logs as a warning or an error."""
    for path, tree in package().items():
        if path.name in ("health.py", "collapse.py", "fooled.py", "several.py"):
            yield from sentences(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _called(node) in LOGS:
                found = first(node.args[0], tree)
                # What is passed on is a sentence from elsewhere: an alarm's, or an error's.
                if found not in ("%s", "update %d: %s"):
                    yield found


def _called(node: ast.Call) -> str:
    function = node.func
    logs = isinstance(function, ast.Attribute) and function.attr in ("warning", "error")
    return ast.unparse(function) if logs else ""


def sentences(tree: ast.AST) -> Iterator[str]:
    """The texts of a module of alarms, without its docstrings and the parts of other texts."""
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        found = text(node)
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for value in node.values for part in ast.walk(value)}
        if found and found.count(" ") > 5 and id(node) not in skipped:
            yield found


def first(argument: ast.expr, tree: ast.AST) -> str:
    """A logged format, also where it is in a variable."""
    if isinstance(argument, ast.Name):
        for node in ast.walk(tree):
            named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == argument.id
            if named and (found := text(node.value)):
                return found
    return text(argument) or ""


def text(node: ast.AST) -> str | None:
    """A string, with … in the place of its values; else None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) or "…" for part in node.values)
    return None


def quoted() -> list[str]:
    """The messages that the page treats, as its tables quote them."""
    page = read("docs/TROUBLESHOOTING.md")
    return re.findall(r"^\| `([^`]+)` \|", page, re.M)


def test_every_alarm_and_warning_is_treated() -> None:
    found = sorted(set(messages()))
    assert len(found) > 40
    missing = [message for message in found if not any(part in message for part in quoted())]
    assert not missing


def test_every_quoted_message_is_one_of_the_code() -> None:
    strings = {
        found for tree in package().values() for node in ast.walk(tree) if (found := text(node))
    }
    stale = [part for part in quoted() if not any(part in one for one in strings)]
    assert not stale


def test_every_shape_letter_is_in_the_glossary() -> None:
    letters: set[str] = set()
    for tree in package().values():
        names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        names += [n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)]
        for name in names:
            if match := re.fullmatch(r"[a-z][a-z0-9_]*_([A-Z1]{1,6})", name):
                letters |= set(match[1])
    assert len(letters) > 10
    listed = re.findall(r"^\| ([A-Za-z1, ]+) \|", read("docs/GLOSSARY.md"), re.M)
    assert letters <= {letter for one in listed for letter in one.split(", ")}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.M | re.S)


@pytest.mark.parametrize("page", ["docs/start/trainers.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    for code in blocks(page, "python"):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_programs_and_targets_of_the_pages_exist() -> None:
    """`python FILE`, `python -m MODULE` and `make TARGET`, in code blocks and in sentences."""
    made = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    for page in PAGES:
        code = "\n".join(re.findall(r"`([^`\n]+)`", read(page)) + blocks(page, "sh"))
        for file in re.findall(r"\bpython ((?:benchmarks|docs|examples)/\S+\.py)", code):
            assert (ROOT / file).is_file(), f"{page}: {file}"
        for name in re.findall(r"\bpython -m ((?:benchmarks|docs|tests)\.[\w.]+)", code):
            path = ROOT / name.replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.is_dir(), f"{page}: {name}"
        assert {t for t in re.findall(r"^make ([a-z-]+)", code, re.M)} <= made, page
