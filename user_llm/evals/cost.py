"""What a request costs, by formula: prompt tokens, FLOPs and stored bytes of every method and way of serving (the paper's efficiency).

A request reads a prompt and scores the next token: everything up to the first token that is written. With the axis letters of
`nn/attention.py`, T the tokens that are read, S = T + the tokens whose K/V are there already, C the layers with
cross-attention, N' and H' its heads, and U the width of user tokens, one request costs (a product of [a, b] and [b, c] is 2abc)

    projections         L T (4 D N H + 4 D K H)                 q, o, k, v; + 4 D D with residual gates
    attention           L T S (4 N H + 4 N)                     scores and values; softmax
    mlp                 L T 6 D F
    head                2 D V                                   of the last token alone
    cross projections   C T 4 D N' H'                           q, o of cross-attention; + C T 6 D F before_block
    cross attention     C T M (4 N' H' + 4 N')
    user kv             C M 4 U N' H'                           k, v of the user tokens, unless they are stored
    resampler           per layer: M (4 D N H + 6 D F) + (E + M) 4 D N H + M (E + M) (4 N H + 4 N) + 2 M N E R
    encoder             E 2 D (sum of feature widths), and its layers as above with T = S = E

Each of resampler and encoder in its own sizes, R the recency buckets; both only where neither user tokens nor K/V are stored. All
T S scores count, hidden ones too, in layers with a window as well: that is what `attention` computes. Kernels that skip hidden
scores would halve the attention of a prompt that is read whole, to the advantage of long text prompts: the terms are listed so that
this can be seen. The 4 N of a softmax are one operation a score for the mask, the peak, the subtraction and the sum; they matter
where heads are narrow and prompts long.

Of a mixture of experts (`nn/experts.py`) the C experts of a token count, and what chooses them: T (6 C D F + 2 D X) in place of the mlp.
This is what accelerators compute. CPUs compute all X experts for each token, so that the formula is too low for them by X / C.

Left out: exp and its like, which XLA counts apart, and low-rank adapters, which `export` merges; and what XLA does count: norms, rotary
positions, activations, residuals and biases, which grow with T alone, and the building of masks. So the formula is the lower one,
by about 1% at a width of 128 and 3% at 64. XLA's count is in `cost_compiled.py`; tests hold the two within 5%.
"""

import dataclasses
from collections.abc import Callable, Sequence

from user_llm.models.decoder import DecoderConfig
from user_llm.models.user_encoder import UserEncoderConfig
from user_llm.models.user_llm import UserLLMConfig
from user_llm.nn.cross_attention import CrossAttentionConfig
from user_llm.nn.resampler import ResamplerConfig
from user_llm.nn.transformer import BlockConfig

Terms = dict[str, int]

# Operations of a softmax on each score, besides the exponential: mask, peak, subtraction, sum.
SOFTMAX = 4


@dataclasses.dataclass(frozen=True)
class Method:
    """How a request learns of its user.

    Attributes:
      attends: whether the decoder attends to user tokens.
      titles: how many of the most recent events stand in the prompt as text; None for all.
    """

    name: str
    attends: bool
    titles: int | None

    def shown(self, events: int) -> int:
        """Return how many titles the prompt of a user with so many events holds."""
        return events if self.titles is None else min(self.titles, events)


METHODS = (
    Method("user_llm", attends=True, titles=0),
    Method("hybrid_10", attends=True, titles=10),
    Method("text_prompt_10", attends=False, titles=10),
    Method("text_prompt_50", attends=False, titles=50),
    Method("text_prompt_all", attends=False, titles=None),
)
REFERENCE = METHODS[-1]  # ratios are to it, read anew for a user of the same number of events


@dataclasses.dataclass(frozen=True)
class PromptSizes:
    """Lengths in tokens, measured on a dataset with its tokenizer.

    Attributes:
      instruction: the prompt's start of a method that shows no titles.
      text_instruction: of one that does.
      title: mean over events, the end token included.
    """

    instruction: int
    text_instruction: int
    title: float

    def start(self, titles: int) -> int:
        """Return the tokens of the instruction, which all users share."""
        return self.text_instruction if titles else self.instruction

    def prompt(self, titles: int) -> int:
        """Return the tokens of a prompt with so many titles."""
        return self.start(titles) + round(titles * self.title)


@dataclasses.dataclass(frozen=True)
class Request:
    """What one request computes.

    Attributes:
      tokens: T, read by the decoder.
      cached: tokens before them whose K/V are there already.
      user: what of the user is given: `events`, `tokens`, `kv`, or `none` where the decoder attends to no user.
      events: E, encoded where they are given; 0 otherwise, so that equal work compares equal.
    """

    tokens: int
    cached: int = 0
    user: str = "none"
    events: int = 0

    def __post_init__(self):
        if self.user not in ("none", "events", "tokens", "kv"):
            raise ValueError(f"Unknown user {self.user!r} of a request: choose none, events, tokens or kv.")
        if self.tokens < 1 or self.cached < 0 or (self.events > 0) != (self.user == "events"):
            raise ValueError(f"A request reads a token or more, and events only if they are its user: {self}.")

    @property
    def slots(self) -> int:
        """S, the keys that its tokens attend to."""
        return self.cached + self.tokens


def requests(method: Method, events: int, sizes: PromptSizes, pad: Callable[[int], int] = int) -> dict[str, Request]:
    """Return the ways of serving a method to a user of so many events.

    `recomputed`: nothing is kept. `user_tokens_stored`, `user_kv_stored`: the user's side was computed before. `prefix_cached`:
    the K/V of the instruction are shared by all users. `prompt_kv_stored`: the K/V of the whole text prompt but its last token are
    kept for each user, which only a history that is never cut allows to extend. The last two are of no use with
    cross-attention, where a prompt's K/V depend on the user.

    Args:
      pad: what a number of tokens that is read together is padded to, such as `models.prefill.bucket`.
    """
    titles = method.shown(events)
    length, start = sizes.prompt(titles), sizes.start(titles)
    if method.attends:
        return {
            "recomputed": Request(pad(length), user="events", events=events),
            "user_tokens_stored": Request(pad(length), user="tokens"),
            "user_kv_stored": Request(pad(length), user="kv"),
        }
    return {
        "recomputed": Request(pad(length)),
        "prefix_cached": Request(pad(length - start), cached=start),
        "prompt_kv_stored": Request(1, cached=length - 1),
    }


def flops(config: UserLLMConfig, request: Request) -> Terms:
    """Return the terms of the formula for one request.

    Raises:
      ValueError: a request with a user of a model that lacks an encoder, a resampler or cross-attention.
    """
    terms = decoder_flops(config.decoder, request.tokens, request.slots)
    if request.user == "none":
        return terms
    encoder, resampler = user_side(config)
    tokens = config.num_tokens or 0
    terms |= cross_flops(config.decoder, request.tokens, tokens)
    if request.user != "kv":
        terms |= {"user kv": user_kv_flops(config.decoder, tokens)}
    if request.user == "events":
        terms |= {"resampler": resampler_flops(resampler, request.events), "encoder": encoder_flops(encoder, request.events)}
    return terms


def user_side(config: UserLLMConfig) -> tuple[UserEncoderConfig, ResamplerConfig]:
    """Return what turns events into user tokens; refuse a model without."""
    if not isinstance(config.encoder, UserEncoderConfig) or config.resampler is None:
        raise ValueError(
            "A request with a user needs a model with a transformer as `encoder`, and a `resampler`: set both in its UserLLMConfig."
        )
    return config.encoder, config.resampler


def cross_side(config: DecoderConfig) -> tuple[CrossAttentionConfig, int]:
    """Return the cross-attention and the number of layers that have it; refuse a decoder without."""
    if config.cross is None:
        raise ValueError("A request with a user needs a decoder with cross-attention: set `cross` in its DecoderConfig.")
    return config.cross, config.num_layers // config.cross.every


def layer_flops(block: BlockConfig, tokens: int, slots: int) -> Terms:
    """Return the terms of one transformer layer."""
    width, heads = block.width, block.heads * block.head_dim
    gates = 4 * width * width if block.residual_gate else 0
    copies, router = (1, 0) if block.experts is None else (block.experts.per_token, 2 * width * block.experts.count)
    return {
        "projections": tokens * (4 * width * heads + 4 * width * block.kv_heads * block.head_dim + gates),
        "attention": tokens * slots * (4 * heads + SOFTMAX * block.heads),
        "mlp": tokens * (6 * width * block.mlp_width * copies + router),
    }


def decoder_flops(config: DecoderConfig, tokens: int, slots: int) -> Terms:
    """Return the terms of reading `tokens` tokens that attend to `slots` keys, and of the last one's logits."""
    terms = {name: config.num_layers * term for name, term in layer_flops(config.block, tokens, slots).items()}
    return terms | {"head": 2 * config.block.width * config.vocab_size}


def cross_flops(config: DecoderConfig, tokens: int, user_tokens: int) -> Terms:
    """Return the terms of cross-attention to user K/V that are given."""
    (cross, layers), width = cross_side(config), config.block.width
    heads = cross.heads * cross.head_dim
    own_mlp = 6 * width * config.block.mlp_width if cross.seat == "before_block" else 0
    return {
        "cross projections": layers * tokens * (4 * width * heads + own_mlp),
        "cross attention": layers * tokens * user_tokens * (4 * heads + SOFTMAX * cross.heads),
    }


def user_kv_flops(config: DecoderConfig, user_tokens: int) -> int:
    """Return the FLOPs from user tokens to the K/V of every layer with cross-attention."""
    cross, layers = cross_side(config)
    return layers * user_tokens * 4 * cross.user_width * cross.heads * cross.head_dim


def resampler_flops(config: ResamplerConfig, events: int) -> int:
    """Return the FLOPs from event states to user tokens."""
    width, heads, latents = config.input_width, config.heads * config.head_dim, config.num_latents
    seen = events + latents
    layer = latents * (4 * width * heads + 6 * width * config.mlp_width) + seen * 4 * width * heads
    layer += (
        latents * seen * (4 * heads + SOFTMAX * config.heads) + 2 * latents * config.heads * events * config.recency_buckets
    )
    return config.num_layers * layer


def encoder_flops(config: UserEncoderConfig, events: int) -> int:
    """Return the FLOPs from events to their states."""
    width = config.block.width
    total = width + (len(config.schema.features) - 1) * config.feature_width
    layer = sum(layer_flops(config.block, events, events).values())
    return events * 2 * total * width + config.num_layers * layer


def state_bytes(config: UserLLMConfig, serving: str, request: Request, bytes_per_value: int = 4) -> int:
    """Return what a way of serving stores for each user besides the events themselves; 4 bytes a value in float32."""
    tokens = config.num_tokens or 0
    if serving == "prompt_kv_stored":
        block = config.decoder.block
        return 2 * config.decoder.num_layers * block.kv_heads * block.head_dim * request.cached * bytes_per_value
    if serving == "user_tokens_stored":
        return tokens * user_side(config)[1].input_width * bytes_per_value
    if serving == "user_kv_stored":
        cross, layers = cross_side(config.decoder)
        return tokens * (2 * layers * cross.heads * cross.head_dim * bytes_per_value + 1)  # 1: of the mask
    return 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One method served one way to a user of so many events.

    Attributes:
      step: the request of writing one more token behind the prompt.
      flops: by term.
      flops_ratio: how many times more the full text prompt takes, read anew, for the same user.
    """

    method: Method
    events: int
    serving: str
    prompt_tokens: int
    request: Request
    step: Request
    flops: Terms
    flops_ratio: float
    state_bytes: int


def table(
    config: UserLLMConfig,
    sizes: PromptSizes,
    lengths: Sequence[int],
    *,
    methods: Sequence[Method] = METHODS,
    pad: Callable[[int], int] = int,
) -> list[Row]:
    """Return a row for every history length, method and way of serving it; `pad` as in `requests`."""
    rows = []
    for events in lengths:
        full = flops(config, requests(REFERENCE, events, sizes, pad)["recomputed"])
        for method in methods:
            prompt = sizes.prompt(method.shown(events))
            step = Request(1, cached=prompt, user="kv" if method.attends else "none")
            for serving, request in requests(method, events, sizes, pad).items():
                terms = flops(config, request)
                ratio = sum(full.values()) / sum(terms.values())
                stored = state_bytes(config, serving, request)
                rows.append(Row(method, events, serving, prompt, request, step, terms, ratio, stored))
    return rows
