"""Fine-tuning on chats, from files to a model that answers; the bundled demo model learns."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from llm_jax import LLM, SamplingParams
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.config import FinetuneConfig, LoraConfig, OptimConfig, from_dict
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.sharding import make_mesh
from llm_jax.train import finetune
from llm_jax.train.loop import make_evaluate
from llm_jax.train.objectives import lm_loss
from llm_jax.tree import flatten

CONFIG = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "sft.py"))
WORDS = ["red", "blue", "green", "black", "white", "brown", "yellow", "grey"]


def settings(tmp_path, **changes):
    """Whatever is asked, the answer is the last word again."""
    path = tmp_path / "chats.jsonl"
    chats = [
        [
            {"role": "user", "content": f"Please say {first} and {word}."},
            {"role": "assistant", "content": f"I say {word}."},
        ]
        for first in WORDS
        for word in WORDS
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    values = {
        "data": str(path),
        "init_from": str(CONFIG["DEMO"]),
        "chat_template": CONFIG["TEMPLATE"],
        "row_tokens": 64,
        "eval_fraction": 0.2,
        "optim": OptimConfig(5e-3, warmup_fraction=0.1),
        "batch_size": 8,
        "steps": 40,
    }
    return FinetuneConfig(**values | changes)


@pytest.mark.parametrize(
    "lora",
    [
        None,
        pytest.param(LoraConfig(rank=8, targets=("attn/w", "mlp/")), marks=pytest.mark.slow),
    ],
)
def test_the_assistants_words_are_learned(tmp_path, lora):
    config, mesh = settings(tmp_path, lora=lora), make_mesh("data:2")
    result = finetune.run(config, tmp_path / "run", mesh)
    # Forty steps of few adapters teach the sentence, all but the word that is asked for.
    assert result.loss < (0.1 if lora is None else 0.9) < 2.0 < result.loss_before
    # What the workdir holds, adapters merged, has the loss that training reported.
    trained = load_trained(tmp_path / "run", mesh)
    tokenizer = load_tokenizer(trained.tokenizer)
    _, held_out = finetune._read(config, tokenizer)
    rows = finetune._rows(held_out, 64)
    loss = make_evaluate(trained.model, lm_loss, [rows], mesh)(trained.params)["eval/loss"]
    assert loss == pytest.approx(result.loss, rel=1e-3)
    assert result.tokens == int((rows["targets"] >= 0).sum())
    answers = LLM.from_params(trained.model, trained.params, tokenizer, mesh=mesh)
    chat = [{"role": "user", "content": "Please say blue and green."}]
    (answer,) = answers.generate([chat], SamplingParams(max_new_tokens=12, temperature=0))
    assert answer.text.strip() == "I say green." if lora is None else answer.text.startswith("I say ")

    again = finetune.run(config, tmp_path / "run", mesh)
    assert again == result
    whole = sum(int(np.prod(x.shape)) for x in flatten(trained.params).values())
    if lora is None:
        assert result.trained_parameters == whole
    else:
        assert result.trained_parameters < 0.1 * whole
        assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_configs_are_whole(name):
    config = from_dict(FinetuneConfig, CONFIG["get_config"](name).to_dict())
    assert (config.lora is not None) == (name == "lora") and Path(config.data).is_file()


def test_what_cannot_work_is_refused(tmp_path):
    mesh = make_mesh("")
    with pytest.raises(ValueError, match=r"row_tokens=4096: expected at most the 512 positions"):
        finetune.run(settings(tmp_path, row_tokens=4096), tmp_path / "run", mesh)
    with pytest.raises(ValueError, match="no chat template"):
        finetune.run(settings(tmp_path, chat_template=""), tmp_path / "run", mesh)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="did you mean lora"):
        CONFIG["get_config"]("lra")
