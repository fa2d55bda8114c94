"""The settings of a model: its architecture, and how it is computed."""

import dataclasses

from llm_jax.config.checks import choice, require


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (`kind` names the rule).

    linear: Chen et al. 2023 (position interpolation). llama3: the Llama 3.1 release.
    yarn: Peng et al. 2023. Frequencies are radians per token.
    """

    kind: str  # "linear" | "llama3" | "yarn"
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn; 0 = 0.1 ln(factor) + 1

    def __post_init__(self):
        choice("rope_scaling.kind", self.kind, ("linear", "llama3", "yarn"))
        require(self.factor > 0, "rope_scaling.factor", self.factor, "a positive number")
        if self.kind != "linear":
            require(
                self.original_max_positions > 0,
                "rope_scaling.original_max_positions",
                self.original_max_positions,
                "the context length of the original training run",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes one transformer, decoder or encoder. Hashable, so it can key a jit.

    Letters: V vocab_size, L num_layers, D embed_dim, N num_heads, K num_kv_heads, H head_dim,
    F mlp_dim, E num_experts, C num_classes.
    """

    family: str  # Hugging Face model_type that import and export speak, e.g. "llama"
    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int  # longest sequence the positions are defined (or trained) for
    causal: bool = True
    # Positions
    positions: str = "rope"  # "rope" | "learned"
    position_offset: int = 0  # RoBERTa counts from padding_idx + 1
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # theta of windowed layers, unscaled (Gemma 3)
    token_types: int = 0  # number of segment embeddings (BERT)
    # Attention
    windows: tuple[int, ...] = ()  # one per layer, 0 = full attention; () = all full
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    attn_scale: float | None = None  # None = head_dim ** -0.5
    attn_softcap: float | None = None
    # Norms
    norm: str = "rms"  # "rms" | "layer"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False  # weight stored as w - 1 (Gemma)
    norm_position: str = "pre"  # "pre" | "post" | "sandwich" (before and after, Gemma)
    # Feed-forward
    activation: str = "silu"  # "silu" | "gelu" | "gelu_tanh" | "relu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    # Mixture of experts: num_experts feed-forward layers of width mlp_dim, of which a token has a few
    num_experts: int = 0  # 0 = one feed-forward layer for all tokens
    experts_per_token: int = 0
    norm_expert_weights: bool = True  # the weights of a token's experts sum to 1 (Mixtral)
    router_aux_loss: float = 0.0  # times this the load-balancing loss is added to that of training
    # Embedding and heads
    embed_scale: bool = False  # multiply embeddings by sqrt(D) (Gemma)
    embed_norm: bool = False  # LayerNorm after the embedding sum (BERT)
    tie_embeddings: bool = False
    final_softcap: float | None = None
    head: str = "lm"  # "lm" | "masked_lm" | "classifier" | "embedding" | "span"
    pooler: bool = False  # BERT's dense + tanh on the pooled vector
    pooling: str = "last"  # "cls" | "mean" | "max" | "last"; classifier and embedding heads
    num_classes: int = 0
    labels: tuple[str, ...] = ()
    class_parts: tuple[int, ...] = ()  # finer classes that make up each class; () = the classes alone
    # n of the character n-grams that have logits of their own, averaged with those of the hidden states
    ngram_orders: tuple[int, ...] = ()
    ngram_buckets: int = 0  # rows of the table that the n-grams of each order share by a hash
    ngram_dropout: float = 0.0  # share of the n-grams left out while training
    dropout: float = 0.0  # residual, embedding and classifier dropout while training
    # What a layer keeps for its backward pass, which computes the rest again: "none" = everything;
    # "dots" = the results of all products; "dots_no_batch" = of those with weights; "full" = its input
    remat: str = "none"
    # Into how many parts a mesh with stages cuts a batch, a multiple of them; 0 = as many as stages
    microbatches: int = 0
    # "auto" = kernels on TPUs and GPUs where they serve; "pallas" = those or an error; "xla" = none
    attention: str = "auto"
    # Dtypes: "" = float32 on CPU, bfloat16 on TPU and GPU (see `with_dtypes`)
    param_dtype: str = ""
    compute_dtype: str = ""
    cache_dtype: str = ""

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive integer")
        for name in ("head_dim", "mlp_dim", "max_positions"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive integer")
        choice("positions", self.positions, ("rope", "learned"))
        choice("norm", self.norm, ("rms", "layer"))
        choice("norm_position", self.norm_position, ("pre", "post", "sandwich"))
        choice("activation", self.activation, ("silu", "gelu", "gelu_tanh", "relu"))
        choice("head", self.head, ("lm", "masked_lm", "classifier", "embedding", "span"))
        choice("pooling", self.pooling, ("cls", "mean", "max", "last"))
        choice("attention", self.attention, ("auto", "pallas", "xla"))
        choice("remat", self.remat, ("none", "dots", "dots_no_batch", "full"))
        require(self.microbatches >= 0, "microbatches", self.microbatches, "0, or a positive number")
        for name in ("param_dtype", "compute_dtype", "cache_dtype"):
            choice(name, getattr(self, name), ("", "float32", "bfloat16", "float16"))
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads={self.num_heads}",
        )
        if self.positions == "rope":
            require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even, for rotary pairs")
        require(
            len(self.windows) in (0, self.num_layers),
            "windows",
            self.windows,
            f"empty, or one entry for each of the {self.num_layers} layers",
        )
        self._check_experts()
        if self.head == "classifier":
            require(self.num_classes > 1, "num_classes", self.num_classes, "two or more")
        if self.labels:
            require(
                len(self.labels) == self.num_classes,
                "labels",
                self.labels,
                f"one name for each of num_classes={self.num_classes}",
            )
        if self.class_parts:
            parts = f"one count, 1 or more, for each of num_classes={self.num_classes}"
            fits = len(self.class_parts) == self.num_classes and min(self.class_parts) > 0
            require(fits, "class_parts", self.class_parts, parts)
        for name in ("dropout", "ngram_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        if self.ngram_orders:
            orders = self.ngram_orders
            require(min(orders) > 0, "ngram_orders", orders, "1 or more each")
            require(self.head == "classifier", "ngram_orders", orders, f"() with head={self.head!r}")
            most = (2**31 - 1) // len(orders)  # rows are int32
            fits = f"1 to {most} for ngram_orders={orders}"
            require(0 < self.ngram_buckets <= most, "ngram_buckets", self.ngram_buckets, fits)

    def _check_experts(self) -> None:
        experts, chosen, loss = self.num_experts, self.experts_per_token, self.router_aux_loss
        require(experts >= 0, "num_experts", experts, "0, or a positive number")
        require(loss >= 0, "router_aux_loss", loss, "0 or more")
        if not experts:
            require(chosen == 0, "experts_per_token", chosen, "0 with num_experts=0")
            require(loss == 0, "router_aux_loss", loss, "0 with num_experts=0")
            return
        require(1 <= chosen <= experts, "experts_per_token", chosen, f"1 to num_experts={experts}")
        require(self.gated_mlp, "gated_mlp", self.gated_mlp, "True: experts are gated")
        require(not self.mlp_bias, "mlp_bias", self.mlp_bias, "False: experts have no biases")

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Sliding window of each layer in tokens, 0 = full attention; length L."""
        return self.windows or (0,) * self.num_layers

    def with_head(self, head: str) -> "ModelConfig":
        """The same trunk under a head of tokens, "lm", "masked_lm" or "span": no classes, no pooler."""
        none = {"num_classes": 0, "labels": (), "class_parts": (), "pooler": False}
        ngrams = {"ngram_orders": (), "ngram_buckets": 0, "ngram_dropout": 0.0}
        return dataclasses.replace(self, head=head, **none, **ngrams)

    def with_dtypes(self, backend: str) -> "ModelConfig":
        """Fill unset dtypes with the backend's default.

        float32 on CPU, because XLA:CPU up-casts whole bfloat16 matrices at every call.
        """
        default = "float32" if backend == "cpu" else "bfloat16"
        names = ("param_dtype", "compute_dtype", "cache_dtype")
        return dataclasses.replace(self, **{n: getattr(self, n) or default for n in names})
