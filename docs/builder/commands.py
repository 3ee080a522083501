"""The page of the `afd` command, made from its parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from afd import cli
from afd.lab import simulator


def page() -> str:
    """Markdown: every command with its usage and arguments."""
    text = (cli.__doc__ or "").split("\n\n")
    codes = text[1].partition(" docs/")[0]
    parts = ["# Commands", "Generated from the parsers of `python/afd/cli.py`.", codes]
    return "\n\n".join([*parts, *_command(cli._parser(), 1)]) + "\n"


def _command(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    if level > 1:
        yield f"{'#' * level} {parser.prog}"
    if parser.description:
        yield _cell(parser.description)
    yield f"```text\n{parser.format_usage().removeprefix('usage: ').rstrip()}\n```"
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    rows = [_row(parser, a) for a in parser._actions if a not in below and _is_shown(a)]
    if rows:
        yield "\n".join(["| argument | meaning | default |", "|---|---|---|", *rows])
    for action in below:
        meanings = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, child in action.choices.items():
            child.description = child.description or _sentence(meanings.get(name, ""))
            own = simulator.parser(child.prog) if child.prog.endswith("simulate") else child
            yield from _command(own, level + 1)


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    value = action.metavar or action.dest.upper()
    if action.choices is not None:
        value = "|".join(map(str, action.choices))
    names = [f"{name} {value}" if action.nargs != 0 else name for name in action.option_strings]
    default = "" if action.default in (None, False, [], argparse.SUPPRESS) else action.default
    meaning = _cell((action.help or "").replace("%(default)s", str(action.default)))
    shown = " ".join(f"`{name}`" for name in names or [str(value)])
    return f"| {shown} | {meaning} | {f'`{default}`' if default != '' else ''} |"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
