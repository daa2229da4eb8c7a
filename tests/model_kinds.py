"""Tiny random models of the families that people bring."""

from transformers import AutoConfig

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
HEAD = {"head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "gpt_neox": SMALL,
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 96, "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "phi3": {**SMALL, "rope_scaling": None},
    "llama": SMALL,
    "smollm3": {**SMALL, "no_rope_layers": [1, 0]},
    "mistral": {**SMALL, "sliding_window": 8},
    "cohere2": {
        **SMALL, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma2": {**SMALL, **HEAD, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SMALL, **HEAD, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "qwen2": SMALL,
    "qwen3": {**SMALL, **HEAD},
    "granite": {**SMALL, "logits_scaling": 4.0},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, **HEAD, **MOE, "num_experts": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "lfm2": {**SMALL, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "lru_width": 32, "attention_window_size": 16,
    },
}  # fmt: skip
"""model_type -> fields of its config."""


def tiny_config(model_type: str, tokenizer, more_embeddings: int = 0):
    """The config of a family, with the tokenizer's vocabulary."""
    return AutoConfig.for_model(
        model_type,
        **FAMILIES[model_type],
        vocab_size=len(tokenizer) + more_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
