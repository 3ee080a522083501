"""The configuration: what a YAML file and overrides become, and how mistakes are reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from afd.benchmarks.config import BenchmarkConfig
from afd.cli import main
from afd.config.run import (
    RunConfig,
    differences,
    known_keys,
    load_config,
    make_config,
    plain,
    sections_of,
    to_yaml,
)
from afd.discriminators.config import LatentConfig
from afd.errors import ConfigError
from afd.sampling.config import SampleConfig
from afd.trainer.build import check_size

CONFIGS = Path(__file__).parents[2] / "python" / "afd" / "configs"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == RunConfig()


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = written(tmp_path, "updates: 5\nteacher: {style: mark, count: 9}\n")
    config = load_config(path, ["updates=6", "teacher.count=7", "teacher.count=8"])
    assert (config.updates, config.teacher.style, config.teacher.count) == (6, "mark", 8)


@pytest.mark.parametrize(
    ("text", "expected"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("2", 2.0), ("0", 0.0)]
)
def test_override_values_are_read_as_numbers(text: str, expected: float) -> None:
    assert make_config({}, [f"afd.prior_weight={text}"]).afd.prior_weight == expected


def test_override_values_may_be_lists_null_and_text_with_equals_signs() -> None:
    config = make_config(
        {}, ["student.denoising_steps=[1.0, 0.5]", "video.fps=null", "out=runs/a=b"]
    )
    assert config.student.denoising_steps == [1.0, 0.5]
    assert config.video.fps is None
    assert config.out == Path("runs/a=b")


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("updatez=3", "updates"),
        ("teacher.stile=nuis", "teacher.style"),
        ("style=nuis", "teacher.style"),
        ("afd.nft_bet=1", "afd.nft_beta"),
        ("nft_beta=1", "afd.nft_beta"),
    ],
)
def test_an_unknown_key_in_an_override_is_named_with_the_closest(
    override: str, suggestion: str
) -> None:
    with pytest.raises(ConfigError) as error:
        make_config({}, [override])
    key = override.split("=")[0]
    assert f"override {override!r}: unknown key {key!r}; did you mean {suggestion}" in str(
        error.value
    )


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "discriminator: {backbon: motion}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: unknown key 'discriminator.backbon'")
    assert "discriminator.backbone" in str(error.value)


def test_a_key_like_no_other_lists_what_is_known_there() -> None:
    with pytest.raises(ConfigError, match=r"known here: .*teacher\.kind.*teacher\.seed"):
        make_config({}, ["teacher.qqqqqqqq=1"])


def test_every_mistake_is_told_at_once_with_its_own_source(tmp_path: Path) -> None:
    path = written(tmp_path, "stepz: 3\nmethod: ppo\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["threads=-1"])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert any(line.startswith(f"{path}: method is 'ppo'; Input should be 'afd'") for line in lines)
    assert any(line.startswith("override 'threads=-1': threads is -1;") for line in lines)


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", "teacher.=1"])
def test_an_override_without_key_and_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="needs the form key=value"):
        make_config({}, [override])


def test_an_override_below_a_plain_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="teacher is a value, not a section"):
        make_config({"teacher": 3}, ["teacher.style=mark"])


def test_a_section_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "teacher: {count: 8}\nsteps: 3\nteacher:\n  count: 9\n")
    with pytest.raises(ConfigError, match=r"line 3: key 'teacher' appears twice"):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "a: [",
        "just words",
        pytest.param("[" * 10_000, id="deep"),
        "? [a]\n: 1",
        "a: !!python/x",
    ],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path)


def test_a_section_of_several_kinds_takes_the_keys_of_its_kind() -> None:
    config = make_config({}, ["discriminator.kind=latent", "discriminator.width=8"])
    assert config.discriminator == LatentConfig(width=8)
    with pytest.raises(
        ConfigError, match=r"'discriminator\.r1' belongs to another discriminator\.kind"
    ):
        make_config({}, ["discriminator.kind=latent", "discriminator.r1=1"])
    with pytest.raises(ConfigError, match=r"kind: got 'clip'; .*toy, videoalign, latent"):
        make_config({}, ["discriminator.kind=clip"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("evaluation.kind=physics", "evaluation.kind: got physics, which measures the toy task"),
        ("video.height=488", "video.height, video.width: got 488, 832; needed: multiples of 16"),
        ("video.frames=80", "video.frames: got 80; needed: 1 + 4 (n - 1) for n latent frames"),
        ("video.frames=77", "in chunks of 3 (student.chunk), such as 81"),
        ("student.chunk=4", "in chunks of 4 (student.chunk), such as 77"),
        ("afd.samples_per_prompt=1", "afd.samples_per_prompt: got 1; needed: 2 or more"),
        ("dmd.t_range=[0.9,0.1]", "dmd.t_range: got 0.9, 0.1; needed: two rising times"),
        ("afd.betas=[0.9,1]", "afd.betas.1 is 1; Input should be less than 1"),
        ("afd.old_decay_slope=.inf", "afd.old_decay_slope is inf; Input should be a finite number"),
        ("afd.learning_rate=.nan", "afd.learning_rate is nan; Input should be a finite number"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_loaded(
    change: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(CONFIGS / "afd_self_forcing_480x832.yaml")
    for plan in ([], ["--dry-run"]):
        assert main(["train", file, change, *plan]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"discriminator\.kind: got toy, .*videoalign or latent"):
        make_config({"student": {"kind": "wan"}, "evaluation": {"kind": "none"}})


def test_frames_that_are_proposed_fit() -> None:
    wan = {"student": {"kind": "wan"}, "evaluation": {"kind": "none"}, "method": "sft"}
    for chunk in (1, 3, 4, 7):
        with pytest.raises(ConfigError) as error:
            make_config(wan, [f"student.chunk={chunk}", "video.frames=80"])
        make_config(wan, [f"student.chunk={chunk}", f"video.frames={str(error.value).split()[-1]}"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_a_folder_teacher_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs teacher\.path"):
        make_config({"teacher": {"kind": "folder"}})


def test_the_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = make_config({}, ["out=/tmp/x", "teacher.style=mark", "video.fps=8"])
    assert load_config(written(tmp_path, to_yaml(config))) == config


def test_differences_leave_out_what_a_resumed_run_may_change() -> None:
    one = plain(make_config({}, ["updates=5", "seed=1", "out=a"]))
    two = plain(make_config({}, ["updates=9", "seed=2", "out=b", "checkpoint.keep=9"]))
    assert differences(one, two) == ["seed: 1 there, 2 now"]


def test_a_key_that_an_earlier_version_did_not_write_has_its_default() -> None:
    old, default, other = (plain(make_config({}, x)) for x in ([], [], ["afd.stream_frames=60"]))
    for section, key in (("afd", "stream_frames"), ("student", "window"), ("teacher", "robust")):
        del old[section][key]
    assert differences(old, default) == []
    assert differences(old, other) == ["afd.stream_frames: None there, 60 now"]
    old["gone"] = 1
    assert "gone: 1 there, '(absent)' now" in differences(old, default)


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("afd.stream_frames=64", "student.window: got null; needed: the frames that are kept"),
        ("student.window=2", "student.window: got 2"),
    ],
)
def test_windows_and_streams_that_do_not_fit_are_one_sentence(override: str, needed: str) -> None:
    with pytest.raises(ConfigError, match=needed):
        check_size(make_config({}, [override]))


@pytest.mark.parametrize("value", [3, None, []])
def test_what_is_no_way_to_share_a_run_is_named(value: object) -> None:
    needed = "needed: ddp, fsdp, or the keys weights and sequence"
    with pytest.raises(ConfigError, match=rf"parallel: got .*{needed}"):
        make_config({"parallel": value})


def test_every_value_has_a_description() -> None:
    def check(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            below = sections_of(field)
            assert below or field.description, f"{section.__name__}.{name}"
            for kind in below:
                assert kind.__doc__, name
                check(kind)

    check(RunConfig)


def test_a_loaded_configuration_cannot_be_changed() -> None:
    config = make_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.updates = 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_every_comment_key_exists(path: Path) -> None:
    held = yaml.safe_load(path.read_text(encoding="utf-8"))
    sampled = SampleConfig if "prompts" in held or "batch" in held else RunConfig
    kind = BenchmarkConfig if "suites" in held else sampled
    load_config(path, (), kind)
    keys = set(known_keys(kind))
    for key, value in held.items():
        assert key in keys
        for inner in value if isinstance(value, dict) and key != "rewards" else ():
            assert f"{key}.{inner}" in keys
    for name, section in (held.get("rewards") or {}).items():
        assert {f"rewards.<name>.{inner}" for inner in section} <= keys, name


def test_the_quickstart_file_is_the_default_run_written_out() -> None:
    assert load_config(CONFIGS / "quickstart.yaml") == make_config(
        {"name": "quickstart", "device": "cpu"}
    )


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("updates=true", "needed: a number, neither true nor false"),
        ("afd.nft_beta=false", "needed: a number, neither true nor false"),
        ("student.denoising_steps=[true]", "needed: a number, neither true nor false"),
        ("student.denoising_steps=[1.0, 1.0]", "needed: times decreasing from 1"),
        ("student.denoising_steps=[0.5]", "needed: times decreasing from 1"),
        ("threads=9999999", "less than or equal to 4096"),
    ],
)
def test_values_that_a_run_would_take_for_others_or_die_of_are_refused(
    override: str, needed: str
) -> None:
    with pytest.raises(ConfigError, match=needed):
        make_config({}, [override])


# What the laptop task's defaults were chosen by (docs/METHOD.md): at 480x832 each is stated.
LEARNING = {
    "learning_rate",
    "warmup_updates",
    "cosine_updates",
    "weight_decay",
    "grad_clip",
    "prior_weight",
    "draws",
    "samples_per_prompt",
    "nft_beta",
    "adv_clip",
    "old_decay",
    "old_decay_slope",
    "ema_decay",
    "score_learning_rate",
    "score_updates",
    "score_warmup_updates",
    "timesteps",
    "context_noise",
    "window",
    "warmup_steps_per_update",
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_480x832.yaml")), ids=lambda path: path.stem)
def test_no_configuration_at_480x832_inherits_a_toy_default(path: Path) -> None:
    held = yaml.safe_load(path.read_text())
    if "method" not in held:  # samples or evaluates
        return
    config = load_config(path)
    sections = {config.method: getattr(config, config.method)}
    if held.get("discriminator") is not None:
        sections["discriminator"] = config.discriminator
    assert "updates" in held
    for name, section in sections.items():
        silent = LEARNING & type(section).model_fields.keys() - held[name].keys()
        assert not silent, f"{path.name}: {name} leaves {sorted(silent)} to the defaults"
