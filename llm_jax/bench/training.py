"""A training step beside the same one in PyTorch: the same model, weights, batch and optimizer.

The peer is a plain GPT-2 as one writes it for speed: one product for query, key and value,
`scaled_dot_product_attention`, fused AdamW. Both do forward, backward, clipping by the global norm and
AdamW, in float32 on all cores. The caller hands in the module `torch`, without which llm_jax does.

Letters: B batch, T tokens, D embed, N heads, H head dim, L layers, V vocab.
"""

import functools
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.config import ModelConfig, OptimConfig
from llm_jax.data.loader import to_device
from llm_jax.models import Model, Params, describe, init_params
from llm_jax.sharding import make_mesh
from llm_jax.train.objectives import lm_loss
from llm_jax.train.optim import make_optimizer
from llm_jax.train.state import start_state
from llm_jax.train.step import make_train_step

OPTIM = OptimConfig(1e-3, "constant", warmup_fraction=0.0, b2=0.99, weight_decay=0.1)
GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # ours and PyTorch's names
Step = Callable[[], Any]  # one step; its loss before the update, which float() waits for


def gpt2(
    vocab_size: int, num_layers: int, num_heads: int, head_dim: int, activation: str = "gelu_tanh"
) -> ModelConfig:
    """A GPT-2 of this size, all of it in float32."""
    return ModelConfig(
        family="gpt2",
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        mlp_dim=4 * num_heads * head_dim,
        max_positions=1024,
        positions="learned",
        norm="layer",
        norm_eps=1e-5,
        activation=activation,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        param_dtype="float32",
        compute_dtype="float32",
    )


TRAIN_SHAPES = {  # name: (model, B, T)
    "gpt2": (gpt2(50257, 12, 12, 64), 4, 256),
    "shakespeare_char": (gpt2(65, 4, 4, 32, "gelu"), 12, 64),  # configs/shakespeare_char.py
}


def rivals(
    torch: ModuleType, shape: str, *, compiled: bool, steps: int, mesh: str = ""
) -> dict[str, Callable[[], float]]:
    """{"ours", "peer"}: each runs `steps` steps of a shape and returns tokens per second.

    mesh: of our side, such as "data:2"; "" = one device.
    """
    if shape not in TRAIN_SHAPES:
        raise ValueError(f"shape={shape!r}: expected one of {tuple(TRAIN_SHAPES)} to train")
    config, rows, length = TRAIN_SHAPES[shape]
    model, batch = describe(config), random_batch(config, rows, length)
    params = init_params(model, make_mesh(mesh), jax.random.key(0))
    ours = functools.partial(our_step, mesh=make_mesh(mesh))
    sides = {"ours": ours, "peer": torch_step(torch, compiled=compiled)}
    made = {name: make(model, jax.tree.map(np.array, params), batch) for name, make in sides.items()}

    def speed(step: Step) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            for _ in range(steps):
                loss = step()
            float(loss)  # as in training, nobody waits for the loss of every step
            return steps * rows * length / (time.perf_counter() - start)

        return run

    return {name: speed(step) for name, step in made.items()}


def random_batch(config: ModelConfig, rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows of one segment: tokens, targets, segment_ids, positions [B, T] int32."""
    stream = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1), np.int32)
    return {
        "tokens": stream[:, :-1],
        "targets": stream[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def our_step(model: Model, params: Params, batch: dict[str, np.ndarray], mesh: Mesh) -> Step:
    """The step of llm_jax/train/step.py."""
    optimizer = make_optimizer(OPTIM, model, steps=1_000_000)
    train_step = make_train_step(model, lm_loss, optimizer, mesh)
    placed = jax.device_put(params, model.shardings(mesh))
    state, key = start_state(placed, model, optimizer, mesh), jax.random.key(0)
    on_device = to_device(batch, mesh)

    def step() -> jax.Array:
        nonlocal state
        state, metrics = train_step(state, on_device, key)
        return metrics["loss"]

    return step


def torch_step(torch: ModuleType, *, compiled: bool) -> Callable[..., Step]:
    """f(model, params, batch) -> the same step by PyTorch; compiled: its loss by `torch.compile`."""

    def make(model: Model, params: Params, batch: dict[str, np.ndarray]) -> Step:
        tree = _tensors(torch, params, model.config)
        leaves = list(_leaves(tree))
        groups = [
            {"params": [x for x in leaves if x.dim() > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [x for x in leaves if x.dim() == 1], "weight_decay": 0.0},
        ]
        rates = {"lr": OPTIM.learning_rate, "betas": (OPTIM.b1, OPTIM.b2), "eps": OPTIM.eps}
        optimizer = torch.optim.AdamW(groups, **rates, fused=True)
        tokens, targets = (torch.tensor(batch[n], dtype=torch.long) for n in ("tokens", "targets"))
        loss_of = torch.compile(_torch_loss) if compiled else _torch_loss

        def step() -> Any:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(torch, tree, model.config, tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(leaves, OPTIM.clip_norm)
            optimizer.step()
            return loss.detach()

        return step

    return make


def _tensors(torch: ModuleType, params: Params, config: ModelConfig) -> dict[str, Any]:
    """Our parameters as leaves of PyTorch, a dict for each layer; query, key and value as one."""
    layers, width = params["layers"], config.embed_dim

    def leaf(x: Any) -> Any:
        return torch.tensor(np.array(x)).requires_grad_()

    def layer(i: int) -> dict[str, Any]:
        attn, mlp = layers["attn"], layers["mlp"]
        matrices = {n: np.array(attn[f"w{n}"][i]).reshape(-1, width) for n in "qkv"}
        biases = {n: np.array(attn[f"b{n}"][i]).reshape(-1) for n in "qkv"}
        return {
            "qkv": leaf(np.concatenate(list(matrices.values()))),
            "qkv_bias": leaf(np.concatenate(list(biases.values()))),
            "out": leaf(np.array(attn["wo"][i]).reshape(width, -1)),
            "out_bias": leaf(attn["bo"][i]),
            "up": leaf(mlp["up"][i]),
            "up_bias": leaf(mlp["up_bias"][i]),
            "down": leaf(mlp["down"][i]),
            "down_bias": leaf(mlp["down_bias"][i]),
            **{f"attn_{n}": leaf(layers["attn_norm"][n][i]) for n in ("scale", "bias")},
            **{f"mlp_{n}": leaf(layers["mlp_norm"][n][i]) for n in ("scale", "bias")},
        }

    return {
        "tokens": leaf(params["embed"]["tokens"]),
        "positions": leaf(params["embed"]["positions"]),
        "layers": [layer(i) for i in range(config.num_layers)],
        "scale": leaf(params["norm"]["scale"]),
        "bias": leaf(params["norm"]["bias"]),
    }


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _leaves(part)
    else:
        yield tree


def _torch_loss(torch: ModuleType, p: dict[str, Any], config: ModelConfig, tokens: Any, targets: Any):
    """Mean next-token cross entropy; tokens, targets [B, T] int64."""
    f, (rows, length), width = torch.nn.functional, tokens.shape, config.embed_dim
    x = f.embedding(tokens, p["tokens"]) + p["positions"][:length]
    for q in p["layers"]:
        y = f.layer_norm(x, (width,), q["attn_scale"], q["attn_bias"], config.norm_eps)
        y = f.linear(y, q["qkv"], q["qkv_bias"]).view(rows, length, 3, config.num_heads, -1)
        y = f.scaled_dot_product_attention(*y.permute(2, 0, 3, 1, 4), is_causal=True)  # [B, N, T, H]
        x = x + f.linear(y.transpose(1, 2).reshape(rows, length, width), q["out"], q["out_bias"])
        y = f.layer_norm(x, (width,), q["mlp_scale"], q["mlp_bias"], config.norm_eps)
        y = f.gelu(f.linear(y, q["up"], q["up_bias"]), approximate=GELU[config.activation])
        x = x + f.linear(y, q["down"], q["down_bias"])
    x = f.layer_norm(x, (width,), p["scale"], p["bias"], config.norm_eps)
    return f.cross_entropy(f.linear(x, p["tokens"]).flatten(0, 1), targets.flatten())
