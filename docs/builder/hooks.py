"""Hooks of MkDocs (mkdocs.yml): pages from outside docs/, generated references, and links."""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.builder import api, commands, keys
from docs.builder.repository import linked_pages, rewritten, uri

_origins: dict[str, str] = {}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for file in files.documentation_pages():
        _origins[file.src_uri] = f"docs/{file.src_uri}"
    for path, text in linked_pages().items():
        _origins[uri(path)] = path
        files.append(File.generated(config, uri(path), content=text))
    generated = {"reference/cli.md": commands.page(), "reference/configuration.md": keys.page()}
    for name, text in (generated | api.pages()).items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Lead links where the site has their targets."""
    origin = _origins.get(page.file.src_uri)
    return markdown if origin is None else rewritten(origin, markdown)
