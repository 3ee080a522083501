"""The configuration of `afd benchmark`: the student, the benchmarks, and the raters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from afd.config.base import Count, Section
from afd.sampling.config import StreamConfig

# Seed offset between prompts, so that a subset of a benchmark uses the seeds of the whole.
SEEDS = 1000
Samples = Annotated[int, Field(ge=1, le=SEEDS)]
Suite = Literal["vbench", "videophy2", "videoalign_mq"]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class VBenchConfig(Section):
    """VBench, which identifies a video by its prompt, used as the file name."""

    prompts: Path | None = Field(
        default=None,
        description="VBench's VBench_full_info.json; or a .txt of its prompts, whose name is then "
        "that of the dimension (scene.txt), or of none (all_dimension.txt)",
    )
    augmented: Path | None = Field(
        default=None,
        description=".txt of longer prompts in the same order: a video is generated from its line "
        "here and named after the original; null: generated from the original",
    )
    originals: Path | None = Field(
        default=None,
        description=".txt of the prompts that the lines of `augmented` belong to, such as "
        "all_dimension.txt; null: those of `prompts`, in their order",
    )
    dimensions: list[str] | None = Field(
        default=None, description="only prompts of these dimensions; null: all"
    )
    samples: Samples = Field(default=5, description="videos per prompt")
    flickering_samples: Count = Field(
        default=25,
        description="videos per prompt of temporal_flickering, from which VBench drops moving ones",
    )
    results: Path | None = Field(
        default=None,
        description="folder of VBench's *_eval_results.json; null: vbench_results beside videos",
    )


class VideoPhyConfig(Section):
    """VideoPhy-2: physical commonsense, rated 1 to 5."""

    prompts: Path | None = Field(
        default=None, description=".csv, .jsonl or .txt of prompts; equal ones are taken once"
    )
    column: str = Field(default="caption", description="column of the prompt")
    generate: str | None = Field(
        default=None,
        description="column that a video is generated from (upsampled_caption); null: the prompt",
    )
    samples: Samples = Field(default=1, description="videos per prompt")
    pc: Path | None = Field(
        default=None,
        description="its output for physical commonsense; null: videophy_pc.csv beside the videos",
    )
    sa: Path | None = Field(
        default=None,
        description="its output for semantic adherence; null: videophy_sa.csv beside the videos",
    )


class VideoAlignMqConfig(Section):
    """Motion quality, rated by the frozen released VideoAlign."""

    prompts: Path | None = Field(
        default=None,
        description=".txt or .jsonl of prompts; null: rate the videos of the other suites",
    )
    samples: Samples = Field(default=1, description="videos per prompt")
    checkpoint: str | None = Field(
        default=None,
        description="the released VideoReward: folder, model.pth or hub name; null: that of the "
        "run's discriminator before training, with its base and checkout",
    )
    base: str | None = Field(
        default=None,
        description="folder or hub name of Qwen2-VL's config and tokenizer; null: the checkpoint's",
    )
    checkout: Path | None = Field(
        default=None,
        description="folder of the VideoAlign code with its prompt template; null: our template",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="dtype of the computation"
    )
    rotary: Literal["released", "rounded", "exact"] = Field(
        default="released", description="precision of its rotary tables"
    )
    batch: Count = Field(default=1, description="videos rated in one batch")


class BenchmarkConfig(StreamConfig):
    """Configuration of `afd benchmark`. `out`: folder of all samples; null: samples."""

    run: Path | None = Field(
        default=None,
        description="run folder: the student of its newest checkpoint, and its settings for "
        "every key that this file leaves out",
    )
    weights: Literal["ema", "old", "theta"] | None = Field(
        default=None,
        description="which of the run's weights; null: the version that the run evaluates",
    )
    name: Annotated[str, Field(pattern=_NAME, max_length=200)] | None = Field(
        default=None, description="subfolder of `out`; null: the run's name, or the file's"
    )
    suites: list[Suite] = Field(
        default=["vbench", "videophy2", "videoalign_mq"],
        description="benchmarks to generate and rate",
    )
    limit: Count | None = Field(
        default=None, description="only the first prompts of each benchmark; null: all"
    )
    crf: Annotated[int, Field(ge=0, le=18)] = Field(
        default=18, description="constant rate factor of h264; the benchmarks ask for 18 at most"
    )
    vbench: VBenchConfig = VBenchConfig()
    videophy2: VideoPhyConfig = VideoPhyConfig()
    videoalign_mq: VideoAlignMqConfig = VideoAlignMqConfig()

    @model_validator(mode="after")
    def _complete(self) -> BenchmarkConfig:
        if not self.suites or len(set(self.suites)) < len(self.suites):
            raise ValueError(f"suites: got {self.suites}; needed: each benchmark at most once")
        given = "checkpoint" in self.student.model_fields_set
        own = self.student.checkpoint if given else None
        if self.run is not None and own is not None:
            raise ValueError("run, student.checkpoint: got both; needed: one of them")
        if self.weights is not None and self.run is None:
            raise ValueError(f"weights: got {self.weights}; it is one of a run's weights: run=")
        return self
