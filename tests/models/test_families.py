"""config.json <-> ModelConfig: both spellings understood, what we cannot compute refused by name."""

import dataclasses
import json
import logging

import pytest

from llm_jax.config import RopeScaling
from llm_jax.models.families import from_hf, to_hf

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BERT = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu"}
ROBERTA = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}
MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
QWEN3_MOE = LLAMA | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
QWEN3_MOE |= {"norm_topk_prob": True, "moe_intermediate_size": 32, "num_experts": 16}
GEMMA3 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 12,
    "sliding_window": 512,
}

REFUSED = [
    ({"model_type": "lama"}, r"model_type='lama' .*did you mean llama\?.*qwen3"),
    ({"model_type": None}, r"config\.json has no model_type"),
    ({"hidden_act": "mish"}, r"hidden_act='mish' is not supported"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_type='dynamic' is not supported"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, r"rope_type='longrope'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "long_factor": [1]}}, r"'long_factor'"),
    ({"rope_scaling": {"rope_type": "linear"}}, r"'linear' without a factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, r"truncate=False"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"rope_parameters differ by layer"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\}"),
    ({"is_encoder_decoder": True}, r"is_encoder_decoder=True"),
    ({"architectures": ["LlamaForQuestionAnswering"]}, r"expected one of LlamaForCausalLM"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, r"48 is not a multiple of 5"),
    ({"vocab_size": "97"}, r"config\.json\.vocab_size='97': expected int"),
    (MIXTRAL | {"num_experts_per_tok": 9}, r"experts_per_token=9: expected 1 to num_experts=8"),
    (MIXTRAL | {"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1"),
    (QWEN3_MOE | {"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported"),
    (QWEN3_MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
    (QWEN3_MOE | {"use_sliding_window": True}, r"use_sliding_window=True is not supported"),
    (BERT | {"is_decoder": True}, r"is_decoder=True"),
    (BERT | {"position_embedding_type": "relative_key"}, r"position_embedding_type='relative_key'"),
    (BERT | {"architectures": ["BertLMHeadModel"]}, r"architectures=\['BertLMHeadModel'\]"),
    (ROBERTA | {"hidden_act": "relu"}, r"hidden_act='relu' .*always uses gelu"),
    (
        BERT | {"architectures": ["BertForSequenceClassification"], "problem_type": "regression"},
        r"problem_type='regression'",
    ),
    (
        BERT | {"architectures": ["BertForSequenceClassification"], "id2label": {"1": "a", "2": "b"}},
        r"id2label has ids \[1, 2\]",
    ),
    ({"model_type": "gpt2", "architectures": None, "scale_attn_weights": False}, "scale_attn_weights"),
    (GEMMA3 | {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True"),
    (GEMMA3 | {"layer_types": ["full_attention"]}, r"layer_types=.*expected 12 entries"),
    (GEMMA3 | {"layer_types": ["chunked_attention"] * 12}, r"chunked_attention"),
    (
        GEMMA3 | {"sliding_window": None, "layer_types": ["sliding_attention"] * 12},
        r"sliding_window=None",
    ),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=lambda x: x[:30] if isinstance(x, str) else "")
def test_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(LLAMA | change)


def test_unknown_keys_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        from_hf(LLAMA | {"attention_temperature": 2, "torch_dtype": "bfloat16", "use_cache": True})
    assert "unknown keys attention_temperature=2 were not used" in caplog.text


@pytest.mark.parametrize(
    "old, new, scaling",
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}, None),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0},
            RopeScaling("linear", 4.0),
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0},
            RopeScaling("yarn", 4.0, original_max_positions=64),
        ),
    ],
)
def test_rope_in_both_spellings(old, new, scaling):
    """transformers 4 wrote rope_theta and rope_scaling, 5 writes rope_parameters."""
    first, second = from_hf(LLAMA | old), from_hf(LLAMA | {"rope_parameters": new})
    assert first == second
    assert (first.rope_theta, first.rope_scaling) == (old["rope_theta"], scaling)


def test_gemma3_rope_in_both_spellings():
    old = {"rope_theta": 1e6, "rope_local_base_freq": 2e4}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    new = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
    first, second = from_hf(GEMMA3 | old), from_hf(GEMMA3 | {"rope_parameters": new})
    assert first == second
    assert (first.rope_theta, first.local_rope_theta) == (1e6, 2e4)
    assert first.rope_scaling == RopeScaling("linear", 8.0)
    assert first.windows == (512, 512, 512, 512, 512, 0) * 2


@pytest.mark.parametrize(
    "change, windows",
    [
        ({"model_type": "mistral", "architectures": None, "sliding_window": None}, ()),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 8}, (8, 8, 8)),
        ({"model_type": "qwen2", "architectures": None, "sliding_window": 8}, ()),
        (
            {
                "model_type": "qwen2",
                "architectures": None,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            (0, 8, 8),
        ),
        ({"model_type": "gemma2", "architectures": None, "sliding_window": 8}, (8, 0, 8)),
    ],
)
def test_windows(change, windows):
    assert from_hf(LLAMA | change).windows == windows


def test_multimodal_gemma3_takes_the_text_config(caplog):
    hf = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    hf |= {"text_config": {"hidden_size": 2560, "num_hidden_layers": 34}, "vision_config": {}}
    with caplog.at_level(logging.WARNING):
        config = from_hf(hf)
    assert "only its text part" in caplog.text
    assert (config.family, config.embed_dim, config.num_heads) == ("gemma3_text", 2560, 8)


def test_labels():
    bert = BERT | {"architectures": ["BertForSequenceClassification"]}
    assert from_hf(bert).labels == ("LABEL_0", "LABEL_1")
    named = from_hf(bert | {"id2label": {"1": "消极", "0": "积极", "2": "中性"}})
    assert named.labels == ("积极", "消极", "中性")
    assert json.loads(json.dumps(to_hf(named)))["id2label"]["1"] == "消极"


def test_experts(caplog):
    mixtral = from_hf(MIXTRAL | {"num_local_experts": 4, "router_aux_loss_coef": 0.02})
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.mlp_dim) == (4, 2, 76)
    assert mixtral.norm_expert_weights and mixtral.router_aux_loss == 0.02
    qwen = from_hf(QWEN3_MOE | {"intermediate_size": 999, "mlp_only_layers": []})
    assert (qwen.num_experts, qwen.experts_per_token, qwen.mlp_dim) == (16, 8, 32)
    assert (
        qwen.norm_expert_weights
        and not from_hf(QWEN3_MOE | {"norm_topk_prob": False}).norm_expert_weights
    )
    # transformers 5 writes the number of experts under either name.
    other = {k: v for k, v in QWEN3_MOE.items() if k != "num_experts"} | {"num_local_experts": 16}
    assert from_hf(other) == from_hf(QWEN3_MOE)
    assert not caplog.records
    llama = from_hf(LLAMA)
    with pytest.raises(ValueError, match="'llama' model cannot have num_experts=4"):
        to_hf(dataclasses.replace(llama, num_experts=4, experts_per_token=1))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts": -1}, "num_experts=-1"),
        ({"experts_per_token": 2}, "experts_per_token=2: expected 0 with num_experts=0"),
        ({"router_aux_loss": 0.1}, r"router_aux_loss=0\.1: expected 0 with num_experts=0"),
        ({"num_experts": 4}, "experts_per_token=0: expected 1 to num_experts=4"),
        ({"num_experts": 4, "experts_per_token": 2, "gated_mlp": False}, "gated_mlp=False"),
        ({"num_experts": 4, "experts_per_token": 2, "mlp_bias": True}, "mlp_bias=True"),
    ],
)
def test_settings_of_experts_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(from_hf(LLAMA), **change)


@pytest.mark.parametrize(
    "hf", [LLAMA, MIXTRAL, QWEN3_MOE, BERT, ROBERTA, GEMMA3], ids=lambda hf: hf["model_type"]
)
def test_to_hf_is_the_inverse(hf):
    config = from_hf(hf)
    assert from_hf(to_hf(config)) == config
