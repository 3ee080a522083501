"""Analytic cost model of a training run: floating-point operations and bytes of every part.

Nothing is measured or allocated. Operations are those of matrix products, attention and
convolutions, two per multiply-add; the utilisation that a plan assumes accounts for memory-bound
work. The network's formulas agree with the specification's roofline and, for one pass, with
`benchmarks.hardware`.

Letters: D width, T tokens of a frame, K chunks, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Context = Literal["recompute", "own_context", "shared_context", "noisy"]

# Ratio of an attention's backward to its forward: five products to two, or three to two if keys
# and values need no gradient.
FULL_BACKWARD, QUERY_BACKWARD = 2.5, 1.5
# Bytes per element of a master weight, a gradient, or one of Adam's two moments.
FLOAT = 4


@dataclass(frozen=True)
class Machine:
    """An accelerator: its data sheet's dense bf16 FLOP per second, and its memory in bytes."""

    name: str
    flop: float
    memory: float


MACHINES = {
    "B200": Machine("B200", 2250e12, 180e9),
    "H200": Machine("H200", 989e12, 141e9),
    "H100": Machine("H100", 989e12, 80e9),
    "L40S": Machine("L40S", 362e12, 48e9),
    "RTX 4090": Machine("RTX 4090", 165e12, 24e9),
}
# Fraction of the data sheet's rate that whole phases reach. Published full passes of this network
# on an H200 reach 208 (FlashAttention 2, eager) to 398 TFLOP/s (FlashAttention 3, compiled).
UTILISATION = 0.35
# The same for the autoencoder's convolutions, eager.
CONVOLUTIONS = 0.25


@dataclass(frozen=True)
class Net:
    """Sizes of a causal Wan network on videos of one size.

    Attributes:
        parameters: parameters of the whole network, excluding adapters.
        frames, chunk: latent frames of a video, and latent frames denoised together.
        tokens: T.
        lora: rank of the adapters; None: every weight is trained.
        parents: summed rank of the adapters of earlier runs, which most passes have, too.
        window: most frames a chunk attends to; None: all.
        sink: first frames that stay in the window.
        start: chunk of a stream at which a clip of it begins.
        channels: channels of a latent.
        block: parameters of one block.
    """

    dim: int
    ffn: int
    layers: int
    text_len: int
    parameters: int
    frames: int
    chunk: int
    tokens: int
    lora: int | None = None
    parents: int = 0
    window: int | None = None
    sink: int = 0
    start: int = 0
    channels: int = 16
    block: int = 0

    @property
    def chunks(self) -> int:
        return self.frames // self.chunk

    def seen(self, chunk: int) -> float:
        """Number of chunks that a chunk attends to, itself included."""
        frames = (self.start + chunk + 1) * self.chunk
        return min(frames, self.window or frames) / self.chunk

    def sinks(self, first: int) -> int:
        """Chunks of a video from `first` on that attend to the sink apart from the rest."""
        ends = ((self.start + chunk + 1) * self.chunk for chunk in range(first, self.chunks))
        return sum(end > (self.window or end) for end in ends) if self.sink else 0

    def pairs(self, first: int) -> float:
        """Sum of `seen` over the chunks of a video from `first` on."""
        return sum(map(self.seen, range(first, self.chunks)))

    @property
    def lora_parameters(self) -> int:
        """Parameters of A and B on q, k, v, o of both attentions and on the feed-forward."""
        rank = self.lora or 0
        return self.layers * rank * (8 * 2 * self.dim + 2 * (self.dim + self.ffn))

    @property
    def outside_blocks(self) -> int:
        """Parameters of embeddings and head."""
        return self.parameters - self.layers * self.block

    @property
    def trained(self) -> int:
        """Parameters of one trained version."""
        return self.lora_parameters if self.lora is not None else self.parameters

    # --- forward operations, one video ---

    def linear(self, tokens: float, adapted: bool = True) -> float:
        """Token-wise matrix products; `adapted`: with LoRA."""
        D, rank = self.dim, self.parents + ((self.lora or 0) if adapted else 0)
        # Keys and values of the cross-attention come from the prompt.
        weights = 6 * D * D + 2 * D * self.ffn + rank * (6 * 2 * D + 2 * (D + self.ffn))
        return 2.0 * self.layers * weights * tokens

    def keys(self, tokens: float, adapted: bool = True) -> float:
        """Keys and values of one layer's self-attention."""
        D, rank = self.dim, self.parents + ((self.lora or 0) if adapted else 0)
        return 2.0 * (2 * D * D + rank * 2 * 2 * D) * tokens

    def attention(self, queries: float, keys: float) -> float:
        """The two attention products, over all heads and layers."""
        return 4.0 * self.layers * self.dim * queries * keys

    def whole(self, chunks: float, seen: float, adapted: bool = True) -> float:
        """A pass over `chunks` chunks, attending to `seen` pairs of chunks and to the prompt."""
        size = self.chunk * self.tokens
        prompt = self.attention(chunks * size, self.text_len)
        pairs = self.attention(size, size) * seen
        return self.linear(chunks * size, adapted) + pairs + prompt

    def context(self, chunks: float, seen: float, adapted: bool = True) -> float:
        """A pass as in `whole` for a context: its last layer computes only keys and values."""
        others = self.whole(chunks, seen, adapted) * (self.layers - 1) / self.layers
        return others + self.keys(chunks * self.chunk * self.tokens, adapted)

    def recomputed(self, forward: float, tokens: float) -> float:
        """A checkpointed forward in the backward: it ends with the input of the last product."""
        last = 2.0 * self.layers * self.dim * self.ffn * tokens
        return forward - (last if self.lora is None else 0.0)


# --- the student ---


def rollout_flop(net: Net, steps: int, first_steps: int | None = None) -> float:
    """One video: each chunk's denoising steps, and a context pass for all but the last chunk."""
    total = rolled_flop(net, steps, first_steps)
    return total[net.chunks] - net.context(1, net.seen(net.chunks - 1))


def rolled_flop(
    net: Net, steps: int, first_steps: int | None = None, chunks: int | None = None
) -> list[float]:
    """The first n chunks of a stream for n = 0 to `chunks` (those of a video), with the context
    passes of all."""
    total = [0.0]
    for chunk in range(net.chunks if chunks is None else chunks):
        denoising = first_steps if chunk == 0 and first_steps is not None else steps
        seen = net.seen(chunk)
        total.append(total[-1] + denoising * net.whole(1, seen) + net.context(1, seen))
    return total


def context_flop(net: Net, adapted: bool = True) -> float:
    """The clean pass that produces a video's context. It includes the last chunk, which the
    roofline does not count, since nothing attends to it: 5 % of an update."""
    return net.context(net.chunks, net.pairs(0), adapted)


def noisy_flop(net: Net, part: float = 1.0, adapted: bool = True, first: int = 0) -> float:
    """A forward of the noisy half; `part`: the fraction of the chunks from `first` on that is
    sampled."""
    return part * net.whole(net.chunks - first, net.pairs(first), adapted)


def linear_backward(net: Net, tokens: float) -> float:
    """Backward of the linear layers, for inputs and trained weights."""
    return _backward(net, net.linear(tokens, adapted=False), net.linear(tokens))


def _backward(net: Net, plain: float, adapted: float) -> float:
    """Backward of products that take `plain` operations, `adapted` with LoRA."""
    return 2 * plain if net.lora is None else plain + 2 * (adapted - plain)


def noisy_backward(
    net: Net, part: float = 1.0, *, through_context: bool = False, first: int = 0
) -> float:
    """Backward of `noisy_flop`; unless `through_context`, context keys need no gradient."""
    size, chunks = net.chunk * net.tokens, part * (net.chunks - first)
    own = chunks * net.attention(size, size)
    past = (part * net.pairs(first) - chunks) * net.attention(size, size)
    prompt = net.attention(chunks * size, net.text_len)
    to_past = FULL_BACKWARD if through_context else QUERY_BACKWARD
    products = linear_backward(net, chunks * size)
    if not through_context:
        # The sink's keys are copied beside those of the noisy chunks, which need gradients.
        copied = part * net.sinks(first) * net.attention(size, net.sink * net.tokens)
        products += (FULL_BACKWARD - QUERY_BACKWARD) * copied
    return products + FULL_BACKWARD * (own + prompt) + to_past * past


def trained_flop(
    net: Net,
    part: float = 1.0,
    *,
    through_context: bool = False,
    checkpointed: bool = True,
    first: int = 0,
) -> float:
    """`noisy_flop` with its backward, in which checkpointed blocks are recomputed."""
    forward = noisy_flop(net, part, first=first)
    tokens = part * (net.chunks - first) * net.chunk * net.tokens
    again = net.recomputed(forward, tokens) if checkpointed else 0.0
    backward = noisy_backward(net, part, through_context=through_context, first=first)
    return forward + again + backward


def trained_context_flop(net: Net, *, checkpointed: bool = True) -> float:
    """`context_flop` with its backward, in which checkpointed blocks are recomputed."""
    forward, tokens = context_flop(net), net.frames * net.tokens
    others = (net.layers - 1) / net.layers
    again = net.recomputed(forward, others * tokens) if checkpointed else 0.0
    keys = _backward(net, net.keys(tokens, adapted=False), net.keys(tokens))
    return forward + again + others * noisy_backward(net, through_context=True) + keys


def nft_flop(
    net: Net,
    context: Context,
    *,
    draws: int = 1,
    part: float = 1.0,
    kept: bool = False,
    prior: int = 1,
    checkpointed: bool = True,
    first: int = 0,
) -> float:
    """The AFD update of one video: old policy, references and student on `draws` noised copies.

    Args:
        context: which network computes the clean context; noisy: there is none, and keys of
            earlier noisy chunks need gradients.
        draws: (t, noise) draws; they share one context pass.
        part: fraction of the chunks that is sampled.
        kept: the rollout's caches serve as the old policy's context.
        prior: number of references that are evaluated.
        checkpointed: whether blocks are recomputed in the backward.
        first: the first chunk that the update is about.
    """
    others = [True] + [False] * prior  # old has adapters, the references none of this rank
    noisy = sum(noisy_flop(net, part, adapted, first) for adapted in others)
    contexts = sum(context_flop(net, adapted) for adapted in others)
    through = context in ("recompute", "noisy")
    ours = trained_flop(net, part, through_context=through, checkpointed=checkpointed, first=first)
    total = draws * (noisy + ours)
    if context == "noisy":
        return total
    if context == "recompute":
        return total + draws * (contexts + trained_context_flop(net, checkpointed=checkpointed))
    if context == "shared_context":
        return total + (0.0 if kept else context_flop(net))
    return total + contexts + context_flop(net)


def replay_flop(
    net: Net,
    context: Context,
    *,
    draws: int = 1,
    part: float = 1.0,
    kept: bool = False,
    checkpointed: bool = True,
) -> float:
    """The update of one replayed video: its start and the student on `draws` noised copies.

    Arguments as in `nft_flop`; an SFT run's context is "recompute", as gradients go through it.
    """
    through = context in ("recompute", "noisy")
    ours = trained_flop(net, part, through_context=through, checkpointed=checkpointed)
    total = draws * (noisy_flop(net, part, adapted=False) + ours)
    if context == "noisy":
        return total
    start = context_flop(net, adapted=False)
    if context == "recompute":
        return total + draws * (start + trained_context_flop(net, checkpointed=checkpointed))
    if context == "shared_context":
        return total + (0.0 if kept else context_flop(net))
    return total + start + context_flop(net)


def last_step_flop(
    net: Net, *, recompute: bool = False, prior: int = 0, checkpointed: bool = True
) -> float:
    """A rollout's last denoising step with gradients, for methods that differentiate it."""
    own = trained_flop(net, through_context=recompute, checkpointed=checkpointed)
    context = (
        trained_context_flop(net, checkpointed=checkpointed) if recompute else context_flop(net)
    )
    reference = noisy_flop(net, adapted=False) + context_flop(net, adapted=False)
    return own + context + prior * reference


def sft_flop(net: Net, *, draws: int, part: float = 1.0, checkpointed: bool = True) -> float:
    """Flow matching on one video: `draws` noised copies and their contexts, all with gradients."""
    noisy = trained_flop(net, part, through_context=True, checkpointed=checkpointed)
    return draws * (noisy + trained_context_flop(net, checkpointed=checkpointed))


# --- memory of the student ---


def kv_bytes(net: Net, videos: int, itemsize: int, frames: int | None = None) -> int:
    """Keys and values of whole videos, or of these frames of them, and of their prompts, counted as
    in `kv_cache.cache_bytes`."""
    slots = (net.frames if frames is None else frames) * net.tokens + net.text_len
    return 2 * net.layers * videos * slots * net.dim * itemsize


def shared_kv_bytes(net: Net, groups: int, videos: int, itemsize: int, fork: int) -> int:
    """Caches of videos of these groups that share the chunks before `fork` and the prompt."""
    past = fork * net.chunk
    own = videos * (net.frames - past) * net.tokens
    return kv_bytes(net, groups, itemsize, past) + 2 * net.layers * own * net.dim * itemsize


def activation_bytes(net: Net, videos: int, itemsize: int, *, checkpointed: bool) -> int:
    """Activations that autograd saves for one noisy pass, plus the block being computed.

    A block saves about 19 D + 2 F numbers per token (counted with LoRA through
    `torch.autograd.graph.saved_tensors_hooks`). With checkpointing it saves 2 D, the residual,
    and a single block holds all of them and their gradients.
    """
    tokens = videos * net.frames * net.tokens
    block = (19 * net.dim + 2 * net.ffn) * itemsize * tokens
    # Keys (normalised in fp32) and values of the prompt, computed before the blocks.
    prompts = net.layers * videos * net.text_len * net.dim * (FLOAT + 2 * itemsize)
    if not checkpointed:
        return net.layers * block + block + prompts
    return net.layers * 2 * net.dim * itemsize * tokens + 2 * block + prompts


# --- the released text encoder ---

# UMT5-XXL's encoder.
TEXT_PARAMETERS = 5_680_910_336


# --- VideoAlign (Qwen2-VL-2B) ---


@dataclass(frozen=True)
class VideoAlignSizes:
    """Sizes of Qwen2-VL's two towers; defaults: 2B with VideoAlign's three tokens.

    Attributes:
        prompt: text tokens around the video (the released template has about 800).
    """

    dim: int = 1536
    ffn: int = 8960
    layers: int = 28
    kv: int = 256
    vocabulary: int = 151_660
    vision_dim: int = 1280
    vision_ffn: int = 5120
    vision_layers: int = 32
    patch_dim: int = 1176
    prompt: int = 800

    @property
    def layer(self) -> int:
        """Parameters of a language layer."""
        return 2 * self.dim**2 + 2 * self.dim * self.kv + 3 * self.dim * self.ffn

    @property
    def parameters(self) -> int:
        """Parameters of both towers, without biases and norms (less than 0.1 %)."""
        width, merged = self.vision_dim, 4 * self.vision_dim
        vision = self.vision_layers * (4 * width**2 + 2 * width * self.vision_ffn)
        vision += self.patch_dim * width + merged * (merged + self.dim)
        return self.layers * self.layer + self.vocabulary * self.dim + vision

    def lora(self, rank: int) -> int:
        """Parameters of adapters on the seven linear layers per language layer, and of the head."""
        attention = 2 * 2 * self.dim + 2 * (self.dim + self.kv)
        feed_forward = 3 * (self.dim + self.ffn)
        return self.layers * rank * (attention + feed_forward) + self.dim

    def tokens(self, patches: int) -> int:
        """Sequence length of the language model's input."""
        return patches // 4 + self.prompt

    def vision_flop(self, patches: int, pictures: int) -> float:
        """The vision tower on one video; patches attend only within their own image."""
        weights = 4 * self.vision_dim**2 + 2 * self.vision_dim * self.vision_ffn
        within = 4.0 * patches * patches / max(1, pictures) * self.vision_dim
        return self.vision_layers * (2.0 * weights * patches + within)

    def language_flop(self, patches: int, rank: int = 0) -> float:
        """The language model on one video; `rank`: that of the active LoRA."""
        length = self.tokens(patches)
        causal = self.layers * 2.0 * length * length * self.dim
        return 2.0 * length * (self.layers * self.layer + self.lora(rank) * (rank > 0)) + causal

    def score_flop(self, patches: int, pictures: int, rank: int) -> float:
        """One score without gradients."""
        return self.vision_flop(patches, pictures) + self.language_flop(patches, rank)

    def train_flop(self, patches: int, pictures: int, rank: int, *, checkpointed: bool) -> float:
        """One video of a pair: forward, backward to the LoRA, and recomputed forward."""
        plain = self.language_flop(patches)
        forward = self.language_flop(patches, rank)
        backward = plain + 2 * (forward - plain)
        return self.vision_flop(patches, pictures) + forward * (1 + checkpointed) + backward

    def activation_bytes(self, patches: int, itemsize: int, *, checkpointed: bool) -> int:
        """Estimated activations of a training pass on one video, plus the current layer."""
        length = self.tokens(patches)
        layer = length * (20 * self.dim + 6 * self.ffn) * itemsize
        kept = self.layers * (length * self.dim * itemsize if checkpointed else layer)
        return kept + 2 * layer
