"""Two steps of every task that scripts/train.py knows and that runs in many processes.

    launch/local.sh 2 python tests/distributed/all_tasks.py FOLDER

FOLDER holds what `write_data` writes. The results go to FOLDER/many/TASK/results.json.
"""

import json
import runpy
from pathlib import Path

from llm_jax import cli
from llm_jax.distributed import is_main
from llm_jax.eval.runs import TASKS
from llm_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "llm_jax" / "assets" / "demo_lm")
OPTIM = {"learning_rate": 1e-2}
MODEL = {
    "family": "llama",
    "vocab_size": 300,
    "num_layers": 1,
    "embed_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 16,
    "max_positions": 64,
}
ENCODER = MODEL | {"causal": False}
LORA = {"rank": 2, "targets": ("attn/w[qv]$",)}


def write_data(folder):
    """Small data of each kind."""
    words = [f"one two {i % 5} four {i * i}" for i in range(60)]
    (folder / "lines.txt").write_text("\n".join(words) + "\n")
    rows = [f"{words[i]}\t{words[-i]} five\n" for i in range(40)]
    (folder / "pairs.tsv").write_text("zh\ten\n" + "".join(rows))
    texts = [{"context": f"{text}. The answer is {i}.", "qas": []} for i, text in enumerate(words[:20])]
    for i, text in enumerate(texts):
        place = text["context"].index(f"is {i}") + 3
        qa = {"id": str(i), "question": "What is it?", "answers": [str(i)], "answer_starts": [place]}
        text["qas"].append(qa)
    lines = (json.dumps(text) + "\n" for text in texts)
    (folder / "questions.jsonl").write_text("".join(lines))


def settings(folder):
    """{name: settings of a task}; their "task" says which."""
    template = runpy.run_path(str(ROOT / "configs" / "sft.py"))["TEMPLATE"]
    lines, common = (
        str(folder / "lines.txt"),
        {"optim": OPTIM, "batch_size": 4, "steps": 2, "log_every": 1},
    )
    texts = {"data": ((lines, "", 1.0),), "row_tokens": 32, "eval_fraction": 0.1}
    chats = {"init_from": DEMO, "chat_template": template, "row_tokens": 96}
    own = ROOT / "configs" / "data"
    tasks = {
        "masked_lm": {"data": lines, "model": ENCODER | {"head": "masked_lm"}, "row_tokens": 32},
        "sft": {"data": str(own / "chats" / "train.jsonl"), **chats, "lora": LORA},
        "dpo": {"data": str(own / "preferences" / "train.jsonl"), **chats},
        "draft_head": texts | {"base": DEMO, "width": 8},
        "word_vectors": {"data": lines, "vocab_size": 300, "embed_dim": 8, "row_tokens": 32},
        "translation": {
            "data": str(folder / "pairs.tsv"),
            "source_field": "zh",
            "target_field": "en",
            "model": MODEL,
            "row_tokens": 64,
            "eval_fraction": 0.2,
        },
        "question_answering": {
            "data": str(folder / "questions.jsonl"),
            "model": ENCODER | {"head": "span", "token_types": 2},
            "max_tokens": 64,
            "question_tokens": 16,
            "overlap": 16,
            "answer_tokens": 16,
            "pretrain": common,
        },
    }
    distilled = texts | {"model": MODEL, "distill": {"teacher": DEMO}, "task": "lm"}
    named = {name: {"task": name} | values for name, values in tasks.items()} | {"distilled": distilled}
    return {name: common | values for name, values in named.items()}


def train(folder, workdir, mesh):
    """{name: results} of all of them, in workdir/NAME."""
    mesh = make_mesh(mesh)
    return {
        name: TASKS[values["task"]](values, workdir / name, mesh, None)
        for name, values in settings(folder).items()
    }


def main(argv):
    folder = Path(argv[1])
    results = train(folder, folder / "many", "data:2")
    if is_main():
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    cli.run(main)
