"""Preference optimization: the loss against float64 torch, what must not change it, and learning."""

import dataclasses
import functools
import json
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.config import LoraConfig, OptimConfig, PreferenceConfig, from_dict
from llm_jax.data.conversations import Conversation
from llm_jax.data.packing import row_batches
from llm_jax.data.preferences import Pair, pack_pairs
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.models import describe
from llm_jax.sharding import make_mesh
from llm_jax.train import preference
from llm_jax.train.loop import make_evaluate
from llm_jax.train.metrics_log import read_metrics
from llm_jax.train.optim import make_optimizer
from llm_jax.train.preference import answer_log_probs, dpo_loss, with_reference
from llm_jax.train.pretrained import Pretrained, load_pretrained
from llm_jax.train.state import start_state
from llm_jax.train.step import make_train_step
from tests import tiny

CONFIGS = Path(__file__).parents[2] / "configs"
SFT, DPO = (runpy.run_path(str(CONFIGS / f"{name}.py")) for name in ("sft", "dpo"))
BETA, PAIRS, LENGTH = 0.3, 21, 64
LORA = LoraConfig(rank=4, targets=("attn/w", "mlp/"))


def random_pairs():
    """Chats of two lengths with a prompt in common, the answers marked."""
    rng = np.random.default_rng(0)

    def chat(prompt):
        tokens = np.append(prompt, rng.integers(3, tiny.VOCAB, rng.integers(1, 12))).astype(np.int32)
        return Conversation(tokens, np.arange(len(tokens)) >= len(prompt))

    prompts = [rng.integers(3, tiny.VOCAB, rng.integers(2, 9)) for _ in range(PAIRS)]
    return [Pair(chat(prompt), chat(prompt), f"file:{n}") for n, prompt in enumerate(prompts, 1)]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """(theirs, ours as `Pretrained`) of the policy and of the reference."""
    both = []
    for seed in (0, 1):
        directory = tmp_path_factory.mktemp("llama")
        theirs = tiny.DECODERS["llama"].save(directory, seed)
        model = describe(dataclasses.replace(load_config(directory), param_dtype="float32"))
        params = load_hf(directory, model, make_mesh("data:1"))
        both.append((theirs.double(), Pretrained(model, params, None)))
    return both


def theirs_log_prob(model, chat):
    """log p(answer | prompt), a chat at a time, without padding."""
    tokens = torch.tensor(chat.tokens, dtype=torch.long)
    log_probs = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1)
    chosen = log_probs[torch.arange(len(tokens) - 1), tokens[1:]]
    return chosen[torch.tensor(chat.trained[1:])].sum()


def theirs_loss(llamas, pairs, smoothing):
    """(sum of the losses, rewards [pairs, 2]), with gradients in the policy's parameters."""
    (policy, _), (reference, _) = llamas
    policy.zero_grad()
    total, rewards = 0.0, []
    for pair in pairs:
        rewards.append([])
        for chat in (pair.chosen, pair.rejected):
            with torch.no_grad():
                fixed = theirs_log_prob(reference, chat)
            rewards[-1].append(BETA * (theirs_log_prob(policy, chat) - fixed))
        margin = rewards[-1][0] - rewards[-1][1]
        right, wrong = torch.sigmoid(margin), torch.sigmoid(-margin)
        loss = -(1 - smoothing) * torch.log(right) - smoothing * torch.log(wrong)
        loss.backward()
        total += loss.item()
    return total, np.array([[reward.item() for reward in both] for both in rewards])


def referenced(base, rows):
    return with_reference([rows], base, 4, 0, make_mesh(""))[0]


@pytest.fixture(scope="module")
def batch(llamas):
    """All pairs in rows, with what the reference says of them."""
    return referenced(llamas[1][1], pack_pairs(random_pairs(), LENGTH))


@pytest.mark.parametrize(("smoothing", "chunk"), [(0.0, 0), (0.2, 25)])
def test_loss_gradient_and_rewards_are_those_of_the_paper(llamas, batch, smoothing, chunk):
    policy, ours = llamas[0]
    want, rewards = theirs_loss(llamas, random_pairs(), smoothing)
    objective = functools.partial(dpo_loss, beta=BETA, label_smoothing=smoothing, chunk=chunk)

    def loss(params, batch):
        total, count, metrics = objective(ours.model.bind(params), batch, None)
        return total, (count, metrics)

    (total, (count, metrics)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        ours.params, batch
    )
    assert float(count) == PAIRS
    np.testing.assert_allclose(total, want, rtol=1e-5)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "accuracy": (margins > 0).sum(),
        "margin": margins.sum(),
        "chosen_reward": rewards[:, 0].sum(),
        "rejected_reward": rewards[:, 1].sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name][0], value, rtol=1e-4, atol=1e-4, err_msg=name)
    # Every element of the gradients, not their direction alone.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    inner = policy.model
    close(grads["embed"]["tokens"], inner.embed_tokens.weight.grad)
    close(grads["layers"]["mlp"]["down"][2], inner.layers[2].mlp.down_proj.weight.grad)
    wq = grads["layers"]["attn"]["wq"][0]
    close(wq.reshape(-1, wq.shape[-1]), inner.layers[0].self_attn.q_proj.weight.grad)


def test_against_itself_the_loss_is_log_2_and_the_metrics_those_of_a_guess(llamas):
    base, rows = llamas[0][1], pack_pairs(random_pairs(), LENGTH)
    most = int(rows["segment_ids"].max()) // 2

    def loss(params, batch):
        net = base.model.bind(params)
        reference = jax.lax.stop_gradient(answer_log_probs(net, batch, most, chunk=0))
        total, count, metrics = dpo_loss(net, batch | {"reference": reference}, None, beta=BETA)
        return total / count, metrics

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(base.params, rows)
    assert float(value) == pytest.approx(math.log(2), rel=1e-6)  # a mean in float32
    assert float(metrics["accuracy"][0]) == PAIRS / 2 and float(metrics["margin"][0]) == 0.0
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0, "it leaves at once"
    # Computed beforehand by another program, the reference is the same but for rounding.
    objective = functools.partial(dpo_loss, beta=BETA)
    batches = row_batches(referenced(base, rows), 4)
    numbers = make_evaluate(base.model, objective, batches, make_mesh(""))(base.params)
    assert numbers["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_neighbours_and_padding_do_not_change_an_answer(llamas):
    """Each pair in a row of its own, several in a row, and all in a few long rows."""
    base, pairs = llamas[0][1], random_pairs()
    single = [pack_pairs([pair], 48) for pair in pairs]
    alone = {name: np.concatenate([row[name] for row in single]) for name in single[0]}
    want = referenced(base, alone)["reference"]
    assert want.shape == (PAIRS, 1, 2) and (want < 0).all()
    for length in (LENGTH, 300):
        found = referenced(base, pack_pairs(pairs, length))["reference"].reshape(-1, 2)
        found = found[found[:, 0] != 0]  # where a row has fewer pairs than another
        order = np.argsort(want[:, 0, 0])
        np.testing.assert_allclose(found[np.argsort(found[:, 0])], want[order, 0], rtol=1e-5)


@pytest.mark.parametrize(
    "mesh", ["data:8", pytest.param("data:2,fsdp:2,tensor:2", marks=pytest.mark.slow)]
)
def test_devices_and_parts_of_a_batch_do_not_change_the_steps(llamas, mesh):
    model, base = llamas[0][1].model, llamas[1][1]
    optim = OptimConfig(1e-3, "constant", warmup_fraction=0.0)
    histories = {}
    for name, accumulate in (("data:1", 1), (mesh, 2)):
        mesh = make_mesh(name)
        place = functools.partial(jax.tree.map, jax.device_put)
        params = place(jax.tree.map(np.array, llamas[0][1].params), model.shardings(mesh))
        on_mesh = dataclasses.replace(base, params=place(base.params, base.model.shardings(mesh)))
        (rows,) = with_reference([pack_pairs(random_pairs(), 48)], on_mesh, 8, 20, mesh)
        (batch,) = row_batches(rows, 16)
        optimizer = make_optimizer(optim, model, 5)
        state = start_state(params, model, optimizer, mesh)
        objective = functools.partial(dpo_loss, beta=BETA, chunk=20)
        step = make_train_step(model, objective, optimizer, mesh, accumulate=accumulate)
        histories[name] = []
        for _ in range(5):
            state, metrics = step(state, batch, jax.random.key(0))
            histories[name].append({n: float(x) for n, x in metrics.items()})
    first, second = histories.values()
    assert first[-1]["loss"] < 0.9 * first[0]["loss"] and first[-1]["margin"] > first[0]["margin"]
    for ours, want in zip(second, first, strict=True):
        assert ours == pytest.approx(want, rel=1e-5, abs=2e-5)


WORDS = ["red", "blue", "green", "black", "white", "brown", "yellow", "grey"]


def settings(tmp_path, **changes):
    """Whatever is asked, the polite answer is the better one."""
    path = tmp_path / "pairs.jsonl"
    records = [
        {
            "prompt": f"Please say {first} and {word}.",
            "chosen": f"I say {word}.",
            "rejected": f"Go away, {first}.",
        }
        for first in WORDS
        for word in WORDS
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {
        "data": str(path),
        "init_from": str(SFT["DEMO"]),
        "chat_template": SFT["TEMPLATE"],
        "row_tokens": 128,
        "eval_fraction": 0.2,
        "beta": BETA,
        "optim": OptimConfig(1e-3, warmup_fraction=0.0),
        "batch_size": 4,
        "steps": 8,
        "log_every": 1,
    }
    return PreferenceConfig(**values | changes)


def curve(workdir):
    """The records without what differs from run to run: the time and the speed."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "time" and "perf/" not in k} for r in records]


class Cut:
    """A loader that breaks off at step 5."""

    def __init__(self, loader):
        self.loader, self.fingerprint = loader, loader.fingerprint

    def __call__(self, step):
        if step == 5:
            raise OSError("lost")
        return self.loader(step)


@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.slow)])
def test_the_better_answer_is_learned_and_the_base_is_the_reference(tmp_path, lora):
    config, mesh = settings(tmp_path, lora=lora), make_mesh("data:1")
    result = preference.run(config, tmp_path / "run", mesh)
    assert result.accuracy == result.likelier == 1.0 and result.margin > 1.0
    assert result.loss < 0.3 and result.likelier_before < 1.0
    assert result.pairs == round(0.2 * len(WORDS) ** 2)
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["step"] == 1 and first["train/loss"] == pytest.approx(math.log(2), abs=1e-4)
    # The rewards again from what the workdir holds, adapters merged, and from the model it began with.
    trained = load_trained(tmp_path / "run", mesh, param_dtype="float32")
    tokenizer = load_tokenizer(trained.tokenizer)
    base = load_pretrained(config.init_from, mesh, field="init_from")
    _, held_out = preference._read(config, dataclasses.replace(base, tokenizer=tokenizer))
    rows = pack_pairs(held_out, 128)
    real = rows["segment_ids"].max(axis=1)[:, None] // 2 > np.arange(rows["segment_ids"].max() // 2)
    after, before = (
        referenced(Pretrained(net.model, net.params, tokenizer), rows)["reference"][real]
        for net in (trained, base)
    )
    rewards = BETA * (after - before)
    # Merging adds up in another order.
    want = pytest.approx([result.chosen_reward, result.rejected_reward], rel=1e-3, abs=1e-3)
    assert list(rewards.mean(axis=0)) == want
    assert (tmp_path / "run/adapter/adapter_config.json").exists() == (lora is not None)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_exactly(tmp_path, monkeypatch):
    """It computes the reference anew, from the base weights."""
    config, mesh = settings(tmp_path, lora=LORA, checkpoint_every=3), make_mesh("data:1")
    want = preference.run(config, tmp_path / "run", mesh)
    loader = preference.rows_loader
    monkeypatch.setattr(preference, "rows_loader", lambda *of: Cut(loader(*of)))
    with pytest.raises(OSError, match="lost"):
        preference.run(config, tmp_path / "cut", mesh)
    monkeypatch.undo()
    assert preference.run(config, tmp_path / "cut", mesh) == want
    assert curve(tmp_path / "cut") == curve(tmp_path / "run")


def test_all_pairs_of_a_prompt_stand_on_one_side(tmp_path):
    config = settings(tmp_path)
    records = [
        {"prompt": f"Say {word}.", "chosen": f"{word}{number}", "rejected": "no"}
        for word in WORDS
        for number in range(3)
    ]
    Path(config.data).write_text("\n".join(map(json.dumps, records)))
    base = load_pretrained(config.init_from, make_mesh(""), field="init_from")
    base.tokenizer.chat_template = config.chat_template
    kept, held_out = preference._read(config, base)
    words = [
        {(int(pair.where.rpartition(":")[2]) - 1) // 3 for pair in side} for side in (kept, held_out)
    ]
    assert words[0].isdisjoint(words[1]) and len(kept) + len(held_out) == len(records)
    other = dataclasses.replace(config, eval_data=config.data)
    kept, held_out = preference._read(other, base)
    assert len(kept) == len(held_out) == len(records)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_configs_are_whole(name):
    config = from_dict(PreferenceConfig, DPO["get_config"](name).to_dict())
    assert (config.lora is not None) == (name == "lora") and Path(config.data).is_file()


def test_what_cannot_work_is_refused(tmp_path):
    mesh = make_mesh("")
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: both chats have \d+ tokens.*row_tokens=20"):
        preference.run(settings(tmp_path, row_tokens=20), tmp_path / "run", mesh)
    with pytest.raises(ValueError, match=r"pairs.jsonl:\d+: .*no chat template"):
        preference.run(settings(tmp_path, chat_template=""), tmp_path / "run", mesh)
    config = settings(tmp_path, row_tokens=4096)
    long = {"prompt": "a", "chosen": "b " * 600, "rejected": "c"}
    with Path(config.data).open("a") as file:
        file.write(json.dumps(long) + "\n")
    with pytest.raises(
        ValueError, match=r"pairs.jsonl:65: a chat has \d+ tokens, more than the 512 pos"
    ):
        preference.run(config, tmp_path / "run", mesh)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"beta=0.0: expected positive"):
        settings(tmp_path, beta=0.0)
    with pytest.raises(ValueError, match=r"label_smoothing=0.5: expected in \[0, 0.5\)"):
        settings(tmp_path, label_smoothing=0.5)
    with pytest.raises(ValueError, match="did you mean lora"):
        DPO["get_config"]("lra")
