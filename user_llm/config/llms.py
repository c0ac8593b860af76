"""Open LLMs by name: the model on the hub, and what its config.json says, so that shapes are known without a download.

The settings are those of the models' pages on huggingface.co; what is not said here is the family's default in transformers.
"""

from typing import Any

GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 262_144, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 512, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 40_960,
}  # fmt: skip
LLAMA3 = {
    "model_type": "llama", "vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 131_072,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_270m": ("google/gemma-3-270m", GEMMA3 | {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    }),
    "gemma3_1b": ("google/gemma-3-1b-pt", GEMMA3 | {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
    }),
    "gemma3_4b": ("google/gemma-3-4b-pt", GEMMA3 | {  # with images, of which nothing is read
        "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 262_208, "sliding_window": 1024, "max_position_embeddings": 131_072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }),
    "qwen3_0_6b": ("Qwen/Qwen3-0.6B", QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    }),
    "qwen3_8b": ("Qwen/Qwen3-8B", QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    }),
    "llama3_2_1b": ("meta-llama/Llama-3.2-1B", LLAMA3 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True,
    }),
    "llama3_1_8b": ("meta-llama/Llama-3.1-8B", LLAMA3 | {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "head_dim": 128,
        "rope_scaling": LLAMA3_ROPE | {"factor": 8.0}, "tie_word_embeddings": False,
    }),
    "smollm2_135m": ("HuggingFaceTB/SmolLM2-135M", {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 1e5, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }),
    "smollm3_3b": ("HuggingFaceTB/SmolLM3-3B-Base", {
        "model_type": "smollm3", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "rope_theta": 5e6, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "max_position_embeddings": 65_536, "tie_word_embeddings": True,
    }),
    "mistral_7b": ("mistralai/Mistral-7B-v0.3", {
        "model_type": "mistral", "vocab_size": 32_768, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None, "rope_theta": 1e6,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 32_768, "tie_word_embeddings": False,
    }),
    "ministral3_3b": ("mistralai/Ministral-3-3B-Base-2512", {  # with images, of which nothing is read
        "model_type": "ministral3", "vocab_size": 131_072, "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 262_144, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    }),
    "gemma2_2b": ("google/gemma-2-2b", {
        "model_type": "gemma2", "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }),
    "olmo2_1b": ("allenai/OLMo-2-0425-1B", {
        "model_type": "olmo2", "vocab_size": 100_352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "rope_theta": 5e5, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }),
    "phi3_mini": ("microsoft/Phi-3-mini-4k-instruct", {
        "model_type": "phi3", "vocab_size": 32_064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047, "rope_theta": 1e4, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }),
    "granite3_3_2b": ("ibm-granite/granite-3.3-2b-base", {
        "model_type": "granite", "vocab_size": 49_159, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "logits_scaling": 8.0, "rope_theta": 1e7, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 131_072, "tie_word_embeddings": True,
    }),
    "qwen3_30b_a3b": ("Qwen/Qwen3-30B-A3B", QWEN3 | {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }),
}  # fmt: skip
