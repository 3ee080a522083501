"""VideoAlign's prompt template and tokenization.

The model was trained on one prompt template, which is part of its own code. It is read from the
user's checkout of that code by parsing the file; none of that code is executed or shipped here.
Shape letters: B prompts, L tokens.
"""

from __future__ import annotations

import ast
import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afd.hub import named_errors
from afd_kernels.contracts import require

_log = logging.getLogger("afd")
# In the order in which the released code adds them to the vocabulary.
REWARDS = ("VQ", "MQ", "TA")
REWARD_TOKENS = tuple(f"<|{name}_reward|>" for name in REWARDS)
VIDEO_TOKEN = "<|video_pad|>"
FIELD = "text_prompt"
# Template kinds in model_config.json, and their variables; all other kinds lack reward tokens.
TEMPLATES = {"detailed_special": "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"}
FILE = "prompt_template.py"

# Used without a checkout. As in the released template the prompt comes last: the model learnt the
# first two ratings without access to the prompt.
OWN_TEMPLATE = """
Rate this generated video from 0 to 10 in three separate respects.

Visual quality: how believable, sharp, detailed and pleasing each frame is by itself.
Visual quality rating: <|VQ_reward|>

Motion quality: how steady, natural, smooth and physically plausible the movement is, and whether
there is enough of it.
Motion quality rating: <|MQ_reward|>

Text alignment: how well subjects, actions, surroundings, style and camera fit this description.
Description: {text_prompt}
Text alignment rating: <|TA_reward|>
"""


def read_template(checkout: str | Path | None, kind: str = "detailed_special") -> str:
    """Read the prompt template of a VideoAlign checkout (its folder, or prompt_template.py).

    The file is parsed and never executed. None: our own wording, with a warning in the log. Raises
    FileNotFoundError, or ValueError if the file has no such template as a plain string.
    """
    known = kind in TEMPLATES
    require(known, "prompt_template_type", kind, f"one with reward tokens: {', '.join(TEMPLATES)}")
    if checkout is None:
        _log.warning(
            "videoalign: no checkout of VideoAlign was given, so prompts are asked in afd's own "
            "words; the released weights score best with the template they were trained on"
        )
        return OWN_TEMPLATE
    path = Path(checkout)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"prompt template: {path} does not exist; needed: a checkout of "
            f"github.com/KwaiVGI/VideoAlign, or its {FILE}"
        )
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"prompt template: {path} cannot be parsed ({error})") from error
    name, found = TEMPLATES[kind], None
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            found = node.value  # type: ignore[attr-defined]
    text = found.value if isinstance(found, ast.Constant) else None
    if not isinstance(text, str):
        raise ValueError(f"prompt template: {path} has no {name} that is a plain string")
    return check_template(text, str(path))


def check_template(template: str, where: str = "template") -> str:
    """Validate and return a template: one prompt field, and each reward token once, in order.

    Fields with attributes, indices, conversions or formats are rejected, as templates are data.
    """
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{where}: it is no format string ({error})") from error
    require(fields == [(FIELD, "", None)], where, f"fields {fields}", f"{{{FIELD}}} once, plainly")
    places = [template.find(token) for token in REWARD_TOKENS]
    once = all(template.count(token) == 1 for token in REWARD_TOKENS)
    require(
        once and places == sorted(places),
        where,
        places,
        f"{', '.join(REWARD_TOKENS)} once, in order",
    )
    return template


def chat_text(user_text: str) -> str:
    """Qwen2-VL's chat format for a video followed by a request, up to the assistant's turn."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{VIDEO_TOKEN}<|vision_end|>{user_text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@dataclass(frozen=True)
class Tokens:
    """A tokenized batch of requests.

    Attributes:
        ids_BL: int64, right-padded.
        lengths: number of tokens of each request without padding.
        places_B3: int64, positions of the VQ, MQ and TA tokens.
    """

    ids_BL: Tensor
    lengths: tuple[int, ...]
    places_B3: Tensor

    def mask(self) -> Tensor:
        """Attention mask, int64 [B, L]: 1 for tokens, 0 for padding."""
        at_L = torch.arange(self.ids_BL.shape[1])
        return (at_L < torch.tensor(self.lengths)[:, None]).long()


class PromptEncoder:
    """Tokenizes prompts for the model."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        """`tokenizer`: that of the base model; missing reward tokens are added to it."""
        from transformers import AddedToken

        self.template = check_template(template)
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        fits = VIDEO_TOKEN in known and tokenizer.pad_token_id is not None
        require(
            fits, "tokenizer", f"{len(known)} tokens", f"Qwen2-VL's, with {VIDEO_TOKEN} and padding"
        )
        # One call in the released order, so that they get their trained embedding rows.
        new = [AddedToken(t, special=True) for t in REWARD_TOKENS if t not in known]
        tokenizer.add_tokens(new, special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids([VIDEO_TOKEN, *REWARD_TOKENS])
        self.video_id, *reward_ids = ids
        self.reward_ids: list[int] = reward_ids
        self.pad_id: int = tokenizer.pad_token_id
        self.markup = sorted(tokenizer.get_added_vocab())

    @property
    def rows(self) -> int:
        """Number of embedding rows."""
        return len(self.tokenizer)

    @classmethod
    def load(cls, folder: str | Path, template: str) -> PromptEncoder:
        """Load from a folder with tokenizer.json or any format that transformers reads."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        exact = (Path(folder) / "tokenizer.json").is_file()
        kind = PreTrainedTokenizerFast if exact else AutoTokenizer
        with named_errors("tokenizer", Path(folder)):
            tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
        return cls(tokenizer, template)

    def request(self, prompt: str) -> str:
        """Text of the user's turn for a video with this prompt."""
        inside = [token for token in self.markup if token in prompt]
        require(
            not inside, "prompts", f"{prompt!r} with {inside}", "text without the model's tokens"
        )
        return self.template.format(**{FIELD: prompt})

    def encode(self, prompts: Sequence[str], video_tokens: Sequence[int]) -> Tokens:
        """Tokenize each prompt after a video of `video_tokens` tokens."""
        listed = not isinstance(prompts, str) and len(prompts) == len(video_tokens) > 0
        require(listed, "prompts", prompts, f"a list of {len(video_tokens)} prompts, one per video")
        rows = []
        for prompt, count in zip(prompts, video_tokens, strict=True):
            ids = self.tokenizer(chat_text(self.request(prompt)), add_special_tokens=False)[
                "input_ids"
            ]
            at = ids.index(self.video_id)
            rows.append(ids[:at] + [self.video_id] * count + ids[at + 1 :])
        longest = max(map(len, rows))
        padded = [row + [self.pad_id] * (longest - len(row)) for row in rows]
        places = [[row.index(reward) for reward in self.reward_ids] for row in rows]
        return Tokens(torch.tensor(padded), tuple(map(len, rows)), torch.tensor(places))
