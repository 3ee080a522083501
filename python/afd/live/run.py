"""`afd live`: load the students and serve their page until Ctrl-C."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette

from afd.errors import ConfigError
from afd.live.config import LiveConfig, read_config
from afd.live.engine import Engine
from afd.live.recording import png_of
from afd.live.security import Guard, guard
from afd.live.serve import PORT, listen, serve
from afd.live.server import Live
from afd.live.take import load_students
from afd.live.viewers import Viewers
from afd.sampling.jobs import Job, read_jobs
from afd.video import read_video, to_uint8


def live(
    words: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    public: str | None = None,
    show: bool = False,
) -> None:
    """Serve the students of a configuration, by default the shipped one, until a signal ends it.

    Args:
        words: those of `afd live`: a configuration file or none, then overrides.
        host: address to listen on; any but loopback needs the printed token in the URL.
        public: URL of a proxy through which the page is reached, too.
        show: open the page in the browser.

    Raises:
        ConfigError: the configuration, a file it names, the address or the port.
    """
    config = read_config(words)
    rules = guard(host, public)
    # The address is checked before weights are loaded.
    with listen(host, port) as listening:
        serve(make_app(config, rules), listening, rules, public, show)


def make_app(config: LiveConfig, rules: Guard) -> Starlette:
    """The application of a configuration, its students loaded and its threads started."""
    jobs = read_jobs(config)
    first = jobs[0]
    for student in config.students():
        student.student.require_weights()
    prompts = list(dict.fromkeys(prompt for job in jobs for prompt in job.prompts))
    try:
        students = load_students(config.students(), config.labels(), prompts)
    except ValueError as error:  # a file does not match the configuration
        raise ConfigError(str(error)) from error
    if config.keep_text_encoder:
        for one in students:
            one.pipeline.student.keep_text_encoder()
    viewers = Viewers()
    # A page holds no larger number exactly.
    if first.seed >= 2**53:
        raise ConfigError(f"seed: got {first.seed}; needed: below 2**53")
    engine = Engine(
        config, students, first.prompt, first.seed, viewers.publish, _picture(config, first)
    )
    return Live(config, prompts, engine, viewers, rules).app()


def _picture(config: LiveConfig, job: Job) -> bytes | None:
    """The picture that a prompt's stream starts from, as PNG in the students' size."""
    if job.image is None:
        return None
    if not job.image.is_file():
        raise ConfigError(f"image: got {job.image} for {job.name}; needed: a file")
    video = read_video(job.image, frames=1, height=config.height, width=config.width)
    return png_of(to_uint8(video[0]))
