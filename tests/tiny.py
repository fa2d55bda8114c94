"""Tiny transformers models with random weights, one or more for each family, saved to disk.

The sizes are odd on purpose (no power of two where one is not needed), windows are shorter than the
test sequences, biases and norms are random too, so that no term can be left out unnoticed.
"""

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 97
LENGTH = 23  # of the test sequences; windows are shorter


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A config of transformers: class names without their endings, and settings."""

    config: str
    model: str
    settings: dict[str, Any]

    def build(self, seed: int = 0) -> "transformers.PreTrainedModel":
        """The model, in evaluation mode and float32, with eager attention (exact soft-caps)."""
        config = getattr(transformers, self.config)(**self.settings)
        config._attn_implementation = "eager"
        model = getattr(transformers, self.model)(config).eval()
        randomize(model, seed)
        return model

    def save(self, directory: Path, seed: int = 0, **options: Any) -> "transformers.PreTrainedModel":
        """Build, write with save_pretrained and return the model."""
        model = self.build(seed)
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar of saving
            model.save_pretrained(directory, **options)
        return model

    def save_for(
        self, directory: Path, tokenizer: Any, **settings: Any
    ) -> "transformers.PreTrainedModel":
        """Save a model with the vocabulary of our `tokenizer`, and the tokenizer beside it."""
        settings = self.settings | {"vocab_size": tokenizer.vocab_size} | settings
        model = dataclasses.replace(self, settings=settings).save(directory)
        tokenizer.save(directory)
        return model


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Matrices from N(0, 1 / fan_in); vectors moved by N(0, 0.2^2) from where they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else p + 0.2 * noise)


_GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4}
_GPT2 |= {"n_inner": 76, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 14}
_GEMMA = _LLAMA | {
    "head_dim": 14,
    "query_pre_attn_scalar": 11,
    "sliding_window": 5,
    "hidden_activation": "gelu_pytorch_tanh",
}
_GEMMA3 = _GEMMA | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 76,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_ROBERTA = _BERT | {"type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 66}
_LABELS = {"id2label": {0: "neg", 1: "neu", 2: "pos"}}


def _tiny(config: str, model: str, **settings: Any) -> Tiny:
    return Tiny(config, model, settings)


DECODERS = {
    "gpt2": _tiny("GPT2Config", "GPT2LMHeadModel", **_GPT2),
    "gpt2 untied": _tiny("GPT2Config", "GPT2LMHeadModel", **_GPT2, tie_word_embeddings=False),
    "llama": _tiny("LlamaConfig", "LlamaForCausalLM", **_LLAMA),
    "llama tied, biases, head_dim": _tiny(
        "LlamaConfig",
        "LlamaForCausalLM",
        **_LLAMA,
        head_dim=14,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "llama rope llama3": _tiny(
        "LlamaConfig", "LlamaForCausalLM", **_LLAMA, rope_parameters=_LLAMA3_ROPE
    ),
    "llama rope linear": _tiny(
        "LlamaConfig",
        "LlamaForCausalLM",
        **_LLAMA,
        rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    ),
    "mistral": _tiny("MistralConfig", "MistralForCausalLM", **_LLAMA, sliding_window=None),
    "mistral window": _tiny("MistralConfig", "MistralForCausalLM", **_LLAMA, sliding_window=7),
    "qwen2": _tiny("Qwen2Config", "Qwen2ForCausalLM", **_LLAMA, tie_word_embeddings=True),
    "qwen2 windows, yarn": _tiny(
        "Qwen2Config", "Qwen2ForCausalLM", **_LLAMA, **_QWEN_WINDOW, rope_parameters=_YARN
    ),
    "qwen3": _tiny("Qwen3Config", "Qwen3ForCausalLM", **_LLAMA, head_dim=14),
    "qwen3 windows, bias": _tiny(
        "Qwen3Config", "Qwen3ForCausalLM", **_LLAMA, **_QWEN_WINDOW, head_dim=14, attention_bias=True
    ),
    "mixtral": _tiny("MixtralConfig", "MixtralForCausalLM", **_LLAMA, **_MIXTRAL),
    "mixtral window": _tiny(
        "MixtralConfig", "MixtralForCausalLM", **_LLAMA, **_MIXTRAL, sliding_window=7
    ),
    "qwen3_moe": _tiny("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **_LLAMA, **_QWEN3_MOE),
    "qwen3_moe normed, tied": _tiny(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        **_LLAMA,
        **_QWEN3_MOE,
        norm_topk_prob=True,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "gemma2": _tiny(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        **_GEMMA,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": _tiny("Gemma3TextConfig", "Gemma3ForCausalLM", **_GEMMA3),
}
CLASSIFIERS = {
    "gpt2 classifier": _tiny("GPT2Config", "GPT2ForSequenceClassification", **_GPT2, **_LABELS),
    "llama classifier": _tiny("LlamaConfig", "LlamaForSequenceClassification", **_LLAMA, **_LABELS),
    "mixtral classifier": _tiny(
        "MixtralConfig", "MixtralForSequenceClassification", **_LLAMA, **_MIXTRAL, **_LABELS
    ),
    "gemma3 classifier": _tiny(
        "Gemma3TextConfig", "Gemma3TextForSequenceClassification", **_GEMMA3, **_LABELS
    ),
    "bert classifier": _tiny("BertConfig", "BertForSequenceClassification", **_BERT, **_LABELS),
    "roberta classifier": _tiny(
        "RobertaConfig", "RobertaForSequenceClassification", **_ROBERTA, **_LABELS
    ),
}
SPANS = {
    "bert span": _tiny("BertConfig", "BertForQuestionAnswering", **_BERT),
    "roberta span": _tiny("RobertaConfig", "RobertaForQuestionAnswering", **_ROBERTA),
}
MASKED = {
    "bert masked": _tiny("BertConfig", "BertForMaskedLM", **_BERT, hidden_act="relu"),
    "bert masked untied": _tiny("BertConfig", "BertForMaskedLM", **_BERT, tie_word_embeddings=False),
    "roberta masked": _tiny("RobertaConfig", "RobertaForMaskedLM", **_ROBERTA),
    "xlm-roberta masked": _tiny("XLMRobertaConfig", "XLMRobertaForMaskedLM", **_ROBERTA),
}
ENCODERS = {
    "bert": _tiny("BertConfig", "BertModel", **_BERT),
    "roberta": _tiny("RobertaConfig", "RobertaModel", **_ROBERTA),
}
ALL = DECODERS | CLASSIFIERS | SPANS | MASKED | ENCODERS
