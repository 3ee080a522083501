"""Messages of the socket, version 1 (docs/LIVE.md).

Text is one JSON object a message. From the server a binary message is a chunk: four bytes, the
length of a JSON header (big-endian), the header (`ChunkHeader`), then its pictures one after
another. To the server it is a picture to start from.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from afd.rollout import SwitchMode

# The subprotocol of the WebSocket; a change that breaks clients changes its number.
SUBPROTOCOL = "afd-live.1"
MAX_TEXT_BYTES = 16_384
MAX_PICTURE_BYTES = 8 << 20
MAX_PROMPT = 2_000


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _text(prompt: str) -> str:
    # JSON can express lone surrogates, which no tokenizer accepts.
    if not prompt.strip() or "\0" in prompt or any("\ud800" <= c <= "\udfff" for c in prompt):
        raise ValueError("needed: text that is not blank")
    return prompt


Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT), AfterValidator(_text)]
# What a double, and so a page, holds exactly.
Seed = Annotated[int, Field(ge=0, lt=2**53)]
Place = Annotated[int, Field(ge=0, lt=2**53)]


# --- from a viewer ---


class Play(_Message):
    """Go on."""

    type: Literal["play"]


class Pause(_Message):
    """Stop after the present chunk."""

    type: Literal["pause"]


class Step(_Message):
    """Pause, and make one chunk."""

    type: Literal["step"]


class Restart(_Message):
    """Begin a new take.

    Attributes:
        seed: null: the same again.
        prompt: null: the present one.
        start: where it begins: noise, the picture sent last, or the last frame of the recording
            with this number.
    """

    type: Literal["restart"]
    seed: Seed | None = None
    prompt: Prompt | None = None
    start: Literal["noise", "picture"] | Place = "noise"


class SwitchPrompt(_Message):
    """Change the prompt at the next chunk; the last of several before it counts."""

    type: Literal["switch"]
    prompt: Prompt
    mode: SwitchMode = "plain"


class Record(_Message):
    """Begin or end a recording."""

    type: Literal["record"]
    on: bool


class Blind(_Message):
    """Hide which student is which, in a new order from the next take on; or show it."""

    type: Literal["blind"]
    on: bool


class Vote(_Message):
    """Prefer the student in a column of the present take, from 0; null: none of them."""

    type: Literal["vote"]
    choice: Annotated[int, Field(ge=0, le=2)] | None


class Controls(_Message):
    """Ask for the controls, or give them back."""

    type: Literal["controls"]
    on: bool


class Seen(_Message):
    """A chunk has arrived; without it the server sends no more than a few."""

    type: Literal["seen"]
    take: Place
    chunk: Place


Command = Play | Pause | Step | Restart | SwitchPrompt | Record | Blind | Vote
Incoming = Command | Controls | Seen
_INCOMING: TypeAdapter[Incoming] = TypeAdapter(Annotated[Incoming, Field(discriminator="type")])


def parse(text: str) -> Incoming:
    """A viewer's message. Raises ValueError, in one sentence."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
        raise ValueError(f"message: longer than {MAX_TEXT_BYTES} bytes")
    try:
        return _INCOMING.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80] or "message"
        raise ValueError(f"{place}: {first['msg'][:200]}") from None


# --- from the server ---


class Columns(_Message):
    """Names of the students from left to right; while they are hidden A, B, C."""

    labels: list[str]
    hidden: bool


class State(_Message):
    """Everything a page shows besides the frames; sent after every change.

    Attributes:
        take: number of the present take, from 1; 0 before the first.
        chunk: index of the next chunk.
        playing, recording, voted: as their names say.
        blind: whether the next take hides its students.
        viewers: how many watch.
        controls: whether this viewer has the controls.
        held: whether any viewer has.
        recordings: numbers of the recordings that a take can start from.
    """

    type: Literal["state"] = "state"
    take: int
    chunk: int
    seed: int
    prompt: str
    start: str
    playing: bool
    recording: bool
    blind: bool
    voted: bool
    columns: Columns
    recordings: list[int]
    viewers: int = 0
    controls: bool = False
    held: bool = False


class Hello(_Message):
    """The first message: what does not change while the server runs; `run` differs after that."""

    type: Literal["hello"] = "hello"
    version: Literal[1] = 1
    run: str
    fps: float
    height: int
    width: int
    picture: str
    history: float
    prompts: list[str]
    modes: list[str]
    window: int
    sink: int


class Switched(_Message):
    """The prompt changed at this chunk of the take."""

    type: Literal["switched"] = "switched"
    take: int
    chunk: int
    prompt: str
    mode: SwitchMode


class Recorded(_Message):
    """A recording is complete; its files have this name in the server's folder."""

    type: Literal["recorded"] = "recorded"
    number: int
    name: str


class Voted(_Message):
    """A vote has been saved."""

    type: Literal["voted"] = "voted"
    choice: int | None
    votes: int


class Problem(_Message):
    """A message could not be followed; the stream goes on."""

    type: Literal["problem"] = "problem"
    text: str


Outgoing = Hello | State | Switched | Recorded | Voted | Problem


class Times(_Message):
    """Milliseconds of a chunk by part, over all students.

    Attributes:
        context: the context pass of the chunk before; none with recache=chunk.
        switch: new text keys and, if asked for, the recache; with recache=chunk the passes over
            past frames.
        denoise, decode, encode: as their names say.
    """

    context: float
    switch: float
    denoise: float
    decode: float
    encode: float = 0.0


class ChunkHeader(_Message):
    """The header of a chunk's binary message.

    Attributes:
        start, frames: its first frame in the take, and the number of its frames.
        sizes: bytes of every picture, by student from left to right, then by frame.
        prompt: of this chunk.
        switched: whether it begins with this chunk.
        cache: bytes of the caches as allocated, and as the formula has them.
        first_ms: from the beginning of the take to its first chunk, encoded.
    """

    type: Literal["chunk"] = "chunk"
    take: int
    chunk: int
    start: int
    frames: int
    sizes: list[list[int]]
    prompt: str
    switched: bool
    times: Times
    cache: tuple[int, int]
    first_ms: float


class Packed(NamedTuple):
    """The binary message of a chunk, and the chunk's place."""

    take: int
    chunk: int
    data: bytes


def pack(header: ChunkHeader, pictures: list[list[bytes]]) -> Packed:
    """The binary message of a chunk."""
    head = header.model_dump_json().encode()
    data = b"".join([len(head).to_bytes(4, "big"), head, *(p for row in pictures for p in row)])
    return Packed(header.take, header.chunk, data)


def unpack(data: bytes) -> tuple[ChunkHeader, list[list[bytes]]]:
    """The header and the pictures of a chunk's message, by student and frame."""
    size = 4 + int.from_bytes(data[:4], "big")
    header = ChunkHeader.model_validate_json(data[4:size])
    rows = []
    for sizes in header.sizes:
        ends = [size + sum(sizes[: i + 1]) for i in range(len(sizes))]
        rows.append([data[end - one : end] for one, end in zip(sizes, ends, strict=True)])
        size = ends[-1]
    return header, rows
