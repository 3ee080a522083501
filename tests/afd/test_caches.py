"""Caches of text embeddings and teacher latents: hits, misses, damage, several writers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afd.cache import Store, file_hash, files_identity
from afd.data.sampler import Sampler
from afd.data.videos import Videos
from afd.distributed import Ranks
from afd.models.wan.config import WanStudentConfig
from afd.models.wan.loading import Texts
from afd.models.wan.text import TextEncoder
from afd.models.wan.vae import VideoVAE
from afd.teachers.base import Request
from afd.teachers.folder import FolderTeacher
from afd.video import write_video
from afd.video.config import VideoConfig
from tests.afd.test_text import LENGTH, PROMPTS, diffusers_folder, encoder
from tests.afd.test_vae import model as vae_model

FACTS = {"prompt": "a red ball", "dtype": "float32"}
VIDEO = VideoConfig(frames=9, height=16, width=24, fps=8)


def files_of(store: Store, kind: str) -> list[Path]:
    return sorted(p for p in store.folder.rglob("*") if p.is_file() and kind in p.parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    Store(tmp_path).put("text", FACTS, tensor.t())
    back = Store(tmp_path).get("text", FACTS)
    assert back is not None
    assert back.dtype == dtype
    assert torch.equal(back, tensor.t())


def test_other_facts_and_kinds_are_other_entries(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("text", FACTS, torch.ones(2))
    for facts in ({**FACTS, "dtype": "bfloat16"}, {**FACTS, "prompt": "a red ball "}, {}):
        assert store.get("text", facts) is None
    assert store.get("latents", FACTS) is None
    assert store.get("text", dict(reversed(FACTS.items()))) is not None


def test_damage_anywhere_in_a_file_is_noticed_and_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, tensor = Store(tmp_path), torch.arange(64.0)
    store.put("text", FACTS, tensor)
    path = store.path("text", FACTS)
    whole = path.read_bytes()
    cuts = [b"", whole[:4], whole[: len(whole) // 2], whole[:-1], b"\xff" * len(whole)]
    flips = [
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 40, 200, len(whole) - 9)
    ]
    for data in [*cuts, *flips]:
        path.write_bytes(data)
        caplog.clear()
        assert store.get("text", FACTS) is None
        assert "is damaged and is computed again" in caplog.text
        store.put("text", FACTS, tensor)
        again = store.get("text", FACTS)
        assert again is not None
        assert torch.equal(again, tensor)


def test_a_file_of_other_facts_under_this_name_is_not_used(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("text", {"prompt": "one"}, torch.ones(2))
    other = store.path("text", {"prompt": "two"})
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(store.path("text", {"prompt": "one"}).read_bytes())
    assert store.get("text", {"prompt": "two"}) is None


def test_a_folder_that_cannot_be_written_costs_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text").write_text("a file where the folder should be")
    store = Store(tmp_path)
    for _ in range(3):
        store.put("text", FACTS, torch.ones(2))
    assert caplog.text.count("continuing without it") == 1


WRITER = """
import sys, torch
from pathlib import Path
from afd.cache import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
bad = 0
for n in range(150):
    facts = {"n": n % 5}
    value = torch.full((5000,), float(n % 5))
    store.put("text", facts, value)
    back = store.get("text", facts)
    bad += back is None or not torch.equal(back, value)
print(bad, flush=True)
"""


def test_processes_that_write_the_same_entries_never_see_a_part(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    ends = []
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        ends.append(writer.communicate(timeout=60)[0])
    assert ends == ["0\n", "0\n"]
    assert all(path.suffix == ".safetensors" for path in files_of(Store(tmp_path), "text"))
    assert Store(tmp_path).size("text")[0] == 5


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "cache"), tmp_path / "weights.bin"
    file.write_bytes(b"one")
    first = file_hash(file, store)
    held = files_of(store, "hashes")
    assert file_hash(file, store) == first == file_hash(file)
    assert files_of(store, "hashes") == held
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert file_hash(file, store) == file_hash(file) != first


def test_identities_follow_contents_and_hub_revisions(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert files_identity([tmp_path / "a"]) == files_identity([tmp_path / "b"])
    (tmp_path / "b" / "config.json").write_text("{1}")
    assert files_identity([tmp_path / "a"]) != files_identity([tmp_path / "b"])
    cached = tmp_path / "models--someone--Wan" / "snapshots" / ("c" * 40) / "vae"
    cached.mkdir(parents=True)
    assert f"someone/Wan@{'c' * 40}/vae" in files_identity([cached])


# --- text embeddings ---


def wan_files(folder: Path, **changes: object) -> WanStudentConfig:
    files = {"pretrained": str(folder), "text_len": LENGTH, "dtype": "float32"}
    return WanStudentConfig.model_validate({"kind": "wan", **files, **changes})


def test_prompts_are_embedded_once_and_then_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, store = diffusers_folder(tmp_path / "wan"), Store(tmp_path / "cache")
    with caplog.at_level(logging.INFO, logger="afd"):
        first = Texts(wan_files(folder), store=store)(PROMPTS)
    assert torch.equal(first, torch.cat([encoder().encode([p]) for p in PROMPTS]))
    assert "3 prompts, 0 from the cache" in caplog.text
    assert "holds 3, 0.0 MiB" in caplog.text

    def refused(*args: object, **settings: object) -> TextEncoder:
        raise AssertionError("the text encoder was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "load", refused)
        texts = Texts(wan_files(folder), store=store)
        assert torch.equal(texts(PROMPTS[::-1]), first.flip(0))
        with pytest.raises(AssertionError, match="was loaded"):
            texts(["another prompt"])
    # What the embedding depends on is another encoder, another length, another dtype.
    for changes in ({"dtype": "bfloat16"}, {"text_len": LENGTH - 1}):
        other = Texts(wan_files(folder, **changes), store=store)
        assert other(PROMPTS[:1]).shape[1] == changes.get("text_len", LENGTH)
    assert store.size("text")[0] == 5
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    state["encoder.final_layer_norm.weight"] *= 2
    save_file(state, weights, metadata={"format": "pt"})
    changed = Texts(wan_files(folder), store=store)(PROMPTS)
    torch.testing.assert_close(changed, 2 * first)


def test_a_prompt_nobody_listed_is_embedded_when_it_comes(tmp_path: Path) -> None:
    texts = Texts(wan_files(diffusers_folder(tmp_path)))
    texts.embed(PROMPTS[:1])
    assert torch.equal(texts(PROMPTS[1:2]), encoder().encode(PROMPTS[1:2]))


# --- teacher latents ---


def folder_teacher(folder: Path, count: int = 3) -> FolderTeacher:
    """Clips of moving stripes, no two alike."""
    folder.mkdir()
    at = torch.arange(48.0)
    for n in range(count):
        rows = [torch.sin(at / (3 + n) + k).expand(3, 32, 48) for k in range(9)]
        write_video(folder / f"{n}.mp4", torch.stack(rows) * 0.8, fps=8)
    lines = [f"{n}.mp4\tprompt {n}" for n in range(count)]
    (folder / "prompts.txt").write_text("\n".join(lines))
    return FolderTeacher(folder)


def test_latents_are_made_once_and_read_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, store = folder_teacher(tmp_path / "clips"), Store(tmp_path / "cache")
    vae = VideoVAE(vae_model())
    encoded: list[int] = []
    encode = VideoVAE.encode
    monkeypatch.setattr(VideoVAE, "encode", lambda self, v: encoded.append(1) or encode(self, v))

    def videos(codec: VideoVAE = vae, video: VideoConfig = VIDEO) -> Videos:
        return Videos(teacher, video, input_space="latents", codec=codec, store=store)

    first = videos()
    latents = first.fetch(teacher.requests)
    assert latents.shape == (3, 3, 16, 2, 3)
    assert latents.dtype == torch.float32
    with caplog.at_level(logging.INFO, logger="afd"):
        first.close()
    assert "latents: 3 made, 0 from the cache" in caplog.text
    pixels = torch.stack([first.clip(request) for request in teacher.requests])
    torch.testing.assert_close(latents, vae.encode(pixels))
    encoded.clear()
    assert torch.equal(videos().fetch(teacher.requests), latents)
    assert not encoded
    videos(video=VIDEO.model_copy(update={"width": 32})).fetch(teacher.requests[:1])
    videos(VideoVAE(vae_model().bfloat16())).fetch(teacher.requests[:1])
    assert len(encoded) == 2
    for path in files_of(store, "latents"):
        path.write_bytes(path.read_bytes()[:-8])
    assert torch.equal(videos().fetch(teacher.requests), latents)
    assert len(encoded) == 5


def test_a_renamed_clip_is_the_same_clip_and_a_changed_one_is_not(tmp_path: Path) -> None:
    teacher, store = folder_teacher(tmp_path / "clips"), Store(tmp_path / "cache")
    vae = VideoVAE(vae_model())
    Videos(teacher, VIDEO, input_space="latents", codec=vae, store=store).fetch(teacher.requests)
    (tmp_path / "clips").rename(tmp_path / "moved")
    moved = FolderTeacher(tmp_path / "moved")
    (tmp_path / "moved" / "0.mp4").write_bytes((tmp_path / "moved" / "1.mp4").read_bytes())
    got = Videos(moved, VIDEO, input_space="latents", codec=vae, store=store).fetch(moved.requests)
    assert torch.equal(got[0], got[1])
    assert store.size("latents")[0] == 3


# --- the teacher's videos in memory ---


def test_memory_is_bounded_and_what_left_it_is_decoded_again(tmp_path: Path) -> None:
    teacher = folder_teacher(tmp_path / "clips")
    one = 9 * 3 * 16 * 24
    videos = Videos(teacher, VIDEO, memory=2 * one)
    whole = videos.fetch(teacher.requests)
    assert len(videos._kept) == 2
    assert list(videos._kept) == list(teacher.requests[1:])
    assert torch.equal(videos.fetch(teacher.requests), whole)


def test_only_what_is_looked_at_is_kept(tmp_path: Path) -> None:
    teacher = folder_teacher(tmp_path / "clips")
    videos = Videos(teacher, VIDEO, prepare=lambda x_BFCHW: x_BFCHW[:, ::4])
    whole = Videos(teacher, VIDEO).fetch(teacher.requests)
    assert torch.equal(videos.fetch(teacher.requests), whole[:, ::4])
    assert all(len(kept) == 3 for kept in videos._kept.values())
    assert torch.equal(videos.clip(teacher.requests[0]), whole[0])


def test_the_next_draw_is_decoded_while_this_one_is_used(tmp_path: Path) -> None:
    teacher = folder_teacher(tmp_path / "clips")
    sampler, videos = Sampler(teacher.requests, seed=0), Videos(teacher, VIDEO)
    first = videos.draw(sampler, 1, ahead=9)
    videos.fetch(first)
    (coming,) = videos._coming
    assert videos._coming[coming].result(timeout=30)[0].shape == (9, 16, 24, 3)
    for path in (tmp_path / "clips").glob("*.mp4"):
        path.unlink()
    assert videos.draw(sampler, 1, ahead=0) == [coming]
    assert videos.fetch([coming]).shape == (1, 9, 3, 16, 24)
    assert not videos._coming
    videos.close()


class Messages(Ranks):
    """One of two processes whose messages from the main one are carried by hand."""

    def __init__(self, rank: int, carried: list[str]) -> None:
        super().__init__(rank, 2)
        object.__setattr__(self, "carried", carried)

    def same(self, value: Any) -> Any:
        if self.main:
            self.carried.append(json.dumps(value))
        return json.loads(self.carried[-1])


class Silent:
    """A teacher that only the main process may ask."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests

    def answer(self, request: Request) -> Path:
        raise AssertionError("a second process asked the teacher")


def test_one_process_asks_the_teacher_and_each_decodes_its_share(tmp_path: Path) -> None:
    teacher, carried = folder_teacher(tmp_path / "clips", count=5), []
    alone = Videos(teacher, VIDEO)
    samplers = [Sampler(teacher.requests, seed=2) for _ in range(3)]
    main = Videos(teacher, VIDEO, ranks=Messages(0, carried))
    other = Videos(Silent(teacher.requests), VIDEO, ranks=Messages(1, carried))
    for _ in range(4):
        drawn = alone.draw(samplers[0], 3, ahead=6)
        assert main.draw(samplers[1], 3, ahead=6) == drawn
        assert other.draw(samplers[2], 3, ahead=6) == drawn
        whole = alone.fetch(drawn)
        parts = [v.fetch(drawn[v._ranks.share(3)]) for v in (main, other)]
        assert [len(part) for part in parts] == [1, 2]
        assert torch.equal(torch.cat(parts), whole)
    assert samplers[2].state_dict() == samplers[0].state_dict()


def test_a_clip_that_cannot_be_decoded_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    teacher = folder_teacher(tmp_path / "clips")
    (tmp_path / "clips" / "1.mp4").write_bytes(b"no video")
    videos = Videos(teacher, VIDEO)
    videos.fetch([teacher.requests[0]])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1\.mp4: cannot be read as a video"):
            videos.fetch([teacher.requests[1]])
