"""What is particular to each Hugging Face model_type, as data.

A `Family` says how the keys of config.json map to `ModelConfig`, which values of other keys we
support, and where each of our parameters is found in a checkpoint. The rules that read this data
are in llm_jax/models/families.py; there is no code per family.

Sources: the configuration and modelling files of the `transformers` library (5.x; keys that 4.x
wrote are understood too), and the model cards of the families.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a checkpoint keeps one of our parameters.

    name: tensor name without the model prefix; {layer} stands for the index in a stacked leaf, {expert}
        for that of an expert in a leaf that leads with layers and experts.
    part, parts: which of `parts` equal pieces of the output axis (GPT-2 fuses q, k and v).
    transposed: stored [in, out] instead of [out, in] (GPT-2's Conv1D).
    """

    name: str
    part: int = 0
    parts: int = 1
    transposed: bool = False

    @property
    def stacked(self) -> int:
        """How many leading axes of our parameter a checkpoint has as separate tensors."""
        return ("{layer}" in self.name) + ("{expert}" in self.name)

    def tensor(self, index: Sequence[int]) -> str:
        """The name with the index, of `stacked` numbers, filled in."""
        return self.name.format(**dict(zip(("layer", "expert"), index, strict=False)))


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    keys: ModelConfig field -> config.json key, values taken over (activations by ACTIVATIONS).
    aliases: other names of keys -> those in `keys`.
    defaults: config.json key -> what transformers takes when the key is absent.
    fixed: ModelConfig fields that are the same for the whole family.
    supported: config.json key -> the values that mean what we compute; any other is refused.
    harmless: further config.json keys that do not change inference.
    architectures: head -> class name; the first of a head is the one that export writes.
    prefix: what stands before trunk names in a checkpoint with a head; `other_prefixes` are read too.
    trunk, heads: our parameter path -> Source; `heads` by head, without prefix. "untied HEAD" says
        what differs when the embedding is not tied.
    copies: name of a tensor that repeats another -> that other one (tied weights).
    renames: endings that old checkpoints used -> today's.
    spare: beginnings of tensor names that belong to parts we leave out, said in the log.
    """

    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    architectures: tuple[tuple[str, str], ...]
    prefix: str
    trunk: Mapping[str, Source]
    heads: Mapping[str, Mapping[str, Source]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    supported: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    other_prefixes: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spare: tuple[str, ...] = ()


# config.json name -> ours. The tanh forms are one formula under several names.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# Keys of any config.json that do not change what a loaded model computes in inference.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attention_dropout attention_probs_dropout_prob attn_implementation attn_pdrop bos_token_id
    cache_implementation chunk_size_feed_forward classifier_dropout dtype embd_pdrop eos_token_id
    finetuning_task gradient_checkpointing id2label initializer_range label2id language model_type
    name_or_path num_labels output_attentions output_hidden_states output_past pad_token_id prefix
    pretraining_tp problem_type return_dict sep_token_id task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version use_bfloat16 use_cache use_return_dict
    begin_suppress_tokens bad_words_ids decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    tf_legacy_loss top_k top_p typical_p cross_attention_hidden_size
    """.split()
)

# Values of general keys that mean what we compute.
SUPPORTED: Mapping[str, tuple] = {
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "position_embedding_type": ("absolute", None),
    "pruned_heads": ({}, [], None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (1, None),
    "per_layer_config": ({}, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "use_bidirectional_attention": (False, None),
    "tie_last_hidden_states": (True, False, None),  # moves a name, not a number
}


def _paths(table: Mapping[str, str], **options: Any) -> dict[str, Source]:
    return {path: Source(name, **options) for path, name in table.items()}


def _linear(path: str, bias: str, name: str, **options: Any) -> dict[str, Source]:
    """Weight and bias of one dense layer."""
    return {
        path: Source(f"{name}.weight", **options),
        bias: Source(f"{name}.bias", **{k: v for k, v in options.items() if k != "transposed"}),
    }


def _norm(path: str, name: str) -> dict[str, Source]:
    return _paths({f"{path}/scale": f"{name}.weight", f"{path}/bias": f"{name}.bias"})


def _decoder_architectures(stem: str) -> tuple[tuple[str, str], ...]:
    return (
        ("lm", f"{stem}ForCausalLM"),
        ("embedding", f"{stem}Model"),
        ("classifier", f"{stem}ForSequenceClassification"),
    )


# --- Llama and its relatives ---------------------------------------------------------------------

_LAYER = "layers.{layer}"
_LLAMA_TRUNK = {
    **_paths({"embed/tokens": "embed_tokens.weight", "norm/scale": "norm.weight"}),
    **_linear("layers/attn/wq", "layers/attn/bq", f"{_LAYER}.self_attn.q_proj"),
    **_linear("layers/attn/wk", "layers/attn/bk", f"{_LAYER}.self_attn.k_proj"),
    **_linear("layers/attn/wv", "layers/attn/bv", f"{_LAYER}.self_attn.v_proj"),
    **_linear("layers/attn/wo", "layers/attn/bo", f"{_LAYER}.self_attn.o_proj"),
    **_linear("layers/mlp/gate", "layers/mlp/gate_bias", f"{_LAYER}.mlp.gate_proj"),
    **_linear("layers/mlp/up", "layers/mlp/up_bias", f"{_LAYER}.mlp.up_proj"),
    **_linear("layers/mlp/down", "layers/mlp/down_bias", f"{_LAYER}.mlp.down_proj"),
    **_paths(
        {
            "layers/attn/q_norm/scale": f"{_LAYER}.self_attn.q_norm.weight",
            "layers/attn/k_norm/scale": f"{_LAYER}.self_attn.k_norm.weight",
            "layers/attn_norm/scale": f"{_LAYER}.input_layernorm.weight",
            "layers/mlp_norm/scale": f"{_LAYER}.post_attention_layernorm.weight",
        }
    ),
}
_GEMMA_TRUNK = _LLAMA_TRUNK | _paths(
    {
        "layers/attn_post_norm/scale": f"{_LAYER}.post_attention_layernorm.weight",
        "layers/mlp_norm/scale": f"{_LAYER}.pre_feedforward_layernorm.weight",
        "layers/mlp_post_norm/scale": f"{_LAYER}.post_feedforward_layernorm.weight",
    }
)
_DECODER_HEADS = {
    "lm": _paths({"lm_head/weight": "lm_head.weight"}),
    "classifier": _paths({"classifier/weight": "score.weight"}),
    "embedding": {},
}
_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "tie_embeddings": "tie_word_embeddings",
    "rope_theta": "rope_theta",
}
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # = num_attention_heads
    "head_dim": None,  # = hidden_size / num_attention_heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
}
_QWEN_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_LLAMA_FIXED = {
    "positions": "rope",
    "norm": "rms",
    "norm_position": "pre",
    "gated_mlp": True,
}
_LLAMA_PARTS: dict[str, Any] = {
    "prefix": "model.",
    "heads": _DECODER_HEADS,
    "buffers": (
        r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"rotary_emb\.inv_freq",
    ),
    "copies": {"lm_head.weight": "embed_tokens.weight"},
}

# --- Mixtures of experts -------------------------------------------------------------------------


def _experts(module: str, gate: str, up: str, down: str) -> dict[str, Source]:
    """Llama's parameters with a router and experts in place of its feed-forward layer."""
    dense = {path: source for path, source in _LLAMA_TRUNK.items() if "/mlp/" not in path}
    names = {"gate": gate, "up": up, "down": down}
    own = {f"layers/moe/{ours}": f"{module}.experts.{{expert}}.{name}" for ours, name in names.items()}
    return dense | _paths({"layers/moe/router": f"{module}.gate.weight", **own})


_MIXTRAL_TRUNK = _experts(f"{_LAYER}.block_sparse_moe", "w1.weight", "w3.weight", "w2.weight")
_QWEN3_MOE_TRUNK = _experts(f"{_LAYER}.mlp", "gate_proj.weight", "up_proj.weight", "down_proj.weight")
_EXPERT_KEYS = {"experts_per_token": "num_experts_per_tok", "router_aux_loss": "router_aux_loss_coef"}

_GEMMA_KEYS = _LLAMA_KEYS | _ATTENTION_BIAS
_GEMMA_KEYS = _GEMMA_KEYS | {
    "activation": "hidden_activation",
    "attn_scale": "query_pre_attn_scalar",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}
_GEMMA2_DEFAULTS = _LLAMA_DEFAULTS | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,  # every second layer is full
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3_DEFAULTS = _GEMMA2_DEFAULTS | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
_GEMMA_FIXED = {
    "positions": "rope",
    "norm": "rms",
    "norm_position": "sandwich",
    "norm_plus_one": True,
    "gated_mlp": True,
    "embed_scale": True,
}

# --- GPT-2 ---------------------------------------------------------------------------------------

_H = "h.{layer}"
_GPT2_TRUNK = {
    **_paths({"embed/tokens": "wte.weight", "embed/positions": "wpe.weight"}),
    **_norm("layers/attn_norm", f"{_H}.ln_1"),
    **_norm("layers/mlp_norm", f"{_H}.ln_2"),
    **_norm("norm", "ln_f"),
    **_linear(
        "layers/attn/wq",
        "layers/attn/bq",
        f"{_H}.attn.c_attn",
        part=0,
        parts=3,
        transposed=True,
    ),
    **_linear(
        "layers/attn/wk",
        "layers/attn/bk",
        f"{_H}.attn.c_attn",
        part=1,
        parts=3,
        transposed=True,
    ),
    **_linear(
        "layers/attn/wv",
        "layers/attn/bv",
        f"{_H}.attn.c_attn",
        part=2,
        parts=3,
        transposed=True,
    ),
    **_linear("layers/attn/wo", "layers/attn/bo", f"{_H}.attn.c_proj", transposed=True),
    **_linear("layers/mlp/up", "layers/mlp/up_bias", f"{_H}.mlp.c_fc", transposed=True),
    **_linear("layers/mlp/down", "layers/mlp/down_bias", f"{_H}.mlp.c_proj", transposed=True),
}

# --- BERT and RoBERTa ----------------------------------------------------------------------------

_E = "encoder.layer.{layer}"
_BERT_TRUNK = {
    **_paths(
        {
            "embed/tokens": "embeddings.word_embeddings.weight",
            "embed/positions": "embeddings.position_embeddings.weight",
            "embed/types": "embeddings.token_type_embeddings.weight",
        }
    ),
    **_norm("embed/norm", "embeddings.LayerNorm"),
    **_linear("layers/attn/wq", "layers/attn/bq", f"{_E}.attention.self.query"),
    **_linear("layers/attn/wk", "layers/attn/bk", f"{_E}.attention.self.key"),
    **_linear("layers/attn/wv", "layers/attn/bv", f"{_E}.attention.self.value"),
    **_linear("layers/attn/wo", "layers/attn/bo", f"{_E}.attention.output.dense"),
    **_norm("layers/attn_post_norm", f"{_E}.attention.output.LayerNorm"),
    **_linear("layers/mlp/up", "layers/mlp/up_bias", f"{_E}.intermediate.dense"),
    **_linear("layers/mlp/down", "layers/mlp/down_bias", f"{_E}.output.dense"),
    **_norm("layers/mlp_post_norm", f"{_E}.output.LayerNorm"),
    **_linear("pooler/weight", "pooler/bias", "pooler.dense"),
}
_BERT_HEADS = {
    "embedding": {},
    "masked_lm": {
        **_linear(
            "lm_head/transform",
            "lm_head/transform_bias",
            "cls.predictions.transform.dense",
        ),
        **_norm("lm_head/transform_norm", "cls.predictions.transform.LayerNorm"),
        **_paths(
            {
                "lm_head/weight": "cls.predictions.decoder.weight",
                "lm_head/bias": "cls.predictions.bias",
            }
        ),
    },
    "untied masked_lm": _paths({"lm_head/bias": "cls.predictions.decoder.bias"}),
    "classifier": _linear("classifier/weight", "classifier/bias", "classifier"),
    "span": _linear("span/weight", "span/bias", "qa_outputs"),
}
_ROBERTA_HEADS = {
    "embedding": {},
    "masked_lm": {
        **_linear("lm_head/transform", "lm_head/transform_bias", "lm_head.dense"),
        **_norm("lm_head/transform_norm", "lm_head.layer_norm"),
        **_paths({"lm_head/weight": "lm_head.decoder.weight", "lm_head/bias": "lm_head.bias"}),
    },
    "untied masked_lm": _paths({"lm_head/bias": "lm_head.decoder.bias"}),
    "classifier": {  # its dense layer is what BERT calls pooler
        **_linear("pooler/weight", "pooler/bias", "classifier.dense"),
        **_linear("classifier/weight", "classifier/bias", "classifier.out_proj"),
    },
    "span": _linear("span/weight", "span/bias", "qa_outputs"),
}
_BERT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
_ROBERTA_DEFAULTS = _BERT_DEFAULTS | {"vocab_size": 50265, "pad_token_id": 1}
_BERT_PARTS: dict[str, Any] = {
    "keys": {
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "embed_dim": "hidden_size",
        "num_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "token_types": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "hidden_dropout_prob",
    },
    "fixed": {
        "causal": False,
        "positions": "learned",
        "norm": "layer",
        "norm_position": "post",
        "embed_norm": True,
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "pooling": "cls",
    },
    "trunk": _BERT_TRUNK,
    "buffers": (r"embeddings\.position_ids", r"embeddings\.token_type_ids"),
    "renames": {
        "LayerNorm.gamma": "LayerNorm.weight",
        "LayerNorm.beta": "LayerNorm.bias",
    },
}
_ROBERTA_PARTS: dict[str, Any] = _BERT_PARTS | {
    "defaults": _ROBERTA_DEFAULTS,
    "prefix": "roberta.",
    "heads": _ROBERTA_HEADS,
    "copies": {
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    "spare": ("pooler.",),
}


def _encoder_architectures(stem: str) -> tuple[tuple[str, str], ...]:
    return (
        ("embedding", f"{stem}Model"),
        ("masked_lm", f"{stem}ForMaskedLM"),
        ("masked_lm", f"{stem}ForPreTraining"),
        ("classifier", f"{stem}ForSequenceClassification"),
        ("span", f"{stem}ForQuestionAnswering"),
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        keys={
            "vocab_size": "vocab_size",
            "num_layers": "n_layer",
            "embed_dim": "n_embd",
            "num_heads": "n_head",
            "mlp_dim": "n_inner",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
            "tie_embeddings": "tie_word_embeddings",
            "dropout": "resid_pdrop",
        },
        defaults={
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,  # = 4 n_embd
            "activation_function": "gelu_new",
            "resid_pdrop": 0.1,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        fixed={
            "positions": "learned",
            "norm": "layer",
            "norm_position": "pre",
            "gated_mlp": False,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
        },
        supported={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        harmless=frozenset(
            "n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout "
            "summary_proj_to_labels summary_type summary_use_proj".split()
        ),
        architectures=(
            ("lm", "GPT2LMHeadModel"),
            ("embedding", "GPT2Model"),
            ("classifier", "GPT2ForSequenceClassification"),
        ),
        prefix="transformer.",
        trunk=_GPT2_TRUNK,
        heads=_DECODER_HEADS,
        buffers=(r"h\.\d+\.attn\.(masked_)?bias",),  # the causal mask
        copies={"lm_head.weight": "wte.weight"},
    ),
    "llama": Family(
        keys=_LLAMA_KEYS | _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        defaults=_LLAMA_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
        fixed=_LLAMA_FIXED,
        architectures=_decoder_architectures("Llama"),
        trunk=_LLAMA_TRUNK,
        **_LLAMA_PARTS,
    ),
    "mistral": Family(
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        fixed=_LLAMA_FIXED,
        supported={"layer_types": (None,)},  # transformers does not read it for this model_type
        architectures=_decoder_architectures("Mistral"),
        trunk=_LLAMA_TRUNK,
        **_LLAMA_PARTS,
    ),
    "qwen2": Family(
        keys=_LLAMA_KEYS,
        defaults=_QWEN_DEFAULTS,
        fixed=_LLAMA_FIXED | {"qkv_bias": True},
        architectures=_decoder_architectures("Qwen2"),
        trunk=_LLAMA_TRUNK,
        **_LLAMA_PARTS,
    ),
    "qwen3": Family(
        keys=_LLAMA_KEYS | _ATTENTION_BIAS,
        defaults=_QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
        fixed=_LLAMA_FIXED | {"qk_norm": True},
        architectures=_decoder_architectures("Qwen3"),
        trunk=_LLAMA_TRUNK,
        **_LLAMA_PARTS,
    ),
    "mixtral": Family(
        keys=_LLAMA_KEYS | _EXPERT_KEYS | {"num_experts": "num_local_experts"},
        aliases={"num_experts": "num_local_experts"},
        defaults=_LLAMA_DEFAULTS
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        fixed=_LLAMA_FIXED | {"norm_expert_weights": True},
        supported={"layer_types": (None,), "router_jitter_noise": (0, None)},
        harmless=frozenset({"output_router_logits"}),
        architectures=_decoder_architectures("Mixtral"),
        trunk=_MIXTRAL_TRUNK,
        **_LLAMA_PARTS,
    ),
    "qwen3_moe": Family(
        keys=_LLAMA_KEYS
        | _ATTENTION_BIAS
        | _EXPERT_KEYS
        | {
            "mlp_dim": "moe_intermediate_size",
            "num_experts": "num_experts",
            "norm_expert_weights": "norm_topk_prob",
        },
        aliases={"num_local_experts": "num_experts"},
        defaults=_LLAMA_DEFAULTS
        | {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
            "use_sliding_window": False,
        },
        fixed=_LLAMA_FIXED | {"qk_norm": True},
        # Layers that differ, with and without experts or with and without a window, are not supported.
        supported={
            "decoder_sparse_step": (1, None),
            "mlp_only_layers": ([], None),
            "use_sliding_window": (False, None),
        },
        harmless=frozenset(
            "intermediate_size max_window_layers output_router_logits sliding_window".split()
        ),
        architectures=_decoder_architectures("Qwen3Moe"),
        trunk=_QWEN3_MOE_TRUNK,
        **_LLAMA_PARTS,
    ),
    "gemma2": Family(
        keys=_GEMMA_KEYS,
        defaults=_GEMMA2_DEFAULTS,
        fixed=_GEMMA_FIXED,
        harmless=frozenset({"hidden_act"}),  # hidden_activation rules
        architectures=_decoder_architectures("Gemma2"),
        trunk=_GEMMA_TRUNK,
        **_LLAMA_PARTS,
    ),
    "gemma3_text": Family(
        keys=_GEMMA_KEYS | {"local_rope_theta": "rope_local_base_freq"},
        defaults=_GEMMA3_DEFAULTS,
        fixed=_GEMMA_FIXED | {"qk_norm": True},
        harmless=frozenset({"hidden_act", "_sliding_window_pattern"}),
        architectures=(
            ("lm", "Gemma3ForCausalLM"),
            ("embedding", "Gemma3TextModel"),
            ("classifier", "Gemma3TextForSequenceClassification"),
            ("lm", "Gemma3ForConditionalGeneration"),  # the text part of it
        ),
        trunk=_GEMMA_TRUNK,
        other_prefixes=(
            "model.language_model.",
            "language_model.model.",
            "language_model.",
        ),
        spare=("vision_tower.", "multi_modal_projector."),
        **_LLAMA_PARTS,
    ),
    "bert": Family(
        defaults=_BERT_DEFAULTS,
        prefix="bert.",
        heads=_BERT_HEADS,
        architectures=_encoder_architectures("Bert"),
        copies={
            "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        spare=("pooler.", "cls.seq_relationship."),
        **_BERT_PARTS,
    ),
    "roberta": Family(architectures=_encoder_architectures("Roberta"), **_ROBERTA_PARTS),
    "xlm-roberta": Family(architectures=_encoder_architectures("XLMRoberta"), **_ROBERTA_PARTS),
}
