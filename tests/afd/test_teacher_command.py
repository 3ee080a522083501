"""`afd teacher fetch` and `status`, a paid teacher in the trainer, docs/TEACHERS.md as written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import afd.trainer.loop
from afd.cli import main
from afd.config.run import RunConfig, make_config, plain, to_yaml
from afd.data.sampler import Sampler
from afd.data.videos import Videos
from afd.errors import TeacherError
from afd.teachers.base import Request
from afd.teachers.folder import FolderTeacher
from afd.teachers.paid.teacher import PROVIDERS, read_prompts
from afd.trainer.loop import Outcome, train
from tests.afd.paid import paid_config, video_bytes
from tests.afd.service import KEY, Service, fail, hang_up
from tests.afd.tiny import TinyMethod

ROOT = Path(__file__).parents[2]
REJECTED = "OutputVideoSensitiveContentDetected"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.key_variable, KEY)
    with Service(video_bytes(frames=16)).running() as running:
        yield running


def written(config: RunConfig, folder: Path) -> str:
    path = folder / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return str(path)


def test_fetch_fills_the_folder_and_status_tells_it(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script("poll", fail(REJECTED))
    path = written(paid_config("ark", service, tmp_path, prompts=5), tmp_path)
    assert main(["teacher", "fetch", path]) == 0
    said = capsys.readouterr().out
    assert "4 videos, 1 rejected, 0 missing; 4.00 of 100.00 USD spent" in said
    assert len(FolderTeacher(tmp_path / "videos").requests) == 4
    assert main(["teacher", "status", path]) == 0
    said = capsys.readouterr().out
    assert "4 done" in said
    assert "20 % of the decided videos were rejected" in said
    before = len(service.requests)
    assert main(["teacher", "fetch", path]) == 0
    assert len(service.requests) == before


def test_several_teachers_are_bought_and_counted_each_in_its_own_folder(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = tmp_path / "used.txt"
    used.write_text("prompt 0\nprompt 2\n")
    teachers = []
    for name, wire in (("first", "ark"), ("second", "fal")):
        paid = paid_config(wire, service, tmp_path / name, prompts=3)
        source = plain(paid)["teacher"] | {"path": None}
        teachers.append({"name": name, "source": source})
    teachers[1]["prompts"] = str(used)
    teachers.append({"name": "own", "source": {"kind": "folder", "path": str(tmp_path)}})
    teacher = {"kind": "mix", "path": str(tmp_path / "videos"), "teachers": teachers}
    path = written(make_config({"out": str(tmp_path / "run"), "teacher": teacher}), tmp_path)
    assert main(["teacher", "status", path]) != 0
    assert "has no ledger" in capsys.readouterr().err
    assert main(["teacher", "fetch", path]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 videos, 0 rejected, 0 missing; 3.00 of 100.00 USD spent" in said
    assert "2 videos, 0 rejected, 0 missing; 2.00 of 100.00 USD spent" in said
    assert len(FolderTeacher(tmp_path / "videos" / "first").requests) == 3
    bought = FolderTeacher(tmp_path / "videos" / "second").requests
    assert {request.prompt for request in bought} == {"prompt 0", "prompt 2"}
    assert main(["teacher", "status", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {name: one["spent_usd"] for name, one in facts.items()} == {"first": 3, "second": 2}
    assert main(["teacher", "status", path]) == 0
    assert capsys.readouterr().out.count("USD spent or reserved") == 2


def test_status_speaks_to_programs_and_needs_no_key(
    service: Service,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service.script("submit", hang_up)
    config = paid_config("fal", service, tmp_path, prompts=2, deadline_s=0.2)
    path = written(config, tmp_path)
    assert main(["teacher", "fetch", path]) == 1
    assert "in doubt" in " ".join(capsys.readouterr().out.split())
    monkeypatch.delenv("FAL_KEY")
    assert main(["teacher", "status", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["videos"] == {"asked": 1, "done": 1}
    assert facts["spent_usd"] == 2.0
    assert [row["stands"] for row in facts["open"]] == ["in doubt"]
    assert main(["teacher", "status", path]) == 0
    assert "in doubt" in capsys.readouterr().out


def test_an_empty_budget_buys_nothing_and_says_so(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(paid_config("ark", service, tmp_path, prompts=3, budget_usd=0.0), tmp_path)
    assert main(["teacher", "fetch", path]) == 2
    assert "teacher.fetch.budget_usd=0.00" in capsys.readouterr().err
    assert service.requests == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["teacher={kind: simulator}"], "is not a paid service; needed: ark, openai or fal"),
        (["teacher.api.prompts=/none.txt"], "/none.txt: cannot be read"),
        (["teacher.api.options={seed: 3}"], "seed is set elsewhere"),
        (["teacher.fetch.price_per=million_tokens"], "needs teacher.fetch.units"),
        (["teacher.fetch.budgt_usd=3"], "did you mean teacher.fetch.budget_usd"),
    ],
)
def test_a_mistake_exits_2_before_anything_is_asked(
    service: Service,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    path = written(paid_config("ark", service, tmp_path), tmp_path)
    assert main(["teacher", "fetch", path, *words]) == 2
    assert told in capsys.readouterr().err
    assert service.requests == []


def test_without_a_key_or_a_ledger_one_sentence_says_so(
    service: Service,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = written(paid_config("ark", service, tmp_path), tmp_path)
    assert main(["teacher", "status", path]) == 2
    assert "has no ledger" in capsys.readouterr().err
    monkeypatch.delenv("ARK_API_KEY")
    assert main(["teacher", "fetch", path]) == 2
    assert "set the environment variable ARK_API_KEY" in capsys.readouterr().err


def test_ctrl_c_stops_cleanly_and_the_next_fetch_collects_everything(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.polls = 10**6
    path = written(paid_config("ark", service, tmp_path, prompts=6, deadline_s=60.0), tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "afd.cli", "teacher", "fetch", path],
        env=os.environ | {"PYTHONPATH": str(ROOT / "python")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # What a shell started in the background ignores, its children ignore as well.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(service.jobs) < 6 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "the next fetch collects them; 6.00 USD spent or reserved" in " ".join(said.split())
    assert "Traceback" not in said
    service.polls = 0
    assert main(["teacher", "fetch", path]) == 0
    assert set(service.paid().values()) == {1}
    assert "6 videos, 0 rejected, 0 missing" in capsys.readouterr().out


def test_a_run_skips_what_is_rejected_and_buys_no_more_than_it_uses(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.script("poll", fail(REJECTED))
    words = [
        "updates=2",
        "prompts_per_update=2",
        "evaluation.kind=none",
        "logging.tensorboard=false",
    ]
    config = paid_config("ark", service, tmp_path, *words, prompts=9, concurrency=1)
    assert train(config, method=TinyMethod()) is Outcome.FINISHED
    assert "skipped: " in (tmp_path / "run" / "train.log").read_text()
    assert sum(service.paid().values()) == 4
    monkeypatch.delenv("ARK_API_KEY")
    again = config.model_copy(update={"out": tmp_path / "again"})
    assert train(again, method=TinyMethod()) is Outcome.FINISHED
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "again")]
    one, other = [re.sub(r'"(time|phase)_s": [^}]*?[,}]', "", x) for x in lines]
    weights = [re.findall(r'"student/weight": ([^,}]+)', text) for text in (one, other)]
    assert weights[0] == weights[1]
    assert len(weights[0]) == 2


def test_a_teacher_that_answers_nothing_ends_the_run_with_a_sentence(
    service: Service, tmp_path: Path
) -> None:
    service.script("poll", *[fail(REJECTED)] * 9)
    words = [
        "updates=2",
        "prompts_per_update=2",
        "evaluation.kind=none",
        "logging.tensorboard=false",
    ]
    config = paid_config("ark", service, tmp_path, *words, prompts=3)
    with pytest.raises(TeacherError, match="no request succeeded, the last: 'prompt"):
        train(config, method=TinyMethod())


def test_the_budget_can_be_raised_on_resume(service: Service, tmp_path: Path) -> None:
    words = [
        "updates=2",
        "prompts_per_update=2",
        "evaluation.kind=none",
        "logging.tensorboard=false",
    ]
    config = paid_config("ark", service, tmp_path, *words, prompts=9, budget_usd=3.0, prefetch=0)
    with pytest.raises(TeacherError, match="budget_usd"):
        train(config, method=TinyMethod())
    more = afd.trainer.loop.load_run(tmp_path / "run", ["teacher.fetch.budget_usd=9"])
    assert train(more, method=TinyMethod()) is Outcome.FINISHED
    assert set(service.paid().values()) == {1}


def test_what_comes_next_is_asked_ahead() -> None:
    asked: list[Request] = []
    requests = [Request(f"p{n}") for n in range(6)]

    class Slow:
        def __init__(self) -> None:
            self.requests = requests

        def answer(self, request: Request) -> Path:
            return Path(request.prompt)

        def prefetch(self, upcoming: list[Request]) -> None:
            asked.extend(upcoming)

    sampler, twin = Sampler(requests, seed=3), Sampler(requests, seed=3)
    videos = Videos(Slow(), RunConfig().video)
    order = twin.draw(6)
    assert videos.draw(sampler, 2, ahead=2) == order[:2]
    assert list(dict.fromkeys(asked)) == order[:4]
    asked.clear()
    assert videos.draw(sampler, 2, ahead=0) == order[2:4]
    assert list(dict.fromkeys(asked)) == order[2:4]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "one\n\n two \none\n"),
        ("p.jsonl", '{"prompt": "one"}\n\n{"prompt": "two", "x": 1}\n'),
        ("p.csv", "x,prompt\n1,one\n2,two\n"),
    ],
)
def test_prompts_are_read_from_every_format(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.txt", "\n", "contains no prompt"),
        ("p.jsonl", '{"text": "one"}\n', 'line 1 needs {"prompt"'),
        ("p.jsonl", "{torn\n", "line 1: not JSON"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "line 1: not JSON"),
        ("p.csv", "x\n1\n", "the header is ['x'], needs prompt"),
        ("p.parquet", "", "needs the ending .txt, .jsonl or .csv"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(TeacherError, match=re.escape(told)):
        read_prompts(tmp_path / name)


def test_every_key_is_documented() -> None:
    documented = (ROOT / "docs" / "ENVIRONMENT.md").read_text()
    taught = (ROOT / "docs" / "TEACHERS.md").read_text()
    for name, provider in PROVIDERS.items():
        assert f"`{provider.key_variable}`" in documented
        assert f"`{name}`" in taught


def test_the_commands_of_the_page_work(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written, but for the service: it is the loopback one, and its videos are small."""
    page = (ROOT / "docs" / "TEACHERS.md").read_text()
    commands = [
        line.split()[1:]
        for block in re.findall(r"```sh\n(.*?)```", page, re.S)
        for line in block.splitlines()
    ]
    assert [words[0] for words in commands] == ["teacher", "teacher", "train"]
    (tmp_path / "prompts.txt").write_text("a cat jumps\na dog runs\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    loopback = [
        f"teacher.api.base_url={service.base_url('ark')}",
        "teacher.fetch.schemes=[http]",
        "teacher.fetch.private_hosts=[127.0.0.1]",
        "teacher.fetch.poll_s=0.01",
        "video.frames=12",
        "video.fps=8",
    ]
    for words in commands:
        assert main([*words, *(loopback if words[0] == "teacher" else ["updates=1"])]) == 0
    assert (tmp_path / "runs" / "bought" / "DONE").is_file()
