"""What is done with every key of a ``config.json``: read, of one value only, without effect on
what the model computes, or not known and therefore told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_kvshare.errors import Fault
from megatron_kvshare.rope import ROPE_SETTINGS

MODEL_TYPE, LLAMA, MISTRAL, LCKV = "kvshare", "llama", "mistral", "lckv-llama"


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


_READ = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps initializer_range "
    "tie_word_embeddings rope_theta rope_scaling rope_parameters "
    "original_max_position_embeddings quantization_config"
)
_READ_OF = {
    MODEL_TYPE: "kv_source_layers kv_windowed_layers kv_window_size kv_prefill iter_start "
    "iter_stride iter_forward_passes iter_backward_passes iter_project_at_use",
    LLAMA: "",
    MISTRAL: "sliding_window layer_types",
    LCKV: "layer_types forward_passes backward_passes sliding_window",
}
READ = {kind: _keys(f"{_READ} {keys}") for kind, keys in _READ_OF.items()}

ROPE_READ = _keys("rope_theta rope_type type partial_rotary_factor").union(
    *(theirs.values() for theirs in ROPE_SETTINGS.values())
)
"""The same inside ``rope_parameters`` and ``rope_scaling``."""

_OFF = (False, None)
_NOTHING = (None, 0, 0.0, False)
_ONE = (None, 1, 1.0)
ONE_VALUE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "mlp_hidden_act": ("silu", None),
    "hidden_activation": ("silu", None),
    "partial_rotary_factor": _ONE,
    "rotary_pct": _ONE,
    "position_embedding_type": (None, "rope"),
    "norm_type": (None, "rms", "rmsnorm", "rms_norm"),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "transformers_weights": (None,),
    # Of no meaning to a Llama, but the caches of transformers heed them.
    "sliding_window": (None,),
    "layer_types": (None,),
    "use_sequential": _OFF,
    "force_nodiag": _OFF,
    **dict.fromkeys(
        _keys(
            "attention_bias mlp_bias qkv_bias use_bias bias attention_out_bias attn_output_bias "
            "o_proj_bias add_bias_linear add_qkv_bias use_qk_norm qk_norm qk_layernorm "
            "use_sliding_window alibi parallel_attn use_parallel_residual parallel_residual "
            "is_encoder_decoder add_cross_attention rope_interleaved multi_query "
            "scale_attn_by_inverse_layer_idx attention_sink use_attention_sinks"
        ),
        _OFF,
    ),
    **dict.fromkeys(
        _keys(
            "attn_logit_softcapping final_logit_softcapping logit_softcapping "
            "query_pre_attn_scalar attention_multiplier clip_qkv attention_chunk_size "
            "attention_window no_rope_layers "
            "no_rope_layer_interval rope_local_base_freq scale_depth dim_model_base num_experts "
            "num_local_experts n_routed_experts num_experts_per_tok moe_intermediate_size "
            "num_nextn_predict_layers num_kv_shared_layers cross_layer_attention_factor "
            "q_lora_rank kv_lora_rank cache_layer_indices tie_layers"
        ),
        _NOTHING,
    ),
    **dict.fromkeys(
        _keys(
            "embedding_multiplier residual_multiplier logits_scaling logit_scale scale_emb "
            "attn_scale query_scale"
        ),
        _ONE,
    ),
}
"""Keys that change what a model computes, here or in models that resemble a Llama, and the values
with which it is the one that is built here."""

TRAINING_ONLY = _keys(
    "attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout hidden_dropout_prob "
    "residual_dropout residual_dropout_prob classifier_dropout layerdrop dropout "
    "output_router_logits router_aux_loss_coef z_loss_coefficient"
)
"""Keys that change training only; it does without them here."""

HARMLESS = _keys(
    # names, versions, types, tokens
    "architectures name_or_path transformers_version torch_dtype dtype auto_map use_cache "
    "pretraining_tp tokenizer_class prefix task_specific_params finetuning_task torchscript "
    "attn_implementation use_bfloat16 tf_legacy_loss cross_attention_hidden_size is_decoder "
    "unsloth_version unsloth_fixed ignore_keys_at_rope_validation gradient_checkpointing "
    "model_max_length bos_token_id eos_token_id pad_token_id sep_token_id "
    "decoder_start_token_id unk_token_id "
    # heads for other tasks, outputs beside logits, chunks of the same computation
    "num_labels id2label label2id problem_type output_hidden_states output_attentions "
    "return_dict chunk_size_feed_forward tie_encoder_decoder tie_last_hidden_states "
    "experts_implementation "
    # how text is generated
    "max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams "
    "temperature top_k top_p min_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens epsilon_cutoff eta_cutoff encoder_repetition_penalty "
    "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
    "assistant_lookbehind target_lookbehind num_beam_groups diversity_penalty"
)
"""Keys without effect on the logits; those that begin with an underscore are transformers' own."""


def value_faults(config: Mapping[str, Any]) -> list[Fault]:
    """Keys whose value makes another model than the one that is built here."""
    read = READ[config["model_type"]]
    return [
        Fault(
            f"config.json: {key}",
            config[key],
            f"the model here is built with {ONE_VALUE[key][0]!r} only",
            "this model cannot be imported",
        )
        for key, value in config.items()
        if key in ONE_VALUE and key not in read and not _among(value, ONE_VALUE[key])
    ]


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    """As in JSON, where true is not 1; a list of layers' kinds may name full attention."""
    if isinstance(value, list):
        return set(map(str, value)) == {"full_attention"}
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed
    )


def doubts(config: Mapping[str, Any]) -> list[str]:
    """What is not taken over, and may matter."""
    kind = config["model_type"]
    known = READ[kind] | ONE_VALUE.keys() | HARMLESS | TRAINING_ONLY
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    for name in ("rope_parameters", "rope_scaling"):
        inside = config.get(name) or {}
        unknown += [f"{name}.{key}" for key in inside if key not in ROPE_READ]
    dropped = [key for key in sorted(TRAINING_ONLY) if config.get(key) not in _NOTHING]
    lines = []
    if unknown:
        lines.append(
            f"config.json: {', '.join(unknown)}: not known here and not read; if one of these "
            "changes what the model computes, the result is another model"
        )
    if dropped:
        given = ", ".join(f"{key} = {config[key]!r}" for key in dropped)
        lines.append(f"config.json: {given}: training goes without it here")
    return lines
