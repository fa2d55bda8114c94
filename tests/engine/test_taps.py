"""What a request sees of the model and changes in it: beside transformers, torch hooks and softmax."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import llm_jax
from llm_jax import LLM, SamplingParams
from llm_jax.cache.paged import pool_windows
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.config import EngineConfig
from llm_jax.engine.engine import Engine
from llm_jax.infer.paged_steps import make_paged_forward
from llm_jax.infer.taps import run_with_taps
from llm_jax.models import describe, transformer
from llm_jax.ops.attention import FullContext
from llm_jax.ops.taps import POINTS, Patch, Taps
from llm_jax.sharding import make_mesh
from tests import tiny

SLOW = pytest.mark.slow
SIZES = {"max_rows": 4, "token_budget": 32, "max_length": 48, "page_size": 8, "compile_ahead": False}
SIZES |= {"pages": (11,)}  # pages run out where two prompts have two samples each
PROMPT = np.random.default_rng(0).integers(3, tiny.VOCAB, 21).tolist()
OTHERS = [[5, 6, 7], [60, 50, 40, 30, 20] * 2]
ASKED = SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True, logprobs=0)
EVERYTHING = Taps(record=tuple(point for point in POINTS if point != "router"))
SOME = {"record": ("resid", "attn_probs"), "layers": (2, 0)}  # one program for most tests


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """f(name of a tiny model) -> (transformers' model, ours as an LLM)."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("tiny")
            theirs = tiny.ALL[name].save(directory)
            model, mesh = describe(load_config(directory)), make_mesh("data:1")
            params = load_hf(directory, model, mesh)
            llm = LLM.from_params(model, params, None, mesh=mesh)
            if name != "mistral window":  # that one runs layer by layer, the others scan
                llm.params = params
            made[name] = theirs, llm
        return made[name]

    return get


def engine(llm, **changes):
    return Engine(llm, EngineConfig(**(SIZES | changes)))


def parts(theirs, layer):
    """(attention, its output projection, feed-forward, block) of a layer of GPT-2 or of Llama's kin."""
    if hasattr(theirs, "transformer"):
        block = theirs.transformer.h[layer]
        return block.attn, block.attn.c_proj, block.mlp, block
    block = theirs.model.layers[layer]
    return block.self_attn, block.self_attn.o_proj, block.mlp, block


def reference(theirs, tokens):
    """What transformers has at our points, for one text; keys and values from its cache."""
    hooked: dict[str, list[np.ndarray]] = {"heads": [], "attn_out": [], "mlp_out": []}

    def keep(name, pick):
        return lambda module, given, *out: hooked[name].append(pick(given, *out)[0].numpy())

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in range(theirs.config.num_hidden_layers):
            attention, projection, mlp, _ = parts(theirs, layer)
            hooks = [
                attention.register_forward_hook(keep("attn_out", lambda given, out: out[0])),
                projection.register_forward_pre_hook(keep("heads", lambda given: given[0])),
                mlp.register_forward_hook(keep("mlp_out", lambda given, out: out)),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
        asked = {"output_hidden_states": True, "output_attentions": True}
        out = theirs(torch.tensor([tokens]), **asked)
    hidden = [x[0].numpy() for x in out.hidden_states]
    found = {name: np.stack(values) for name, values in hooked.items()}
    found |= {"embed": hidden[0], "resid": np.stack(hidden[1:-1]), "final": hidden[-1]}
    found["attn_probs"] = np.stack([x[0].numpy() for x in out.attentions])
    for name in ("keys", "values"):
        held = [getattr(layer, name)[0].swapaxes(0, 1).numpy() for layer in out.past_key_values.layers]
        found[name[0]] = np.stack([x for x in held if len(x) == len(tokens)] or [held[0]])
    return found


def close(ours, theirs, atol=2e-5):
    np.testing.assert_allclose(ours, np.asarray(theirs).reshape(ours.shape), atol=atol)


def same_records(found, wanted, atol=2e-5):
    assert set(found) == set(wanted)
    for point in wanted:
        assert found[point].shape == wanted[point].shape, point
        np.testing.assert_allclose(found[point], wanted[point], atol=atol, err_msg=point)


def whole(llm, output, taps):
    """What one forward of all inputs of an output records: no cache, no chunks, no pages."""
    tokens = [output.prompt_ids + output.token_ids[:-1]]
    logits, found = run_with_taps(llm.model, llm.params, tokens, taps)
    return logits[0], {
        point: x[0] if point in ("embed", "final") else x[:, 0] for point, x in found.items()
    }


@pytest.mark.parametrize(
    "name", ["gpt2", "mistral window", *(pytest.param(x, marks=SLOW) for x in ("llama", "gemma3"))]
)
def test_records_are_those_of_transformers(models, name):
    """Of a prompt in chunks and of what it generates, with maps of layers with and without windows."""
    theirs, llm = models(name)
    serving = engine(llm, pages=(11,) * len(pool_windows(llm.model.config)))
    serving.add(OTHERS[1] * 2, ASKED, taps=EVERYTHING)  # leaves the other prompt less than a step
    serving.add(PROMPT, ASKED, taps=EVERYTHING, id="tapped")
    chunks, ended = 0, {}
    while not serving.idle:
        ended |= {delta.id: delta.output for delta in serving.step()}
        plans = [plan for flight in serving._flights for plan in flight.plans]
        chunks += any(plan is not None and bool(plan.chunks) for plan in plans)
    output = ended["tapped"]
    assert chunks > 1
    tokens, found = PROMPT + output.token_ids[:-1], output.taps
    assert found["attn_probs"].shape[2:] == (len(tokens), len(tokens))
    wanted = reference(theirs, tokens)
    close(found["resid"][:-1], wanted.pop("resid"))
    for point in ("k", "v"):
        kept = wanted.pop(point)  # transformers keeps no more than a window; our pages, all
        if len(kept[0]) == len(tokens) and len(kept) == len(found[point]):
            close(found[point], kept)
    for point, value in wanted.items():
        close(found[point], value)


def test_maps_are_the_softmax_of_queries_and_keys(models):
    """Also where they are patched, and heads are values mixed by them."""
    config = models("llama")[1].model.config
    shape, rng = (config.num_kv_heads, config.head_dim), np.random.default_rng(1)
    patches = (
        Patch("k", rng.normal(size=shape), 1, position=3),
        Patch("v", rng.normal(size=shape), 1, position=22, mode="add"),
        Patch("q", rng.normal(size=(config.num_heads, config.head_dim)), 1, mode="add"),
    )
    taps = Taps(record=("q", "k", "v", "attn_probs", "heads"), layers=(1,), patches=patches)
    (output,) = engine(models("llama")[1]).generate([PROMPT], ASKED, taps=taps)
    assert output.taps is not None
    q, k, v, maps, heads = (output.taps[point][0] for point in taps.record)
    close(k[3], patches[0].value)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / q.shape[-1] ** 0.5
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    close(maps, weights)
    close(heads, np.einsum("nts,snh->tnh", weights, v))


def hooked(theirs, patches, tokens):
    """Logits of transformers with hooks that do what patches say."""

    def change(patch, x):
        x, value = x.clone(), torch.tensor(patch.value).reshape(-1)
        at = slice(None) if patch.position is None else patch.position
        x[0, at] = value if patch.mode == "replace" else x[0, at] + value
        return x

    def after(patch):
        return lambda module, given, out: (
            (change(patch, out[0]), *out[1:]) if isinstance(out, tuple) else change(patch, out)
        )

    with contextlib.ExitStack() as stack, torch.no_grad():
        for patch in patches:
            attention, projection, mlp, block = parts(theirs, patch.layer)
            if patch.point == "heads":
                before = lambda module, given, patch=patch: (change(patch, given[0]),)  # noqa: E731
                hook = projection.register_forward_pre_hook(before)
            else:
                modules = {"attn_out": attention, "mlp_out": mlp, "resid": block}
                modules |= {"embed": theirs.model.embed_tokens, "final": theirs.model.norm}
                modules |= {"v": attention.v_proj}
                hook = modules[patch.point].register_forward_hook(after(patch))
            stack.callback(hook.remove)
        return theirs(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize(
    ("mode", "at"), [("replace", (3, 20)), ("replace", (21, 28)), ("add", (0, 29)), ("add", None)]
)
def test_patches_are_what_hooks_of_torch_do(models, mode, at):
    """At every point that has a module, in a prompt's chunks, at new tokens, at all tokens."""
    theirs, llm = models("llama")
    config, rng = llm.model.config, np.random.default_rng(3)
    shapes = {"heads": (config.num_heads, config.head_dim), "v": (config.num_kv_heads, config.head_dim)}
    patches = []
    for i, point in enumerate(("embed", "v", "heads", "attn_out", "mlp_out", "resid", "final")):
        layer = 0 if point in ("embed", "final") else i % config.num_layers
        position = None if at is None else int(rng.integers(*at))
        value = rng.normal(size=shapes.get(point, config.embed_dim))
        patches.append(Patch(point, value, layer, position, mode))
    taps = Taps(("final",), patches=tuple(patches))
    (output,) = engine(llm).generate([PROMPT], ASKED, taps=taps)
    logits, found = whole(llm, output, taps)
    expected = hooked(theirs, patches, PROMPT + output.token_ids[:-1])
    close(logits, expected, 5e-5)
    assert output.taps is not None
    close(output.taps["final"], found["final"], 5e-5)
    assert output.token_ids == expected[len(PROMPT) - 1 :].argmax(-1).tolist()


def test_patches_at_one_place_go_together(models):
    """Those that replace go first, those that add are summed; the last layers see the result."""
    llm = models("gpt2")[1]
    width = llm.model.config.embed_dim
    ones, twos = np.ones(width), np.full(width, 2.0)
    patches = (
        Patch("resid", ones, 1, 4, "add"),
        Patch("resid", twos, 1, 4),
        Patch("resid", ones, 1, mode="add"),
        Patch("resid", twos, 2),
    )
    plain, patched = (
        run_with_taps(llm.model, llm.params, [PROMPT], Taps(("resid",), None, p))[1]["resid"][:, 0]
        for p in ((), patches)
    )
    close(patched[1, 4], np.full(width, 4.0))
    close(patched[1, 5:], plain[1, 5:] + 1)
    close(patched[2], np.tile(twos, (len(PROMPT), 1)))
    np.testing.assert_array_equal(patched[0], plain[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"overlap": False, "prefix_cache": False},
        {"preemption": "offload", "host_pages": 8},
        pytest.param({"pages": (40,)}, marks=SLOW),
        pytest.param({"speculation": "prompt_lookup", "draft_tokens": 3}, marks=SLOW),
    ],
)
def test_records_are_whole_however_they_came(models, changes):
    """Chunks, samples that share a prompt, pages that run out, drafts: every token once."""
    llm = models("gpt2")[1]
    serving, asked = engine(llm, **changes), dataclasses.replace(ASKED, n=2, temperature=1.0, seed=3)
    ramp = np.linspace(-1, 1, llm.model.config.embed_dim)
    first = Taps(**SOME, patches=(Patch("resid", ramp, 1, 25),))
    third = Taps(SOME["record"], (0, 2), (Patch("resid", ramp, 0, mode="add"),))
    taps, prompts = [first, None, third], [PROMPT, PROMPT, [7, 8, 9] * 7]
    outputs = serving.generate(prompts, asked, taps=taps)
    for output, wanted in zip(outputs, [t for t in taps for _ in range(2)], strict=True):
        if wanted is None:
            assert output.taps is None
        else:
            same_records(output.taps, whole(llm, output, wanted)[1])
    assert (serving.schedulers[0].statistics.preemptions > 0) == ("pages" not in changes)
    if "speculation" in changes:
        assert any(key[0] == "verify" for key in serving.runner.programs._compiled)


@SLOW
@pytest.mark.parametrize("mesh", ["data:2", "data:2,tensor:2"])
def test_meshes(models, mesh):
    one = models("llama")[1]
    mesh = make_mesh(mesh)
    params = jax.device_put(jax.device_get(one.params), one.model.shardings(mesh))
    serving = engine(LLM.from_params(one.model, params, None, mesh=mesh))
    taps = Taps(("q", "attn_probs", "final"), patches=(Patch("resid", np.ones(48), 0, 2, "add"),))
    outputs = serving.generate([PROMPT, *OTHERS], ASKED, taps=[taps, None, taps])
    for output in (outputs[0], outputs[2]):
        same_records(output.taps, whole(one, output, taps)[1])


def test_others_in_the_same_steps_do_not_notice(models):
    """They get what they get alone, and whatever a patch does not one bit of theirs changes."""
    llm = models("gpt2")[1]
    alone, serving, found = llm.generate(OTHERS, ASKED), engine(llm, prefix_cache=False), []
    for size in (0.0, 50.0):
        steer = Patch("resid", np.full(llm.model.config.embed_dim, size), 0, mode="add")
        taps = [Taps(**SOME, patches=(steer,)), None, None]
        outputs = serving.generate([PROMPT, *OTHERS], ASKED, taps=taps)[1:]
        found.append([output.logprobs for output in outputs])
        assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
        np.testing.assert_allclose(found[-1], [o.logprobs for o in alone], atol=1e-5)
    assert found[0] == found[1]


@SLOW
def test_nothing_is_compiled_for_requests_without_taps(models):
    """Neither before one with taps, nor beside it, nor after."""
    serving = engine(models("gpt2")[1], compile_ahead=True)
    for taps in (None, [None, EVERYTHING, None], None):
        serving.generate([PROMPT, *OTHERS], ASKED, taps=taps)
        assert serving.misses == 0


def test_a_step_without_what_is_patched_has_the_plain_program(models):
    llm = models("gpt2")[1]
    patch = Patch("embed", np.ones(llm.model.config.embed_dim), position=2)
    serving = engine(llm)
    made = []
    run = serving.runner._forward
    serving.runner._forward = lambda shape, taps: (made.append(taps is not None), run(shape, taps))[1]
    serving.generate([PROMPT], ASKED, taps=Taps(patches=(patch,)))
    assert made == [True] + [False] * 8


def test_patched_pages_are_no_ones_prefix(models):
    llm = models("gpt2")[1]
    serving, statistics = engine(llm), lambda: serving.schedulers[0].statistics
    patch = Patch("embed", np.ones(llm.model.config.embed_dim), position=2)
    (before,) = serving.generate([PROMPT], ASKED)
    (patched,) = serving.generate([PROMPT], ASKED, taps=Taps(patches=(patch,)))
    assert statistics().hit_tokens == 0, "it did not take what was computed without its patch"
    assert patched.taps is None and patched.logprobs != before.logprobs
    fresh = engine(llm)
    fresh.generate([PROMPT], ASKED, taps=Taps(patches=(patch,)))
    assert fresh.generate([PROMPT], ASKED)[0].token_ids == before.token_ids
    assert fresh.schedulers[0].statistics.hit_tokens == 0, "nor did it leave any"


def test_programs_without_taps_are_what_they_would_be(models, monkeypatch):
    """The same StableHLO, character by character, as of a model that never calls `tap`."""
    llm = models("gpt2")[1]
    serving = engine(llm)
    model, (params, caches, slots) = serving.llm.model, serving.runner.programs._like
    shape = serving.runner.programs.buckets.shape(3, 16)

    def loss(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(8)[None], tokens.shape)
        net = model.bind(params)
        hidden, _ = net(tokens, positions, FullContext(jnp.ones_like(tokens), jax.random.key(0)))
        return net.unembed(hidden).sum()

    def texts():
        with jax.set_mesh(llm.mesh):
            step = make_paged_forward.__wrapped__(model, shape).lower(
                params, caches[0], slots.newest, serving.runner.programs._packed(shape)
            )
        tokens = jax.ShapeDtypeStruct((2, 8), np.int32)
        train = jax.jit(lambda *x: jax.value_and_grad(loss)(*x)).lower(model.shapes, tokens)
        return step.as_text(), train.as_text()

    found = texts()
    monkeypatch.setattr(transformer, "tap", lambda context, point, x, layer: (x, context))
    assert found == texts()


def test_cancelled_and_streamed(models):
    """Records come with the last delta, also of a request that was cancelled."""
    serving, last = engine(models("gpt2")[1]), {}
    names = [serving.add(PROMPT, ASKED, taps=EVERYTHING) for _ in range(2)]
    for steps in range(100):
        if steps == 4:
            serving.cancel(names[1])
        for delta in serving.step():
            assert (delta.output.taps is None) == (delta.finish_reason is None)
            last[delta.id] = delta.output
        if serving.idle:
            break
    full, cut = (last[name].taps["final"] for name in names)
    assert len(full) == len(PROMPT) + 8 and 0 < len(cut) < len(full)
    close(cut, full[: len(cut)])


def test_an_encoder_is_looked_into_without_an_engine(models):
    theirs, llm = models("bert masked")
    tokens = np.random.default_rng(2).integers(3, tiny.VOCAB, (2, 11))
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), output_hidden_states=True, output_attentions=True)
    logits, found = run_with_taps(llm.model, llm.params, tokens, Taps(("resid", "attn_probs")))
    close(np.asarray(logits), out.logits)
    close(found["resid"], np.stack(out.hidden_states[1:]))
    close(found["attn_probs"], np.stack(out.attentions))


REFUSED = {
    r"Taps.record='middle'": lambda: Taps(("middle",)),
    r"Taps.record='resid': expected a tuple": lambda: Taps("resid"),
    r"Taps.record=\('q', 'q'\)": lambda: Taps(("q", "q")),
    r"Taps.layers=\(1, 1\)": lambda: Taps(("q",), (1, 1)),
    r"Taps.layers=-1": lambda: Taps(("q",), (-1,)),
    r"Taps.layers=\(\)": lambda: Taps(("q",), ()),
    r"Taps\(\): expected something": lambda: Taps(),
    r"Patch.point='attn_probs'": lambda: Patch("attn_probs", [1.0]),
    r"Patch.mode='times'": lambda: Patch("resid", [1.0], mode="times"),
    r"Patch.layer=1 of 'embed'": lambda: Patch("embed", [1.0], 1),
    r"Patch.position=-1": lambda: Patch("embed", [1.0], position=-1),
    r"Patch.value at 'embed' has nan or inf": lambda: Patch("embed", [np.nan]),
    r"replace 'q' of layer 0 twice at position=3": lambda: Taps(
        patches=(Patch("q", [1.0]), Patch("q", [2.0], position=3))
    ),
}
REFUSED_BY_AN_ENGINE = {
    r"Taps.layers=3: expected a layer from 0 to 2": Taps(("q",), (3,)),
    r"Taps.record='router': the model has no experts": Taps(("router",)),
    r"Patch.point='router': the model has no experts": Taps(patches=(Patch("router", np.ones(8)),)),
    r"Patch.layer=7": Taps(patches=(Patch("resid", np.ones(48), 7),)),
    r"has shape \(3,\): expected \(48,\)": Taps(patches=(Patch("resid", [1, 2, 3]),)),
    r"Patch.position=29: expected less than 29": Taps(patches=(Patch("resid", np.ones(48), 0, 29),)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_when_made(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_refused_when_added(models):
    serving = engine(models("gpt2")[1])
    for message, taps in REFUSED_BY_AN_ENGINE.items():
        with pytest.raises(ValueError, match=message):
            serving.add(PROMPT, ASKED, taps=taps)
    assert serving.idle
    with pytest.raises(ValueError, match="taps with strict_numerics=True"):
        engine(models("gpt2")[1], strict_numerics=True).add(PROMPT, ASKED, taps=EVERYTHING)
    with pytest.raises(ValueError, match="taps has 1 entries for 2 prompts"):
        serving.generate([PROMPT, PROMPT], ASKED, taps=[EVERYTHING])
    with pytest.raises(ValueError, match=r"tokens has shape \(21,\)"):
        run_with_taps(serving.llm.model, serving.llm.params, PROMPT, EVERYTHING)
    assert llm_jax.Taps is Taps and llm_jax.Patch is Patch
