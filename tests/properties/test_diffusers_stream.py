"""Any stream in diffusers is afd's own: chunks, windows, sinks, steps, prompts, batches."""

from __future__ import annotations

from typing import Any, get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afd.integrations.diffusers import SelfForcingScheduler
from afd.models.wan.student import WanStudent
from afd.rollout import Switch, SwitchMode, stream, stream_layout
from tests.afd.test_rollout import make_student
from tests.integrations.streams import pipeline, text


@st.composite
def streams(draw: st.DrawFn) -> dict[str, Any]:
    chunk = draw(st.integers(1, 3))
    alone = draw(st.booleans()) and chunk > 1
    chunks = draw(st.integers(1, 5))
    sizes: dict[str, Any] = {"chunk": chunk, "independent_first_frame": alone}
    if draw(st.booleans()):
        sizes["sink"] = draw(st.integers(0, 2))
        sizes["window"] = sizes["sink"] + chunk + draw(st.integers(0, 4))
    later = draw(st.lists(st.integers(1, 999), max_size=3, unique=True))
    return {
        "sizes": sizes,
        "frames": chunk * chunks + alone,
        "steps": [1000, *sorted(later, reverse=True)],
        "seeds": draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3)),
        "context_noise": draw(st.sampled_from([0.0, 17.5])),
        "mode": draw(st.sampled_from(get_args(SwitchMode))),
        "switches": draw(st.dictionaries(st.integers(1, chunks), st.integers(0, 9), max_size=2)),
    }


@settings(max_examples=15)
@given(streams())
def test_a_stream_in_diffusers_is_afds(case: dict[str, Any]) -> None:
    student: WanStudent = make_student(**case["sizes"])
    seeds, steps, frames = case["seeds"], case["steps"], case["frames"]
    layout = stream_layout(student, frames)
    prompts = text(len(seeds))
    switches = {
        chunk: text(len(seeds), seed)
        for chunk, seed in case["switches"].items()
        if chunk < len(layout)
    }
    chunks = stream(
        student,
        prompts,
        student.noise_source(seeds, layout, len(steps)),
        frames=frames,
        denoising_steps=steps,
        context_noise=case["context_noise"],
        switches={chunk: Switch(other, case["mode"]) for chunk, other in switches.items()},
    )

    def switch(pipe: Any, step: int, t: Tensor, tensors: Any) -> dict[str, Tensor]:
        following, left = divmod(step + 1, len(steps))
        return {"prompt_embeds": switches[following]} if not left and following in switches else {}

    made = pipeline(student, SelfForcingScheduler(tuple(steps)))(
        prompt_embeds=prompts,
        height=32,
        width=48,
        num_frames=4 * frames - 3,
        seeds=seeds,
        context_noise=case["context_noise"],
        prompt_switch=case["mode"],
        output_type="latent",
        callback_on_step_end=switch,
    ).frames
    assert torch.equal(made.transpose(1, 2), torch.cat(list(chunks), 1))
