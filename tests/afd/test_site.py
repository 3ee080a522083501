"""The documentation site: it builds without a warning and asks nothing of a network."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from afd.cli import _parser
from afd.config.keys import known_keys
from docs.builder import api, commands, keys
from docs.builder.repository import ROOT, rewritten

needs_mkdocs = pytest.mark.skipif(
    find_spec("material") is None or find_spec("mkdocstrings_handlers") is None,
    reason="needs mkdocs-material and mkdocstrings-python (pip install 'afd-video[docs]')",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@needs_mkdocs
def test_the_site_asks_nothing_of_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    loaded = (
        r"<(?:script|img|iframe|source)[^>]+src=[\"']?([^\"' >]+)|<link[^>]+href=[\"']?([^\"' >]+)"
    )
    for path in pages:
        for found in re.findall(loaded, path.read_text(encoding="utf-8")):
            assert not re.match(r"(https?:)?//", "".join(found)), f"{path.name}: {found}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import", path.read_text(encoding="utf-8")), path


@pytest.mark.slow
@needs_mkdocs
def test_every_public_name_has_its_entry(site: Path) -> None:
    entries: set[str] = set()
    for path in (site / "reference" / "api").glob("*.html"):
        entries |= set(re.findall(r"id=\"?(afd[\w.]+)", path.read_text(encoding="utf-8")))
    for modules in api.MODULES.values():
        for module in modules:
            for name in api.public_names(module):
                assert f"{module}.{name}" in entries, name
    for module, names in api.extension_points().items():
        for name in names:
            assert f"{module}.{name}" in entries, name
    page = (site / "reference" / "api" / "ops.html").read_text(encoding="utf-8")
    for words in ("int64 [B]", "Raises", "ValueError", "prior_weight"):
        assert words in page


def test_every_key_has_its_row() -> None:
    # The bars within code, and those that are escaped, separate no cells.
    page = re.sub(r"`[^`\n]*`|\\\|", lambda m: m[0].replace("|", "/"), keys.page())
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+ \| [^|]+) \|", page, re.M))
    assert all(cell.strip() for row in rows.values() for cell in row.split("|"))
    for root in keys.ROOTS.values():
        assert set(known_keys(root)) <= rows.keys()


def test_every_command_and_option_is_listed() -> None:
    page = commands.page()
    for parser in parsers(_parser()):
        assert parser.prog == "afd" or f"## {parser.prog}\n" in page
        for action in parser._actions:
            if action.option_strings and "-h" not in action.option_strings:
                shown = action.help == argparse.SUPPRESS
                assert any(f"`{name}" in page for name in action.option_strings) or shown


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", text, re.M)
    own = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    generated = ["reference/cli.md", "reference/configuration.md", *api.pages()]
    assert sorted({*own, *generated} - set(listed)) == []
    assert len(listed) == len(set(listed))


def test_links_lead_where_the_site_has_their_targets() -> None:
    text = (
        "[a](../LICENSE) [b](OPS.md#backends) ![c](live.png) `[d](../x)` [e](https://x.org/a.md)\n"
        "```\n[f](../y)\n```\n[g](#h) [i](../README.md) [`j`](start/adapt.md)"
    )
    assert rewritten("docs/HOWTO.md", text) == (
        "[a](source/LICENSE.md) [b](OPS.md#backends) ![c](live.png) `[d](../x)` "
        "[e](https://x.org/a.md)\n```\n[f](../y)\n```\n[g](#h) [i](index.md) [`j`](start/adapt.md)"
    )
    text = "Said:\n- a\n  b\n- c\n\n```\nx\n- y\n```\nIn order\n1. z\n"
    spaced = text.replace("Said:\n", "Said:\n\n").replace("order\n", "order\n\n")
    assert rewritten("docs/HOWTO.md", text) == spaced
    moved = rewritten("examples/integrations/README.md", "[a](../../docs/OPS.md) [b](unirl.md)")
    assert moved == "[a](../../OPS.md) [b](unirl.md)"
