"""A User-LLM with gated cross-attention as a model of vLLM: a plugin of the entry point `vllm.general_plugins`.

    pip install --no-deps user_llm    # in the environment of vLLM
    vllm serve DIR --enable-mm-embeds --hf-overrides '{"architectures": ["UserLLM"], "is_encoder_decoder": true}'

DIR is written by `python -m user_llm.export`. To vLLM the LLM is the decoder of an encoder-decoder model, and a user is what the
encoder has computed: a request gives the user tokens as embeddings of an image (`vllm.conversation`). vLLM computes the keys and
values of a user in the first step of a request and keeps them in its cache for cross-attention, as it does for speech. It caches no
prefixes for such models, so that nothing of one user can be read for another.

This file is loaded by vLLM. It imports neither jax nor the rest of the package. Left out: LLMs of other families than Llama's,
tensor parallelism, cross-attention before a layer, and models without a resampler, whose cross-attention has a bias for each event.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.cross_attention import CrossAttention
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseProcessingInfo,
    EncDecMultiModalProcessor,
    PromptReplacement,
)

PREFIX = "decoder/stack/cross/"  # of the names of cross-attention's weights, which are stacked layer by layer


def read_sizes(directory: str) -> dict[str, Any]:
    """Return the sizes of a model from its directory: `UserLLMConfig` as a dict.

    Raises:
      ValueError: the model cannot be served by this plugin.
    """
    sizes = json.loads((Path(directory) / "user_llm.json").read_text())["model"]
    cross = sizes["decoder"]["cross"]
    if cross is None or sizes["soft_prompt"] or sizes["resampler"] is None or cross["recency_buckets"]:
        raise ValueError(f"{directory}: this plugin serves models with cross-attention alone and a resampler.")
    if cross["seat"] != "after_attention":
        raise ValueError(f"{directory}: this plugin serves cross-attention after self-attention, and not {cross['seat']}.")
    return sizes


def num_tokens(sizes: dict[str, Any]) -> int:
    """Return the number of tokens of a user with events, as `UserLLMConfig.num_tokens` does."""
    return sizes["resampler"]["num_latents"] + sizes.get("residual", False)


class GatedCrossAttention(nn.Module):
    """x + tanh(gate) * attention(norm(x), user tokens); x alone for a request without a user."""

    def __init__(self, vllm_config: VllmConfig, sizes: Mapping[str, Any], prefix: str):
        super().__init__()
        cross, block = sizes["decoder"]["cross"], sizes["decoder"]["block"]
        self.heads, self.head_dim, self.eps = cross["heads"], cross["head_dim"], block["norm_eps"]
        width, shape = block["width"], (cross["heads"], cross["head_dim"])
        empty = lambda *sizes: nn.Parameter(torch.empty(sizes), requires_grad=False)  # noqa: E731
        self.norm, self.gate = empty(width), empty()
        self.q, self.k, self.v = empty(width, *shape), empty(cross["user_width"], *shape), empty(cross["user_width"], *shape)
        self.o = empty(*shape, width)
        self.attn = CrossAttention(
            self.heads, self.head_dim, self.head_dim**-0.5, num_kv_heads=self.heads, cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, x: torch.Tensor, users: torch.Tensor | None) -> torch.Tensor:
        """Return x [T, D] of the tokens of all requests, which have seen their users.

        Args:
          users: user tokens [M, U] of the requests that begin in this step, one after another; None if none does.
        """
        normed = nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.norm
        query = torch.einsum("td,dnh->tnh", normed, self.q)
        key, value = (None if users is None else torch.einsum("mu,unh->mnh", users, w) for w in (self.k, self.v))
        out = self.attn(query.flatten(1), *(None if part is None else part.flatten(1) for part in (key, value)))
        out = torch.einsum("tnh,nhd->td", out.view(-1, self.heads, self.head_dim), self.o)
        metadata = get_forward_context().attn_metadata
        if metadata:  # none while vLLM measures its memory
            of = metadata[self.attn.layer_name]
            counts = of.query_start_loc.diff()
            sees = torch.repeat_interleave(of.seq_lens[: len(counts)] > 0, counts)
            out = torch.where(nn.functional.pad(sees, (0, len(out) - len(sees)))[:, None], out, 0.0)
        return x + torch.tanh(self.gate).to(x.dtype) * out


class UserLayer(LlamaDecoderLayer):
    """A layer of the LLM; the last one of each group of `every` has cross-attention between its two branches."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **settings: Any):
        super().__init__(vllm_config, prefix, **settings)
        sizes = read_sizes(vllm_config.model_config.model)
        has = (extract_layer_index(prefix) + 1) % sizes["decoder"]["cross"]["every"] == 0
        self.cross = GatedCrossAttention(vllm_config, sizes, f"{prefix}.cross") if has else None

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        users: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            x, normed = hidden_states, self.input_layernorm(hidden_states)
        else:
            normed, x = self.input_layernorm(hidden_states, residual)
        x = x + self.self_attn(positions=positions, hidden_states=normed)
        if self.cross is not None:
            x = self.cross(x, users)
        return self.mlp(self.post_attention_layernorm(x)), x


class UserInfo(BaseProcessingInfo):
    """One user at most for each request."""

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of the model."""
        return read_sizes(self.ctx.model_config.model)

    @property
    def skip_prompt_length_check(self) -> bool:
        return True  # the prompt of the encoder is made here

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": num_tokens(self.sizes)}

    def get_data_parser(self) -> MultiModalDataParser:
        return MultiModalDataParser(expected_hidden_size=self.sizes["decoder"]["cross"]["user_width"])


class UserDummyInputs(BaseDummyInputsBuilder[UserInfo]):
    """The largest user, by which vLLM measures its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        sizes = self.info.sizes
        return {"image": torch.zeros(mm_counts.get("image", 0), num_tokens(sizes), sizes["decoder"]["cross"]["user_width"])}


class UserProcessor(EncDecMultiModalProcessor[UserInfo]):
    """User tokens go to the model as they are; the prompt is the decoder's."""

    skip_decoder_start_token = True

    def create_encoder_prompt(self, prompt: Any, mm_items: Any) -> list[int]:
        return [0] if mm_items.get_all_counts().get("image") else []

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        return {"image_embeds": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        size = lambda item: [0] * mm_items["image"].get_feature_size(item)  # noqa: E731
        return [PromptReplacement(modality="image", target=[0], replacement=size)]


@MULTIMODAL_REGISTRY.register_processor(UserProcessor, info=UserInfo, dummy_inputs=UserDummyInputs)
class UserLLM(LlamaForCausalLM, SupportsMultiModal):
    """The LLM with cross-attention to the user of each request."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        if (family := vllm_config.model_config.hf_config.model_type) != "llama":
            raise ValueError(f"This plugin serves LLMs of the family llama, and not of {family}.")
        if get_tensor_model_parallel_world_size() > 1:
            raise ValueError("This plugin does not split cross-attention: serve with --tensor-parallel-size=1.")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=UserLayer)
        self.directory = Path(vllm_config.model_config.model)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None  # a user is no part of the text

    def get_language_model(self) -> nn.Module:
        return self

    def embed_multimodal(self, **kwargs: Any) -> Any:
        return list(kwargs["image_embeds"]) if kwargs.get("image_embeds") is not None else []

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: Sequence[torch.Tensor] = (),
        **kwargs: Any,
    ) -> Any:
        users = torch.cat(list(encoder_outputs)).to(self.model.norm.weight.dtype) if len(encoder_outputs) else None
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, users=users)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        side = load_file(self.directory / "user_llm.safetensors")
        layers = [layer for layer in self.model.layers if layer.cross is not None]
        for group, layer in enumerate(layers):
            for name, parameter in layer.cross.named_parameters():
                path = f"{PREFIX}norm/scale" if name == "norm" else f"{PREFIX}{name}"
                parameter.data.copy_(side[path][group])
        return loaded | {name for name, _ in self.named_parameters() if ".cross." in name}


def register() -> None:
    """Make the model known to vLLM; it calls this as it starts."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("UserLLM", "user_llm.serving.engines.vllm_plugin:UserLLM")
