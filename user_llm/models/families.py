"""The open decoder families as their checkpoints name them: Llama (and SmolLM2), Qwen2.5, Qwen3 and Gemma 3.

A family is what sets its checkpoints apart from Llama's: a few fields of our DecoderConfig, and names of tensors. A table says for
each of our parameters the checkpoint's name, its shape there and its shape here. The settings of a checkpoint are read in
`models/config_json.py`.
"""

import dataclasses
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
      qk_norm, qkv_bias, post_norms, norm_offset: of `BlockConfig`.
      scaled_embeddings: whether embeddings are multiplied by the square root of their width.
      activation: the key of config.json that names the activation.
      query_scale: the key of config.json whose value to the power of -1/2 scales queries; None for the head's size.
      names: what a checkpoint calls our parameters, where it is not as in LLAMA_NAMES.
      layer: what the names of a layer's tensors begin with; {} stands for the layer's number.
      defaults: settings for which config.json may say nothing; None where transformers knows the family and completes them.

    Raises:
      ValueError: `names` has what is no parameter of a decoder, or lacks one that has no name in LLAMA_NAMES.
    """

    architecture: str
    qk_norm: bool = False
    qkv_bias: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    activation: str = "hidden_act"
    query_scale: str | None = None
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
    "mlp/gate_proj": "mlp.gate_proj.weight",
    "mlp/up": "mlp.up_proj.weight",
    "mlp/down": "mlp.down_proj.weight",
}
POST_NORMS = ("attn_post_norm/scale", "mlp_post_norm/scale")
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", qk_norm=True, post_norms=True, norm_offset=1.0, scaled_embeddings=True,
        activation="hidden_activation", query_scale="query_pre_attn_scalar",
        names={
            "mlp_norm/scale": "pre_feedforward_layernorm.weight",
            "attn_post_norm/scale": "post_attention_layernorm.weight",
            "mlp_post_norm/scale": "post_feedforward_layernorm.weight",
        },
    ),
}  # fmt: skip
# Models around a language model, such as Gemma 3 with images, and the family of that part.
WRAPPERS = {"gemma3": "gemma3_text"}


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


def family_like(c: DecoderConfig) -> tuple[str, Family]:
    """Return the family of FAMILIES whose blocks are like those of a decoder, and its name."""
    b = c.block
    traits = (b.qk_norm, b.qkv_bias, b.post_norms)
    found = ((name, of) for name, of in FAMILIES.items() if (of.qk_norm, of.qkv_bias, of.post_norms) == traits)
    return next(found, ("llama", FAMILIES["llama"]))


class Tensor(NamedTuple):
    """One parameter, or one layer's part of it, here and in a checkpoint; a matrix is stored [out, in] there.

    Attributes:
      path: of our parameter within a `Decoder`.
      layer: which part of a stacked parameter; None for a parameter outside the layers.
      name: in the checkpoint, after the prefix of the language model.
    """

    path: str
    layer: int | None
    name: str
    theirs: tuple[int, ...]
    ours: tuple[int, ...]
    transposed: bool

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Return a checkpoint's tensor as ours; a view."""
        return (tensor.T if self.transposed else tensor).reshape(self.ours)

    def write(self, array: np.ndarray) -> np.ndarray:
        """Undo `read`."""
        return np.ascontiguousarray(array.reshape(self.theirs[::-1]).T) if self.transposed else array.reshape(self.theirs)


def table(c: DecoderConfig, family: Family | None = None) -> Iterator[Tensor]:
    """List the tensors of a checkpoint of this config.

    Args:
      family: of the checkpoint; the one of FAMILIES that is like the decoder if it is not given.
    """
    b, vocab, family = c.block, c.vocab_size, family or family_like(c)[1]
    width, heads, kv_heads, dim, mlp = b.width, b.heads, b.kv_heads, b.head_dim, b.mlp_width

    def vector(path: str, *shape: int) -> Tensor:
        return Tensor(path, None, family.name(path), (math.prod(shape),), shape, False)

    def matrix(path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
        return Tensor(path, None, family.name(path), (math.prod(outputs), math.prod(inputs)), (*inputs, *outputs), True)

    yield Tensor("embed", None, family.name("embed"), (vocab, width), (vocab, width), False)
    yield vector("norm/scale", width)
    if not c.tie_embeddings:
        yield matrix("head", (width,), (vocab,))
    layer = [
        vector("attn_norm/scale", width),
        matrix("attn/q", (width,), (heads, dim)),
        matrix("attn/k", (width,), (kv_heads, dim)),
        matrix("attn/v", (width,), (kv_heads, dim)),
        matrix("attn/o", (heads, dim), (width,)),
        vector("mlp_norm/scale", width),
        matrix("mlp/gate_proj", (width,), (mlp,)),
        matrix("mlp/up", (width,), (mlp,)),
        matrix("mlp/down", (mlp,), (width,)),
    ]
    if b.post_norms:
        layer += [vector("attn_post_norm/scale", width), vector("mlp_post_norm/scale", width)]
    if b.qk_norm:
        layer += [vector(f"attn/{x}_norm/scale", dim) for x in "qk"]
    if b.qkv_bias:
        layer += [vector(f"attn/{x}_bias", count, dim) for x, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
    for i in range(c.num_layers):
        for t in layer:
            yield t._replace(path=f"stack/blocks/{t.path}", layer=i, name=family.layer.format(i) + t.name)
