"""The open decoder families as their checkpoints name them: Llama (and SmolLM2), Qwen, Gemma, Mistral, OLMo, SmolLM3, Phi and Granite.

A family is what sets its checkpoints apart from Llama's: a few fields of our DecoderConfig, and names of tensors. A table says for
each of our parameters the checkpoint's name, its shape there and its shape here. The settings of a checkpoint are read in
`models/config_json.py`.

Left out: Gemma 4, whose layers have embeddings of their own, share keys and values with others and differ in the size of their heads; and
Qwen 3.5, most of whose layers keep a recurrent state in place of keys and values. Both need a second kind of layer and of cache, which
prefill, beams and slots would all have to know.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from user_llm.models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of an open decoder family differ from Llama's.

    Attributes:
      architecture: the class of transformers that reads them, as config.json's `architectures` names it.
      qk_norm, qk_norm_over_heads, qkv_bias, pre_norms, post_norms, norm_offset: of `BlockConfig`.
      scaled_embeddings: whether embeddings are multiplied by the square root of their width.
      activation: the key of config.json that names the activation.
      query_scale: the key of config.json whose value to the power of -1/2 scales queries; None for the head's size.
      fields: fields of `BlockConfig` or `DecoderConfig`, by the settings of config.json that hold them.
      reads: which of OPTIONAL the family has.
      names: what a checkpoint calls our parameters, where it is not as in LLAMA_NAMES. Parameters of one name lie in one tensor, one
        after another. In a name of an expert's, {} stands for the expert's number.
      layer: what the names of a layer's tensors begin with; {} stands for the layer's number.
      defaults: settings for which config.json may say nothing; None where transformers knows the family and completes them.

    Raises:
      ValueError: `names` has what is no parameter of a decoder, or lacks one that has no name in LLAMA_NAMES; or `reads` has what is
        not in OPTIONAL.
    """

    architecture: str
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    qkv_bias: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    activation: str = "hidden_act"
    query_scale: str | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layer: str = "layers.{}."
    defaults: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        known = {*LLAMA_NAMES, *POST_NORMS}
        if unknown := sorted(set(self.names) - known):
            raise ValueError(
                f"names has {unknown[0]!r}, which is no parameter of a decoder: choose {', '.join(sorted(known))}."
            )
        if missing := sorted(set(POST_NORMS) - set(self.names)) if self.post_norms else []:
            raise ValueError(f"names lacks {missing[0]!r}, which a family with post_norms has.")
        if unknown := sorted(self.reads - OPTIONAL.keys()):
            raise ValueError(f"reads has {unknown[0]!r}, which is not known: choose {', '.join(sorted(OPTIONAL))}.")

    def name(self, path: str) -> str:
        """Return what a checkpoint calls a parameter; of a layer's, what follows `layer`."""
        return self.names.get(path) or LLAMA_NAMES[path]


# What a checkpoint calls our parameters, after what the names of its language model begin with.
LLAMA_NAMES = {
    "embed": "embed_tokens.weight",
    "norm/scale": "norm.weight",
    "head": "lm_head.weight",  # its name has no prefix such as `model.`
    "attn_norm/scale": "input_layernorm.weight",
    **{f"attn/{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attn/{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    **{f"attn/{x}_norm/scale": f"self_attn.{x}_norm.weight" for x in "qk"},
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate": "mlp.gate.weight",
    "mlp/gate_proj": "mlp.gate_proj.weight",
    "mlp/up": "mlp.up_proj.weight",
    "mlp/down": "mlp.down_proj.weight",
}
POST_NORMS = ("attn_post_norm/scale", "mlp_post_norm/scale")
# Settings that some families have, and which ones are needed then: a window of all layers (`layer_types` does not say which have one)
# or of those that `layer_types` names, layers without rotary positions, heads that positions turn in part, and experts.
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "sliding_window": (),
    "layer_types": (),
    "no_rope_layers": ("no_rope_layers",),
    "partial_rotary_factor": (),
    "num_experts": ("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"),
}
AFTER_BLOCKS = {
    "attn_post_norm/scale": "post_attention_layernorm.weight",
    "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
}
GEMMA_NAMES = AFTER_BLOCKS | {"mlp_norm/scale": "pre_feedforward_layernorm.weight"}
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, reads=frozenset({"layer_types"})),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, reads=frozenset({"layer_types"})),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", qk_norm=True, reads=frozenset({"num_experts"}),
        names={f"mlp/{x}": f"mlp.experts.{{}}.{x if x == 'gate_proj' else f'{x}_proj'}.weight" for x in ("gate_proj", "up", "down")},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", post_norms=True, norm_offset=1.0, scaled_embeddings=True, activation="hidden_activation",
        query_scale="query_pre_attn_scalar", names=GEMMA_NAMES, reads=frozenset({"layer_types"}),
        fields={"attn_logit_softcapping": "attn_softcap", "final_logit_softcapping": "logit_softcap"},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", qk_norm=True, post_norms=True, norm_offset=1.0, scaled_embeddings=True,
        activation="hidden_activation", query_scale="query_pre_attn_scalar", names=GEMMA_NAMES, reads=frozenset({"layer_types"}),
    ),
    "mistral": Family("MistralForCausalLM", reads=frozenset({"sliding_window"})),
    "ministral3": Family("Ministral3ForCausalLM", reads=frozenset({"sliding_window"})),
    "olmo2": Family(
        "Olmo2ForCausalLM", qk_norm=True, qk_norm_over_heads=True, pre_norms=False, post_norms=True, names=AFTER_BLOCKS
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM", qk_norm=True, qk_norm_over_heads=True, pre_norms=False, post_norms=True, names=AFTER_BLOCKS,
        reads=frozenset({"layer_types"}),
    ),
    "smollm3": Family("SmolLM3ForCausalLM", reads=frozenset({"no_rope_layers", "layer_types"})),
    "phi3": Family(
        "Phi3ForCausalLM", reads=frozenset({"sliding_window", "partial_rotary_factor"}),
        names={f"attn/{x}": "self_attn.qkv_proj.weight" for x in "qkv"} | {f"mlp/{x}": "mlp.gate_up_proj.weight" for x in ("gate_proj", "up")},
    ),
    "granite": Family(
        "GraniteForCausalLM",
        fields={
            "attention_multiplier": "query_scale", "residual_multiplier": "residual_scale",
            "embedding_multiplier": "embed_scale", "logits_scaling": "logit_divisor",
        },
    ),
}  # fmt: skip
# Models around a language model, such as Gemma 3 with images, and the family of that part, where they do not name it.
WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "ministral3"}


def family_of(settings: Mapping[str, Any], source: str, families: Mapping[str, Family]) -> Family:
    """Return the family that config.json names.

    Raises:
      ValueError: another one.
    """
    name = settings.get("model_type")
    name = WRAPPERS.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in families:
        raise ValueError(
            f"{source}: model_type {name!r} is not supported, only {', '.join(families)}, and those that families=... gives."
        )
    return families[name]


def modules_of(settings: Mapping[str, Any]) -> str:
    """Return what the names of a language model's modules begin with in transformers, for a config.json."""
    return "model.language_model." if settings.get("model_type") in WRAPPERS else "model."


def families_like(c: DecoderConfig) -> Iterator[tuple[str, Family]]:
    """List the families of FAMILIES whose layers have the parameters of a decoder's, with their names."""
    traits = ("qk_norm", "qk_norm_over_heads", "qkv_bias", "pre_norms", "post_norms")
    for name, family in FAMILIES.items():
        alike = all(getattr(family, trait) == getattr(c.block, trait) for trait in traits)
        if alike and ("num_experts" in family.reads) == (c.block.experts is not None):
            yield name, family


class Tensor(NamedTuple):
    """One parameter, or one layer's part of it, here and in a checkpoint; a matrix is stored [out, in] there.

    Attributes:
      path: of our parameter within a `Decoder`.
      at: which part of a stacked parameter: the number of the layer, and of the expert if it is one's; () outside the layers.
      name: in the checkpoint, after the prefix of the language model.
      theirs: the shape in the checkpoint.
      first: the first row of the checkpoint's tensor that is the parameter's, where several parameters share the tensor.
    """

    path: str
    at: tuple[int, ...]
    name: str
    theirs: tuple[int, ...]
    ours: tuple[int, ...]
    transposed: bool
    first: int = 0

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of the rows of the checkpoint's tensor that are the parameter's."""
        return (math.prod(self.ours) // math.prod(self.theirs[1:]), *self.theirs[1:])

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Return a checkpoint's tensor as ours; a view."""
        tensor = tensor[self.first : self.first + self.part[0]]
        return (tensor.T if self.transposed else tensor).reshape(self.ours)

    def write(self, array: np.ndarray) -> np.ndarray:
        """Undo `read`: return the parameter's rows of the checkpoint's tensor."""
        return np.ascontiguousarray(array.reshape(self.part[::-1]).T) if self.transposed else array.reshape(self.part)


def table(c: DecoderConfig, family: Family | None = None) -> Iterator[Tensor]:
    """List the tensors of a checkpoint of this config; parameters that share a tensor follow each other.

    Args:
      family: of the checkpoint; the first one of FAMILIES that is like the decoder if it is not given.
    """
    b, vocab = c.block, c.vocab_size
    family = family or next((family for _, family in families_like(c)), FAMILIES["llama"])
    width, heads, kv_heads, dim, mlp = b.width, b.heads, b.kv_heads, b.head_dim, b.mlp_width

    def vector(path: str, *shape: int) -> Tensor:
        return Tensor(path, (), family.name(path), (math.prod(shape),), shape, False)

    def matrix(path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
        return Tensor(path, (), family.name(path), (math.prod(outputs), math.prod(inputs)), (*inputs, *outputs), True)

    yield Tensor("embed", (), family.name("embed"), (vocab, width), (vocab, width), False)
    yield vector("norm/scale", width)
    if not c.tie_embeddings:
        yield matrix("head", (width,), (vocab,))
    layer = [
        matrix("attn/q", (width,), (heads, dim)),
        matrix("attn/k", (width,), (kv_heads, dim)),
        matrix("attn/v", (width,), (kv_heads, dim)),
        matrix("attn/o", (heads, dim), (width,)),
        matrix("mlp/gate_proj", (width,), (mlp,)),
        matrix("mlp/up", (width,), (mlp,)),
        matrix("mlp/down", (mlp,), (width,)),
    ]
    if b.pre_norms:
        layer += [vector("attn_norm/scale", width), vector("mlp_norm/scale", width)]
    if b.post_norms:
        layer += [vector("attn_post_norm/scale", width), vector("mlp_post_norm/scale", width)]
    if b.qk_norm:
        of_q, of_k = (heads, kv_heads) if b.qk_norm_over_heads else (1, 1)
        layer += [vector("attn/q_norm/scale", of_q * dim), vector("attn/k_norm/scale", of_k * dim)]
    if b.qkv_bias:
        layer += [vector(f"attn/{x}_bias", count, dim) for x, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
    if b.experts:
        layer.append(matrix("mlp/gate", (width,), (b.experts.count,)))
    layer = list(itertools.chain.from_iterable(map(_side_by_side, itertools.groupby(layer, lambda t: t.name))))
    for i in range(c.num_layers):
        for t in layer:
            whole = t._replace(path=f"stack/blocks/{t.path}", at=(i,), name=family.layer.format(i) + t.name)
            if b.experts is None or "{}" not in t.name:
                yield whole
            else:
                yield from (whole._replace(at=(i, x), name=whole.name.format(x)) for x in range(b.experts.count))


def _side_by_side(named: tuple[str, Iterator[Tensor]]) -> Iterator[Tensor]:
    """Return the tensors of one name as parts of one tensor."""
    tensors = list(named[1])
    rows = [t.theirs[0] for t in tensors]
    for t, before in zip(tensors, itertools.accumulate(rows, initial=0), strict=False):
        yield t._replace(theirs=(sum(rows), *t.theirs[1:]), first=before)
