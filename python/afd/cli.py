"""The `afd` command.

Exit codes: 0 done (now or before), 1 the run failed, 2 a mistake in the command, the configuration
or a file it names, 3 the disk failed (full, read-only, gone), 130 stopped by Ctrl-C, SIGTERM or
SIGHUP. docs/TRAINING.md has the table.

This module parses; verbs.py runs. Both import only the core dependencies, and each verb's function
what it needs; a missing package is reported in one sentence that names the extra providing it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import afd
from afd import extras, verbs
from afd.errors import FAILED, MISTAKE, STOPPED, STORAGE, AfdError, ConfigError
from afd.files import DISK, what_failed
from afd.terminal import CommandParser, drop, ended_by_signals, lasting_streams, occupy

# The shells that `--print-completion` supports, and how they complete paths.
SHELLS = ("bash", "zsh")
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}
FOLDERS = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A path may contain undecodable bytes, and a prompt characters that the terminal lacks.
        # A stream that a caller has replaced may not support being reconfigured.
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:2] == ["teacher", "simulate"]:
        try:
            if not {"-h", "--help"} & {*words}:
                extras.need("afd teacher simulate", "av")
        except ConfigError as error:
            return verbs.fail(error.exit_code, str(error))
        # The teacher is a black box here, too: a separate process that parses its own options.
        command = [sys.executable, "-m", "afd.lab.simulator", *words[2:]]
        return subprocess.run(command, check=False).returncode
    occupy()
    try:
        options = _options(words)
    except ConfigError as error:
        return verbs.fail(error.exit_code, str(error))
    with ExitStack() as stack:
        if options.lasts or getattr(options, "live", False):
            stack.enter_context(lasting_streams())
            stack.enter_context(ended_by_signals())
        return _run_command(options)


def _run_command(options: argparse.Namespace) -> int:
    """Run a command, turning errors a user can act on into one sentence and an exit code."""
    try:
        code = int(options.run(options))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except AfdError as error:
        return verbs.fail(error.exit_code, str(error))
    except ModuleNotFoundError as error:
        absent = extras.absent_module(f"afd {options.command}", error)
        if absent is None:
            raise
        return verbs.fail(absent.exit_code, str(absent))
    except BrokenPipeError:
        # The reader of a command that only prints has closed the pipe.
        drop(1)
        return FAILED
    except OSError as error:
        if error.errno in DISK:
            remedy = f"{DISK[error.errno]}, and run the same command again"
            return verbs.fail(STORAGE, f"{what_failed(error)}; {remedy}")
        # An error with a file name concerns the user's input; any other is a failure of the run.
        return verbs.fail(FAILED if error.filename is None else MISTAKE, what_failed(error))
    except KeyboardInterrupt:
        return verbs.fail(STOPPED, "interrupted; unfinished work was not saved")


def _options(words: list[str]) -> argparse.Namespace:
    """Parse the command line; overrides may follow options, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    lost = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if lost:
        parser.error(f"unrecognized arguments: {' '.join(lost)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="afd", description="On-policy adversarial flow distillation.")
    parser.add_argument("--version", action="version", version=f"afd {afd.__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="print a script that completes commands, options and paths in this shell",
    )
    # Whether a command outlives its terminal, as those do that run for hours and write files.
    parser.set_defaults(lasts=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train with a YAML configuration, or continue such a run"
    )
    _takes_config(train)
    _takes_plan(train, "memory, hours and cost")
    _takes_overrides(train)
    train.set_defaults(run=verbs.train, lasts=True)

    resume = commands.add_parser(
        "resume", help="continue a stopped run, bitwise as if it had not stopped"
    )
    _takes_run(resume)
    _takes_overrides(resume)
    resume.set_defaults(run=verbs.resume, lasts=True)

    evaluate = commands.add_parser("eval", help="evaluate a run's newest checkpoint again")
    _takes_run(evaluate)
    evaluate.add_argument("--videos", type=_count, default=None, help="number of held-out videos")
    _takes_overrides(
        evaluate,
        "overrides of evaluation and of keys that change no update, such as evaluation.seed=7",
    )
    evaluate.set_defaults(run=verbs.evaluate, lasts=True)

    benchmark = commands.add_parser(
        "benchmark", help="generate and rate videos for VBench, VideoPhy-2 and VideoAlign"
    )
    _takes_config(benchmark)
    _takes_overrides(benchmark, "overrides such as run=RUN_DIR limit=20")
    benchmark.set_defaults(run=verbs.benchmark, lasts=True)

    quickstart = commands.add_parser(
        "quickstart", help="teacher, base, SFT and AFD on a laptop, with a report"
    )
    _takes_overrides(quickstart)
    quickstart.set_defaults(run=verbs.quickstart, lasts=True)

    ablation = commands.add_parser(
        "ablation", help="run an ablation: its runs, a table, the r curves"
    )
    _takes_config(ablation)
    _takes_overrides(ablation, more="also seeds=[0,1,2] and rows=[...] choose a part")
    ablation.set_defaults(run=verbs.ablation, lasts=True)

    adapt = commands.add_parser("adapt", help="train on one domain after another")
    _takes_config(adapt)
    _takes_plan(adapt, "memory, hours and cost per domain")
    _takes_overrides(adapt, more="those of all domains' runs; name= and out= are the sequence's")
    adapt.set_defaults(run=verbs.adapt, lasts=True)

    sample = commands.add_parser(
        "sample", help="stream videos of prompts from a student's checkpoint into mp4 files"
    )
    _takes_config(sample)
    sample.add_argument("--config", action=_Refused, nargs="?", help=argparse.SUPPRESS)
    sample.add_argument(
        "--dry-run", action="store_true", help="print the plan and its memory; load nothing"
    )
    _takes_overrides(
        sample, "overrides such as student.checkpoint=FILE prompts=FILE.txt out=DIR window=9 sink=3"
    )
    sample.set_defaults(run=verbs.sample, lasts=True)

    live = commands.add_parser(
        "live", help="watch, steer and compare students' streams in the browser"
    )
    live.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG.yaml",
        help="configuration as of afd sample; without one the shipped laptop student streams",
    ).complete = FILES  # type: ignore[attr-defined]
    _takes_server(live)
    _takes_overrides(live, "overrides such as checkpoint=FILE compare=[FILE] window=12 out=DIR")
    live.set_defaults(run=verbs.live, lasts=True)

    export = commands.add_parser(
        "export", help="write a run's weights as a LoRA or model that other programs load"
    )
    _takes_run(export)
    export.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="k=v",
        help="out=DIR (required), kind=peft|diffusers_lora|self_forcing|diffusers, "
        "weights=ema|old|theta, against=released|start, rank=, dtype=",
    )
    export.set_defaults(run=verbs.export)

    configs = commands.add_parser("configs", help="list the shipped configurations, or copy one")
    configs.set_defaults(run=verbs.configs)
    actions = configs.add_subparsers(dest="action", metavar="ACTION")
    copy = actions.add_parser("copy", help="copy a shipped configuration, to be edited")
    copy.add_argument("name", metavar="NAME")
    to = copy.add_argument("to", type=Path, nargs="?", metavar="DEST", help="file or folder")
    to.complete = FILES  # type: ignore[attr-defined]

    report = commands.add_parser("report", help="write report.html of a run or a quickstart")
    _takes_run(report)
    report.add_argument(
        "--live", action="store_true", help="serve the report instead, renewed while a run trains"
    )
    _takes_server(report)
    report.set_defaults(run=verbs.report)

    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=verbs.doctor)

    teacher = commands.add_parser("teacher", help="fill a teacher's folder, or show its state")
    teacher.set_defaults(run=verbs.teacher)
    of_teacher = teacher.add_subparsers(dest="verb", metavar="VERB")
    of_teacher.add_parser("simulate", help="write simulated videos: --style S --count N --out DIR")
    fetch = of_teacher.add_parser("fetch", help="buy all videos of a paid teacher in advance")
    fetch.set_defaults(lasts=True)
    status = of_teacher.add_parser("status", help="contents and cost of a paid teacher's folder")
    status.add_argument("--json", action="store_true", help="print JSON")
    for verb in (fetch, status):
        _takes_config(verb)
        _takes_overrides(verb)
    audit = of_teacher.add_parser("audit", help="which clips not to trust: a page with pictures")
    source = audit.add_argument("config", type=Path, metavar="FOLDER|CONFIG.yaml")
    source.complete = FILES  # type: ignore[attr-defined]
    _takes_overrides(audit, more="also out= run= student= videos=")
    return parser


class _Refused(argparse.Action):
    """Reject the former `afd sample --config CONFIG.yaml`."""

    def __call__(self, *_: Any) -> None:
        raise ConfigError("sample: got --config; needed: afd sample CONFIG.yaml k=v …")


class _PrintCompletion(argparse.Action):
    """Print a shell's completion script and exit."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, *_: Any
    ) -> None:
        extras.need("--print-completion", "shtab")
        import shtab

        print(shtab.complete(parser, values))
        parser.exit()


def _takes_config(parser: argparse.ArgumentParser) -> None:
    text = "a YAML file, or a name that `afd configs` lists"
    action = parser.add_argument("config", type=Path, metavar="CONFIG", help=text)
    action.complete = FILES  # type: ignore[attr-defined]


def _takes_run(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    action.complete = FOLDERS  # type: ignore[attr-defined]


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; needed: a whole number of at least 1")
    return int(text)


def _takes_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; beyond loopback with a token",
    )
    parser.add_argument("--port", type=int, default=8742, help="0: a free one")
    parser.add_argument("--public", metavar="URL", help="URL of the proxy in front, if any")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def _takes_plan(parser: argparse.ArgumentParser, estimates: str) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help=f"print estimates of {estimates}; train nothing"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=None,
        help="dry run: number of GPUs that torchrun will train on",
    )


def _takes_overrides(
    parser: argparse.ArgumentParser,
    text: str = "overrides such as afd.nft_beta=0.5 teacher.style=mark",
    more: str = "",
) -> None:
    help_text = f"{text}; {more}" if more else text
    parser.add_argument("overrides", nargs="*", default=[], metavar="k=v", help=help_text)


if __name__ == "__main__":
    sys.exit(main())
