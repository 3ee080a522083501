"""The door of YAML: whatever a file or an override contains, plain bounded data or ConfigError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from afd.benchmarks.config import BenchmarkConfig
from afd.config.base import Section
from afd.config.run import RunConfig, load_config, make_config, read_yaml, to_yaml
from afd.config.yaml import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse_yaml
from afd.errors import ConfigError, YamlError
from afd.lab.ablation import AblationConfig
from afd.sampling.config import SampleConfig

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "python" / "afd" / "configs").rglob("*.yaml"))
ROOTS: tuple[type[Section], ...] = (RunConfig, SampleConfig, BenchmarkConfig, AblationConfig)
ODD = [
    *("&a ", "*a", "<<: *a", "<<: [*a, *a]", "!!python/object:os.system ", "!!binary ", "!!set "),
    *("!x ", "? ", "- ", "{", "}", "[", "]", ": ", "#", "|\n", ">\n", "'", '"', "---\n", "...\n"),
    *("%YAML 9\n", "\t", "\0", "\ufeff", "\x85", "\u2028", "\x7f", "\ud83d", "😀", '"\\ud83d"'),
    *('"\\0"', "\r", "1e999", ".nan", ".inf", "-.inf", "9" * 5000, "0x" + "f" * 40, "0777", "0b_"),
    *("1_0", "12:30:00", "2026-11-28", "2026-13-45", "yes", "null", "~", "true", "", "<<", "="),
    *("!!int x", "!!bool x"),
]
KEYS = (
    "steps",
    "out",
    "seed",
    "video.fps",
    "student.denoising_steps",
    "student.checkpoint",
    "teacher",
)
ODD_KEYS = ("", ".", "a.b", "out.x", "teacher.kind", "logging.wandb", "😀")


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def size(value: Any) -> tuple[int, int]:
    """Values and depth of plain data; anything else fails the test."""
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        value = list(value.values())
    elif not isinstance(value, list):
        assert value is None or type(value) in (bool, int, float, str)
        return 1, 1
    parts = [size(part) for part in value]
    return 1 + sum(n for n, _ in parts), 1 + max((d for _, d in parts), default=0)


def one_line(error: BaseException, name: str = "") -> None:
    assert str(error)
    assert name in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A shipped file with odd pieces put in or over its own, cut, or repeated."""
    data = draw(st.sampled_from(FILES)).read_bytes()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        gone = draw(st.integers(0, 12))
        piece = draw(
            st.sampled_from(ODD).map(lambda text: text.encode("utf-8", "surrogatepass"))
            | st.binary(max_size=6)
        )
        data = data[:at] + piece + data[at + gone :]
    return draw(st.sampled_from([data, data[: len(data) // 2], data + data]))


@given(data=mutated())
def test_a_damaged_file_is_read_or_refused_in_a_sentence(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    try:
        nodes, depth = size(read_yaml(path))
    except ConfigError as error:
        one_line(error, str(path))
        return
    assert nodes <= 2 * MAX_NODES
    assert depth <= MAX_DEPTH
    for root in ROOTS:
        try:
            config = load_config(path, [], root)
        except ConfigError:
            continue
        if isinstance(config, RunConfig):
            path.write_text(to_yaml(config), encoding="utf-8")
            assert load_config(path) == config
            path.write_bytes(data)


@given(text=st.lists(st.sampled_from(ODD) | st.text(max_size=4), max_size=12).map("".join))
def test_any_text_is_plain_data_or_refused(text: str) -> None:
    try:
        size(parse_yaml(text))
    except YamlError as error:
        one_line(error)


@given(key=st.sampled_from([*KEYS, *ODD_KEYS]), text=st.sampled_from(ODD) | st.text(max_size=12))
def test_any_override_is_taken_or_refused(key: str, text: str) -> None:
    try:
        config = make_config({}, [f"{key}={text}"])
    except ConfigError as error:
        one_line(error)
        return
    if key == "out" and text not in ("", "~", "null") and text[0] not in "\"'":
        assert str(config.out) == str(Path(text))


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1)
BYTES = st.binary(min_size=1).map(lambda b: text_of(b.replace(b"/", b"_").replace(b"\0", b"_")))


@given(name=NAMES | BYTES)
@example(name="\x85")
@example(name="a\u2028b \u2029")
def test_a_path_of_any_legal_characters_comes_through(name: str, tmp_path: Path) -> None:
    """As an override, in quotes as JSON writes them, and through a run's config.yaml."""
    path = f"./{name}"
    config = make_config({}, [f"teacher.path={path}", f"student.checkpoint={path}"])
    assert make_config({}, [f"teacher.path={json.dumps(path)}"]).teacher == config.teacher
    assert config.teacher.path == Path(path)
    assert config.student.checkpoint == path
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    if not any("\udc80" <= letter <= "\udcff" for letter in name):
        assert make_config({}, [f"out={path}"]).out == Path(path)
        return
    with pytest.raises(ConfigError, match="needed: a name in UTF-8"):
        make_config({}, [f"out={path}"])


def test_alias_bombs_are_refused_before_anything_is_built() -> None:
    lists = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    merges = "a0: &a0 {k: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    for text in (lists, merges, "a: x\n" * (MAX_NODES + 1)):
        with pytest.raises(YamlError, match=rf"line \d+: more than {MAX_NODES} values"):
            parse_yaml(text)
    chain = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 40))
    for text in (chain, "[" * 100_000, "- " * 5_000):
        with pytest.raises(YamlError, match=f"nested deeper than {MAX_DEPTH}"):
            parse_yaml(text)
    with pytest.raises(YamlError, match=f"more than {MAX_BYTES} bytes"):
        parse_yaml("#" * (MAX_BYTES + 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "line 1: it contains itself"),
        ("a: 1\n2: 3", "line 2: key '2' is not text; needed: quotes around it"),
        ("a: 1\na: 2", "line 2: key 'a' appears twice"),
        ("a: !!python/name:os.system x", "tag '!!python/name:os.system' is not allowed"),
        ("a: !!int x", "'x' does not have the form of !!int"),
        ("a: 9223372036854775808", "is too large; needed: below 2\\*\\*63"),
        ('a: "x\\0"', "contains a zero byte"),
        ('a: "\\ud83d"', "contains a lone surrogate"),
        ("--- 1\n--- 2", "line 2: .*another document"),
        ("a:\n\t- b", "line 2: .*cannot start any token"),
    ],
)
def test_what_is_refused_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message) as error:
        parse_yaml(text)
    one_line(error.value)


def test_scalars_are_what_they_look_like() -> None:
    text = "[2026-11-28, 12:30, 010, yes, 1e-4, 0x10, 1_000, .5, <<, =, '1', \"\\ud83d\\ude00\"]"
    held = ["2026-11-28", "12:30", "010", "yes", "1e-4", 16, 1000, 0.5, "<<", "=", "1", "😀"]
    assert parse_yaml(text) == held
    merged = parse_yaml("b: &b {a: 1}\nm: &m {<<: *b, a: 2}\nt: {<<: *m, c: 3}")
    assert merged["t"] == {"a": 2, "c": 3}


@pytest.mark.parametrize(
    "data", [b"\xff\xfea\0", b"name: caf\xe9", b"\0", bytes(range(255, 0, -1))], ids=len
)
def test_a_file_that_is_no_utf8_is_named_with_its_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a b.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="line 1: ") as error:
        read_yaml(path)
    one_line(error.value)
