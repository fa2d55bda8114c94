"""A program in one process and in many: curves, tokens, checkpoints, data, logs; and lost processes."""

import json
import os
import re
import shutil
import signal
import textwrap
import time

import numpy as np
import pytest

from llm_jax import LLM, SamplingParams
from llm_jax.checkpoint.store import latest_step
from llm_jax.config import ClassificationConfig, LanguageModelConfig, from_dict
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.distributed import LOST
from llm_jax.sharding import make_mesh
from llm_jax.train import classification, language_model
from llm_jax.train.metrics_log import read_metrics
from tests import tiny as tiny_models
from tests.distributed import tiny_member
from tests.distributed.launching import ROOT, TOLERANCE, assert_same_curve, numbers, run, start

pytestmark = pytest.mark.slow
TINY = ROOT / "tests" / "distributed" / "tiny_member.py"
TRAIN = ROOT / "scripts" / "train.py"

CONFIG = """
    import os
    import ml_collections
    MODEL = dict(
        family="llama", vocab_size=300, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=4,
        head_dim=4, mlp_dim=32, max_positions=32, **{more},
    )
    def get_config():
        return ml_collections.ConfigDict(dict(
            task={task!r}, data={data!r}, model=MODEL, batch_size=8, log_every=1, checkpoint_every=5,
            seed=3, optim=dict(learning_rate=1e-2, ema_decay=0.9), **{settings},
        ))
"""


def write_config(folder, task, data, more=None, **settings):
    path = folder / "config.py"
    values = {"task": task, "data": data, "more": more or {}, "settings": settings}
    path.write_text(textwrap.dedent(CONFIG).format(**values))
    return path


def settings_of(path):
    """What a config file says."""
    names = {}
    exec(path.read_text(), names)
    return names["get_config"]().to_dict()


def assert_only_process_0_logs(said):
    assert "[0] step 1 " in said
    assert not re.search(r"^\[[1-9]\] step", said, re.MULTILINE)


# Training


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 4, "data:2,fsdp:2,tensor:2"), (4, 2, "data:2,tensor:4")],
)
def test_a_language_model_trains_as_in_one_process(processes, devices, mesh, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("".join(f"one two three {i % 7} five {i * i}\n" for i in range(200)))
    data = ((str(text), "", 1.0),)
    path = write_config(tmp_path, "lm", data, row_tokens=24, steps=10, eval_fraction=0.1)
    config = from_dict(LanguageModelConfig, settings_of(path))
    alone = language_model.run(config, tmp_path / "one", make_mesh(mesh))

    flags = f"--config={path}", f"--workdir={tmp_path}/many", f"--mesh={mesh}", "--json"
    out = run(tmp_path, processes, devices, TRAIN, *flags)
    assert_same_curve(tmp_path / "many", tmp_path / "one")
    results = json.loads((tmp_path / "many" / "results.json").read_text())
    assert results["loss"] == pytest.approx(alone.loss, rel=TOLERANCE)
    assert {line.split()[0] for line in out.splitlines()} == {"[0]"}, "the others print nothing"
    assert_only_process_0_logs((tmp_path / "err").read_text())


def test_a_classifier_trains_as_in_one_process(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for i in range(120):
        words = rng.choice(["the", "a", "red", "old", "and"], rng.integers(2, 9))
        rows.append(f"{('good', 'bad')[i % 2]}\t{' '.join(words)} {('apple', 'saw')[i % 2]} {i}\n")
    table = tmp_path / "table.tsv"
    table.write_text("label\ttext\n" + "".join(rows))
    more = {"head": "classifier", "causal": False, "pooling": "mean", "num_classes": 9}
    settings = {"epochs": 1.0, "max_tokens": 24, "eval_fraction": 0.25, "token_dropout": 0.1}
    path = write_config(tmp_path, "classification", str(table), more, **settings)
    config = from_dict(ClassificationConfig, settings_of(path))
    alone = classification.run(config, tmp_path / "one", make_mesh("data:2,tensor:2"))

    flags = f"--config={path}", f"--workdir={tmp_path}/many", "--mesh=data:2,tensor:2"
    run(tmp_path, 2, 2, TRAIN, *flags)
    assert_same_curve(tmp_path / "many", tmp_path / "one")
    results = json.loads((tmp_path / "many" / "results.json").read_text())
    assert results["accuracy"] == pytest.approx((alone.gold == alone.predicted).mean())


# Generation


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 2, "data:2,tensor:2"), (4, 1, "tensor:4"), (2, 3, "tensor:6")],
)
def test_generation_has_the_tokens_of_one_process(processes, devices, mesh, tmp_path):
    """The last of a model with 2 key heads, of which each process reads those of its devices."""
    prompts = ["我喜欢编程。", "Once upon a time", "今天"]
    sampling = SamplingParams(max_new_tokens=20, temperature=0.8, top_p=0.9, seed=5, n=2)
    model = None
    if mesh == "tensor:6":
        model = tmp_path / "model"
        tiny_models.DECODERS["qwen2"].save_for(model, ByteTokenizer(), max_position_embeddings=128)
    wanted = LLM(model, mesh=make_mesh(mesh)).generate(prompts, sampling)
    flags = [f"--prompt={prompt}" for prompt in prompts]
    flags += [] if model is None else [f"--model={model}"]
    flags += [
        "--max_new_tokens=20",
        "--temperature=0.8",
        "--top_p=0.9",
        "--seed=5",
        "--num_return_sequences=2",
    ]
    script = ROOT / "scripts" / "generate.py"
    out = run(tmp_path, processes, devices, script, *flags, f"--mesh={mesh}", "--json")
    found = [json.loads(line.removeprefix("[0] ")) for line in out.splitlines()]
    assert [one["token_ids"] for one in found] == [output.token_ids for output in wanted]


# Checkpoints, data, faults: tiny_member.py


def tiny(folder, processes, devices, **settings):
    return start(folder, processes, devices, TINY, folder / "run", json.dumps(settings))


def rows_read(workdir, processes):
    """{step: records of the global batch}, of which each process has read its own part."""
    found = {}
    for process in range(processes):
        for line in (workdir / f"rows.{process}.txt").read_text().splitlines():
            step, records = line.split(": ")
            found.setdefault(int(step), []).append(tuple(map(int, records.split())))
    return found


def last_step(folder):
    return max((r["step"] for r in read_metrics(folder / "run" / "metrics.jsonl")), default=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The tiny run on two processes of two devices."""
    folder = tmp_path_factory.mktemp("undisturbed")
    running = tiny(folder, 2, 2, mesh="data:4")
    assert running.finish() == 0, running.said()
    assert_only_process_0_logs(running.said())
    return folder / "run"


def test_rows_are_read_once_in_total(undisturbed, tmp_path):
    tiny_member.train(tmp_path, mesh="data:4")
    assert_same_curve(undisturbed, tmp_path)
    parts, whole = rows_read(undisturbed, 2), rows_read(tmp_path, 1)
    assert parts.keys() == whole.keys()
    for step, (batch,) in whole.items():
        assert sum(parts[step], ()) == batch and len(parts[step]) == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_and_a_restart_resumes_exactly(victim, undisturbed, tmp_path):
    running = tiny(tmp_path, 2, 2, mesh="data:4", pause=0.2, silence=10.0)
    running.wait_for(lambda: last_step(tmp_path) >= 8)
    os.kill(int((tmp_path / "run" / f"pid.{victim}").read_text()), signal.SIGKILL)
    began = time.monotonic()
    assert running.finish() == 128 + signal.SIGKILL  # the first to fail
    assert time.monotonic() - began < 60
    assert f"process {1 - victim} of 2 ends (status {LOST}): process {victim}" in running.said()

    assert 1 < latest_step(tmp_path / "run" / "checkpoints") < 24
    again = tiny(tmp_path, 2, 2, mesh="data:4")
    assert again.finish() == 0, again.said()
    assert numbers(tmp_path / "run") == numbers(undisturbed)
    assert all(len(set(parts)) == 2 for parts in rows_read(tmp_path / "run", 2).values())


def test_a_frozen_process_is_reported_by_what_it_missed(tmp_path):
    running = tiny(tmp_path, 2, 1, mesh="data:2", pause=0.2, silence=10.0)
    running.wait_for(lambda: last_step(tmp_path) >= 3)
    pid = int((tmp_path / "run" / "pid.1").read_text())
    os.kill(pid, signal.SIGSTOP)
    running.wait_for(lambda: "process 0 ended" in running.said())
    os.kill(pid, signal.SIGKILL)
    assert running.finish() == LOST
    pattern = r"process 1 \(pid \d+ on .*\) has given no sign of life.* missed at '.*step \d+'"
    assert re.search(pattern, running.said())


def test_a_hanging_process_is_reported_by_what_it_missed(tmp_path):
    settings = json.dumps({"mesh": "data:2", "hang": [1, 6]})
    limit = {"LLM_JAX_BARRIER_TIMEOUT": "8"}
    running = start(tmp_path, 2, 1, TINY, tmp_path / "run", settings, **limit)
    assert running.finish() == LOST
    assert re.search(r"process 1 \(.*\) lives, but hangs.* missed at 'step 7'", running.said())


def test_a_signal_to_one_saves_all_and_fewer_processes_go_on(tmp_path):
    (tmp_path / "many").mkdir()
    options = {"steps": 400, "checkpoint_every": 1000, "eval_every": 0, "mesh": "data:4,tensor:2"}
    running = tiny(tmp_path / "many", 4, 2, pause=0.05, **options)
    running.wait_for(lambda: last_step(tmp_path / "many") >= 3)
    os.kill(int((tmp_path / "many" / "run" / "pid.2").read_text()), signal.SIGTERM)
    assert running.finish() == 75, running.said()
    assert len(re.findall(r"SIGTERM: step (\d+) is saved", running.said())) == 4
    assert len(set(re.findall(r"SIGTERM: step (\d+) is saved", running.said()))) == 1

    for name in ("two", "one"):
        (tmp_path / name).mkdir()
        shutil.copytree(tmp_path / "many" / "run", tmp_path / name / "run")
    again = tiny(tmp_path / "two", 2, 4, **options)
    assert again.finish() == 0, again.said()
    tiny_member.train(tmp_path / "one" / "run", **options)
    (tmp_path / "alone").mkdir()
    tiny_member.train(tmp_path / "alone", **options)
    for name in ("two", "one"):
        assert_same_curve(tmp_path / name / "run", tmp_path / "alone")


# Processes that are not the same


def test_different_configs_do_not_start(tmp_path):
    path = write_config(tmp_path, "lm", "absent.txt", row_tokens=24, steps=10)
    path.write_text(path.read_text().replace("seed=3", 'seed=int(os.environ["JAX_PROCESS_ID"])'))
    running = start(
        tmp_path, 2, 1, TRAIN, f"--config={path}", f"--workdir={tmp_path}/run", "--mesh=data:2"
    )
    assert running.finish() == 2
    said = running.said()
    assert "the processes differ in their config:\n" in said
    assert "seed: 0 in process 0; 1 in process 1" in said
    assert not (tmp_path / "run").exists()


def test_different_commands_and_sources_do_not_start(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "llm_jax", other / "llm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "llm_jax" / "tree.py").open("a") as file:
        file.write("# another version\n")
    (tmp_path / "small.py").write_text(
        textwrap.dedent("""
            import os, sys
            if os.environ["JAX_PROCESS_ID"] == "1":
                sys.path.insert(0, sys.argv[1]) if len(sys.argv) == 2 else sys.argv.append("more")
            from llm_jax import cli
            cli.run(lambda argv: print("it goes on"))
        """)
    )
    for arguments, difference in (
        ([other], "differ in their code:\n[0]   sources: "),
        ([], 'differ in their command line:\n[0]   arguments: [] in process 0; ["more"] in process 1'),
    ):
        running = start(tmp_path, 2, 1, tmp_path / "small.py", *arguments)
        assert running.finish() == 2
        assert difference in running.said() and not running.said("out")
