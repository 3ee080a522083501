"""What each verb of the `afd` command does.

A function takes the parsed options and returns the exit code. It imports what it needs itself, so
that a package is missed only where it is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from afd.errors import DONE, FAILED, MISTAKE, STOPPED, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from afd.config.run import RunConfig


def fail(code: int, sentence: str) -> int:
    """Print an error; returns the exit code."""
    try:
        from rich.console import Console
        from rich.markup import escape
    except ModuleNotFoundError:  # core installation only
        print(f"afd: error: {sentence}", file=sys.stderr)
        return code
    text = f"[red]afd: error:[/red] {escape(sentence)}"
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    return code


def _console() -> Console:
    """A console that prints paths and prompts verbatim: [x] and :x: are not markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False)


def train(options: argparse.Namespace) -> int:
    from afd.config.keys import refuse_idle
    from afd.config.run import UPDATES, load_config

    processes = _processes(options)
    config = load_config(options.config, options.overrides)
    refuse_idle(options.overrides, config.method, UPDATES)
    if options.dry_run:
        from afd.planning.plan import dry_run

        dry_run(config, processes, _console())
        return DONE
    return _run(config)


def _processes(options: argparse.Namespace) -> int:
    """The processes of a dry run. Raises ConfigError for a number without a dry run."""
    if options.processes is not None and not options.dry_run:
        raise ConfigError(
            f"--processes: got {options.processes} without --dry-run; needed: torchrun "
            f"--nproc-per-node {options.processes} -m afd {options.command} … to train on as many"
        )
    return 1 if options.processes is None else int(options.processes)


def resume(options: argparse.Namespace) -> int:
    from afd.trainer.run_folder import load_run

    return _run(load_run(options.folder, options.overrides))


def _run(config: RunConfig) -> int:
    from afd.trainer.loop import Outcome, train

    outcome = train(config)
    if outcome is Outcome.ALREADY_FINISHED:
        print(f"{config.run_dir} is finished; choose another out= for a new run, or more updates=")
    return STOPPED if outcome is Outcome.STOPPED else DONE


def evaluate(options: argparse.Namespace) -> int:
    from afd.trainer.again import evaluate_run

    if options.folder.is_file():
        problem = f"eval: got {options.folder}, a file; needed: a RUN_DIR"
        return fail(MISTAKE, f"{problem}; afd benchmark CONFIG.yaml generates a benchmark's videos")
    result = evaluate_run(options.folder, options.videos, options.overrides)
    print(json.dumps({"videos": result.count, "metrics": result.metrics}, indent=1))
    return DONE


def benchmark(options: argparse.Namespace) -> int:
    from afd.benchmarks.config import BenchmarkConfig
    from afd.benchmarks.run import evaluate
    from afd.config.run import load_config

    if options.config.is_dir():
        problem = f"benchmark: got {options.config}, a directory; needed: CONFIG.yaml"
        return fail(MISTAKE, f"{problem}; afd eval RUN_DIR evaluates a run's checkpoint")
    evaluate(load_config(options.config, options.overrides, BenchmarkConfig), _console())
    return DONE


def quickstart(options: argparse.Namespace) -> int:
    from afd.lab.quickstart import quickstart

    return DONE if quickstart(options.overrides, _console()) else STOPPED


def ablation(options: argparse.Namespace) -> int:
    from afd.lab.ablation import ablation

    return DONE if ablation(options.config, options.overrides, _console()) else STOPPED


def adapt(options: argparse.Namespace) -> int:
    from afd.adapt.run import adapt, dry_run

    processes = _processes(options)
    if options.dry_run:
        dry_run(options.config, options.overrides, processes, _console())
        return DONE
    from afd.lab.report.page import write_report

    console = _console()

    def finish(root: Path) -> None:
        console.print(f"open {write_report(root)}", soft_wrap=True)

    return DONE if adapt(options.config, options.overrides, console, finish) else STOPPED


def sample(options: argparse.Namespace) -> int:
    from afd.config.run import load_config
    from afd.sampling.config import SampleConfig
    from afd.sampling.sample import dry_run, sample

    config = load_config(options.config, options.overrides, SampleConfig)
    if options.dry_run:
        dry_run(config, _console())
    else:
        sample(config, _console())
    return DONE


def live(options: argparse.Namespace) -> int:
    from afd.live.run import live

    live(
        [*filter(None, [options.config]), *options.overrides],
        host=options.host,
        port=options.port,
        public=options.public,
        show=options.open,
    )
    return DONE


def export(options: argparse.Namespace) -> int:
    from afd.config.run import make_config
    from afd.export import ExportConfig, export

    config = make_config({}, options.overrides, "export", ExportConfig)
    out = export(options.folder, config)
    note = json.loads((out / "afd.json").read_text(encoding="utf-8"))
    if note.get("svd_error") is not None:
        print(
            f"rank {note['rank_before']} cut to {note['rank']}: relative error of the change "
            f"{note['svd_error']:.2e}"
        )
    print(out)
    return DONE


def configs(options: argparse.Namespace) -> int:
    from afd.config.shipped import copy_config, listing

    if options.action == "copy":
        print(copy_config(options.name, options.to))
        return DONE
    print(listing())
    return DONE


def report(options: argparse.Namespace) -> int:
    from afd.lab.report.page import write_report

    if not options.folder.is_dir():
        what = "is not a directory" if options.folder.exists() else "does not exist"
        needed = "the folder of a run, a quickstart or a sequence"
        return fail(MISTAKE, f"RUN_DIR: {options.folder} {what}; needed: {needed}")
    if options.live:
        from afd.live.watch import watch

        where = {"host": options.host, "port": options.port, "public": options.public}
        watch(options.folder, show=options.open, **where)
        return DONE
    print(write_report(options.folder))
    return DONE


def doctor(options: argparse.Namespace) -> int:
    from afd import doctor

    facts = doctor.inspect()
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        for line in doctor.lines(facts):
            print(line)
    return DONE


def teacher(options: argparse.Namespace) -> int:
    if options.verb is None:
        needed = "simulate, fetch, status or audit"
        return fail(MISTAKE, f"teacher: needs a subcommand: afd teacher {needed} --help")
    if options.verb == "audit":
        from afd.audit.command import command as audit

        audit(options.config, options.overrides, _console())
        return DONE
    from afd.config.run import load_config
    from afd.teachers.paid import command

    config = load_config(options.config, options.overrides)
    teachers = command.buyers(config)
    if options.verb == "status":
        return command.status(teachers, _console(), as_json=options.json)
    codes = []
    for one in teachers:
        whole = command.fetch(one, _console())
        codes.append(STOPPED if whole is None else DONE if whole else FAILED)
        if whole is None:
            break
    return max(codes)
