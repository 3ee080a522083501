"""`afd live` through Starlette's client: commands, takes, recordings, votes, several viewers."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from afd.cli import main
from afd.config.run import load_config
from afd.live import engine as engines
from afd.live import take as takes
from afd.sampling.config import SampleConfig
from afd.sampling.sample import sample
from afd.video import read_comment, read_video
from tests.afd.live_server import client, configuration, other_student, viewer
from tests.afd.recorded import recorded
from tests.afd.test_sample import quiet

RED, BLUE = "A red ball on the left is dropped, going left.", "A blue ball"


def png(width: int = 16, height: int = 16) -> bytes:
    held = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(held, "PNG")
    return held.getvalue()


def levels(picture: bytes) -> torch.Tensor:
    """A picture's values, [bytes]."""
    data = bytearray(Image.open(io.BytesIO(picture)).convert("RGB").tobytes())
    return torch.frombuffer(data, dtype=torch.uint8).float()


def test_chunks_come_in_order_with_their_numbers(tmp_path: Path) -> None:
    with client(configuration(tmp_path)) as opened, viewer(opened) as watching:
        hello = watching.event("hello")
        assert (hello["version"], hello["fps"], hello["height"]) == (1, 24, 16)
        watching.until(lambda: len(watching.chunks) == 5)
        headers = [header for header, _ in watching.chunks]
        assert [h.chunk for h in headers] == [0, 1, 2, 3, 4]
        assert [h.start for h in headers] == [0, 3, 6, 9, 12]
        assert all(h.cache[0] == h.cache[1] > 0 for h in headers)
        assert all(h.times.denoise > 0 and h.times.encode > 0 for h in headers)
        assert headers[0].times.context < headers[1].times.context
        pictures = watching.chunks[0][1]
        assert [len(row) for row in pictures] == [3]
        assert Image.open(io.BytesIO(pictures[0][0])).size == (16, 16)
        assert watching.state["controls"]
        assert watching.state["viewers"] == 1


def test_pause_step_and_switch(tmp_path: Path) -> None:
    with client(configuration(tmp_path)) as opened, viewer(opened) as watching:
        watching.until(lambda: len(watching.chunks) == 1)
        watching.send("pause")
        watching.until(lambda: not watching.state["playing"])
        watching.send("restart", seed=7, prompt=RED)
        watching.until(lambda: watching.chunks[-1][0].take == 2)
        assert watching.chunks[-1][0].chunk == 0
        # The last switch before a chunk counts.
        watching.send("switch", prompt="A green ball", mode="plain")
        watching.send("switch", prompt=BLUE, mode="recache")
        watching.send("step")
        told = watching.event("switched")
        assert (told["chunk"], told["prompt"], told["mode"]) == (1, BLUE, "recache")
        watching.until(lambda: watching.chunks[-1][0].chunk == 1)
        last = watching.chunks[-1][0]
        assert (last.take, last.prompt, last.switched) == (2, BLUE, True)
        assert last.times.switch > 0
        watching.until(lambda: watching.state["chunk"] == 2)
        assert watching.state["prompt"] == BLUE
        count = len(watching.chunks)
        watching.send("step")
        watching.until(lambda: len(watching.chunks) > count)
        assert not watching.chunks[-1][0].switched


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """Every chunk's latents, as `afd live` and `afd sample` make them; the toy's are its pixels."""
    kept: dict[str, list[torch.Tensor]] = {"live": [], "sample": recorded(monkeypatch)}

    class Take(takes.Take):
        def next(self) -> takes.Chunk:
            chunk = super().next()
            kept["live"] += [latent.clone() for latent in chunk.latents]
            return chunk

    monkeypatch.setattr(engines, "Take", Take)
    return kept


@pytest.mark.parametrize("start", ["noise", "picture"])
def test_sample_makes_a_recording_s_latents_again(
    tmp_path: Path, latents: dict[str, list[torch.Tensor]], start: str
) -> None:
    out = tmp_path / "out"
    with client(configuration(out)) as opened, viewer(opened) as watching:
        watching.send("pause")
        watching.until(lambda: watching.state.get("playing") is False)
        if start == "picture":
            watching.socket.send_bytes(png(40, 30))
        watching.send("restart", seed=11, prompt=RED, start=start)
        watching.until(lambda: watching.state["seed"] == 11)
        watching.until(lambda: watching.shows(watching.state["take"]))
        latents["live"] = latents["live"][-1:]
        # The recording begins in the middle of the take, after a switch.
        for chunk in range(1, 9):
            if chunk in (2, 5, 7):
                mode = {2: "plain", 5: "recache", 7: "new_sink"}[chunk]
                watching.send("switch", prompt=f"{BLUE} {chunk}", mode=mode)
            if chunk == 4:
                watching.send("record", on=True)
                watching.until(lambda: watching.state["recording"])
            watching.send("step")
            watching.until(lambda at=chunk: watching.chunks[-1][0].chunk == at)
        watching.send("record", on=False)
        told = watching.event("recorded")
    (mp4,) = out.glob("*.mp4")
    assert mp4.stem == told["name"]
    assert read_video(mp4, frames=15, height=16, width=16).shape == (15, 3, 16, 16)
    config = load_config(mp4.with_suffix(".yaml"), [f"out={tmp_path / 'again'}"], SampleConfig)
    (again,) = sample(config, quiet()).written
    assert len(latents["live"]) == len(latents["sample"]) == 9
    for live, made in zip(latents["live"], latents["sample"], strict=True):
        assert torch.equal(live, made)
    record, made = (json.loads(read_comment(path) or "") for path in (mp4, again))
    live = record.pop("live")
    assert (live["first_chunk"], live["chunks"]) == (4, 5)
    assert live["torch"] == torch.__version__
    assert "commit" in live
    assert record["prompt"] == RED
    assert record["switches"] == [
        [2, f"{BLUE} 2"],
        [5, f"{BLUE} 5", "recache"],
        [7, f"{BLUE} 7", "new_sink"],
    ]
    assert {k: v for k, v in record.items() if k != "settings"} == {
        k: v for k, v in made.items() if k != "settings"
    }


def test_a_take_starts_from_the_last_frame_of_a_recording(tmp_path: Path) -> None:
    with client(configuration(tmp_path)) as opened, viewer(opened) as watching:
        watching.send("record", on=True)
        watching.until(lambda: len(watching.chunks) > 3)
        watching.send("pause")
        watching.send("record", on=False)
        number = watching.event("recorded")["number"]
        watching.until(lambda: watching.state["recordings"] == [number])
        watching.until(lambda: not watching.state["playing"])
        count = len(watching.chunks)
        watching.send("restart", start=number)
        watching.until(lambda: len(watching.chunks) > count)
        header, pictures = watching.chunks[-1]
        assert (header.chunk, header.frames) == (0, 1)
        shown = levels(pictures[0][0])
        before = [levels(picture) for _, rows in watching.chunks[:count] for picture in rows[0]]
        assert min((shown - other).abs().mean() for other in before) < 4
        (mp4,) = tmp_path.glob("*.mp4")
        answer = opened.get(f"/recordings/{number}/0.mp4")
        assert answer.content == mp4.read_bytes()
        watching.send("restart", start=number + 1)
        assert "a number of the list" in watching.event("problem")["text"]


def test_two_students_share_prompt_seed_and_noise(tmp_path: Path) -> None:
    same = configuration(tmp_path, compare=["base", other_student(tmp_path / "x")])
    assert same.labels() == ["base", "base #2", "other"]
    with client(same) as opened, viewer(opened) as watching:
        watching.until(lambda: len(watching.chunks) > 4)
        for _, (one, two, three) in watching.chunks:
            assert one == two
            assert one != three
        assert watching.state["columns"]["labels"] == same.labels()


def test_blind_votes_are_preference_pairs(tmp_path: Path) -> None:
    config = configuration(tmp_path, compare=other_student(tmp_path / "x"))
    orders = set()
    with client(config) as opened, viewer(opened) as watching:
        watching.send("blind", on=True)
        for number in range(8):
            watching.send("restart", seed=number + 1)
            watching.until(lambda at=number + 1: watching.state.get("seed") == at)
            watching.until(lambda: watching.shows(watching.state["take"]))
            assert watching.state["columns"] == {"labels": ["A", "B"], "hidden": True}
            watching.send("vote", choice=0 if number else None)
            watching.event("voted")
            watching.until(lambda: not watching.state["columns"]["hidden"])
            orders.add(tuple(watching.state["columns"]["labels"]))
            watching.send("vote", choice=1)
            assert "has its vote" in watching.event("problem")["text"]
    assert orders == {("base", "other"), ("other", "base")}
    lines = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(1, 9))
    assert {one["label"] for one in lines[0]["equal"]} == {"base", "other"}
    assert all(line["blind"] and line["chunks"] >= 1 for line in lines)
    assert {line["chosen"]["label"] for line in lines[1:]} == {"base", "other"}
    assert all(line["chosen"] != line["rejected"] for line in lines[1:])


def test_several_viewers_see_one_stream_and_one_steers(tmp_path: Path) -> None:
    with client(configuration(tmp_path)) as opened, viewer(opened) as first:
        first.until(lambda: bool(first.chunks))
        with viewer(opened) as second:
            second.until(lambda: len(second.chunks) > 3)
            first.until(lambda: len(first.chunks) > 6)
            one = {(h.take, h.chunk): p for h, p in first.chunks}
            both = [(h, p) for h, p in second.chunks if (h.take, h.chunk) in one]
            assert both
            assert all(one[h.take, h.chunk] == p for h, p in both)
            assert second.state["viewers"] == 2
            assert not second.state["controls"]
            second.send("pause")
            assert "another viewer has them" in second.event("problem")["text"]
            second.send("controls", on=True)
            assert "another viewer is using them" in second.event("problem")["text"]
            first.send("controls", on=False)
            second.until(lambda: not second.state["held"])
            second.send("controls", on=True)
            second.until(lambda: second.state["controls"])
            second.send("pause")
            second.until(lambda: not second.state["playing"])
            first.until(lambda: not first.state["playing"] and not first.state["controls"])
        # The controls of a viewer that leaves are free.
        first.until(lambda: first.state["viewers"] == 1 and not first.state["held"])


def test_a_stream_rests_without_viewers_and_goes_on_for_a_reloaded_page(tmp_path: Path) -> None:
    with client(configuration(tmp_path)) as opened:
        with viewer(opened) as before:
            before.until(lambda: len(before.chunks) > 2)
        with viewer(opened) as after:
            after.until(lambda: len(after.chunks) > 3)
            # The newest chunk at once, then where the stream was.
            at = [header.chunk for header, _ in after.chunks]
            assert at[0] >= before.chunks[-1][0].chunk
            assert {header.take for header, _ in after.chunks} == {1}
            assert at[-1] - at[0] <= len(at) + 1
            assert after.state["controls"]
    left = {thread.name for thread in threading.enumerate()}
    assert not {name for name in left if name.startswith("afd-live")}


def test_a_viewer_that_confirms_nothing_gets_a_few_chunks_and_blocks_nobody(tmp_path: Path) -> None:
    config = configuration(tmp_path, fps=300)
    with client(config) as opened, viewer(opened) as fast, viewer(opened) as slow:
        fast.until(lambda: len(fast.chunks) > 24)
        fast.send("pause")
        fast.until(lambda: not fast.state["playing"])
        fast.send("controls", on=False)
        while slow.state.get("held") is not False or slow.state["playing"]:
            slow.receive(seen=False)
        assert 1 <= len(slow.chunks) <= 5
        # What it missed is gone: it goes on with the newest.
        header = slow.chunks[-1][0]
        slow.send("seen", take=header.take, chunk=header.chunk)
        while len(slow.chunks) < 6:
            slow.receive()
        assert slow.chunks[-1][0].chunk > 16


def test_a_thousand_switches(tmp_path: Path) -> None:
    with client(configuration(tmp_path, fps=1000)) as opened, viewer(opened) as watching:
        watching.until(lambda: bool(watching.chunks))
        for number in range(1000):
            watching.send("switch", prompt=f"ball {number}", mode="plain")
        watching.until(lambda: watching.state["prompt"] == "ball 999", 5000)
        watching.until(lambda: watching.chunks[-1][0].prompt == "ball 999", 5000)
        assert not [event for event in watching.events if event["type"] == "problem"]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("{", "Invalid JSON"),
        ("[]", "message: "),
        ('{"type": "jump"}', "does not match any of the expected tags"),
        ('{"type": "switch"}', "switch.prompt: Field required"),
        ('{"type": "switch", "prompt": " "}', "needed: text that is not blank"),
        ('{"type": "switch", "prompt": "x\\u0000"}', "needed: text that is not blank"),
        ('{"type": "switch", "prompt": "\\ud800"}', "unexpected end of hex escape"),
        ('{"type": "switch", "prompt": 5}', "switch.prompt: Input should be a valid string"),
        (
            '{"type": "switch", "prompt": "x", "mode": "fast"}',
            "switch.mode: Input should be 'plain'",
        ),
        ('{"type": "switch", "prompt": "x", "file": "/etc/passwd"}', "Extra inputs"),
        ('{"type": "restart", "seed": -1}', "restart.seed"),
        ('{"type": "restart", "seed": 9007199254740992}', "restart.seed"),
        ('{"type": "restart", "seed": true}', "restart.seed"),
        ('{"type": "restart", "start": "/etc/passwd"}', "restart.start"),
        ('{"type": "restart", "start": 9}', "a number of the list"),
        ('{"type": "restart", "start": "picture"}', "no picture has been sent"),
        ('{"type": "record", "on": "yes"}', "record.on"),
        ('{"type": "vote", "choice": 0}', "one student streams"),
        ('{"type": "blind", "on": true}', "one student streams"),
        (b"not a picture", "needed: a PNG, JPEG or WebP file"),
        (png()[:40], "picture: "),
    ],
    ids=str,
)
def test_a_bad_message_is_one_sentence_and_the_stream_goes_on(
    shared_stream: Any, message: str | bytes, told: str
) -> None:
    if isinstance(message, bytes):
        shared_stream.socket.send_bytes(message)
    else:
        shared_stream.socket.send_text(message)
    text = shared_stream.event("problem")["text"]
    assert told in text
    assert "\n" not in text
    assert len(text) <= 500
    count = len(shared_stream.chunks)
    shared_stream.until(lambda: len(shared_stream.chunks) > count)


@pytest.fixture(scope="module")
def shared_stream(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = configuration(tmp_path_factory.mktemp("live"))
    with client(config) as opened, viewer(opened) as watching:
        yield watching


def test_a_flood_of_commands_does_not_hold_the_stream_up(tmp_path: Path) -> None:
    with client(configuration(tmp_path, fps=100)) as opened, viewer(opened) as watching:
        watching.until(lambda: bool(watching.chunks))
        done = threading.Event()

        def flood() -> None:
            while not done.is_set():
                watching.send("switch", prompt="A blue ball", mode="plain")

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            watching.until(lambda: len(watching.chunks) > 10, 20_000)
        finally:
            done.set()
            thread.join()


def test_a_student_that_fails_pauses_the_stream_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client(configuration(tmp_path)) as opened, viewer(opened) as watching:
        watching.until(lambda: bool(watching.chunks))
        whole = takes.Take.next
        monkeypatch.setattr(engines.Take, "next", lambda self: 1 // 0)
        assert "the stream has failed" in watching.event("problem")["text"]
        watching.until(lambda: not watching.state["playing"])
        monkeypatch.setattr(engines.Take, "next", whole)
        take = watching.state["take"]
        watching.send("play")
        watching.until(lambda: watching.chunks[-1][0].take > take)


def test_mistakes_in_the_command_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, told in (
        (["checkpoint=/none.safetensors"], "/none.safetensors"),
        (["compare=[a,b,c]"], "compare"),
        (["video=x.mp4"], "needed: null, or an image to start from"),
        (["batch=2"], "needed: 1, a stream of each student"),
        (["nonsense=1"], "nonsense"),
        (["image=/none.png"], "image: got /none.png"),
        (["--port", "99999"], "--host, --port: cannot listen"),
        ([str(tmp_path / "none.yaml")], "none.yaml"),
    ):
        assert main(["live", *words]) == 2, words
        said = capsys.readouterr().err
        assert told in said
        assert "Traceback" not in said
