"""The tiny run of tests/train/tiny_run.py as one of several processes, which can be told to misbehave.

    launch/local.sh 2 python tests/distributed/tiny_member.py WORKDIR '{"mesh": "data:2", "pause": 0.1}'

Each process notes the rows that it reads in WORKDIR/rows.PROCESS.txt, as "step: records", and its pid in
WORKDIR/pid.PROCESS.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import jax

from llm_jax import cli, distributed
from llm_jax.data.loader import PackedLoader, this_host
from llm_jax.models import describe
from llm_jax.sharding import make_mesh
from llm_jax.train.loop import Task, fit, make_evaluate
from tests.train.tiny_run import MODEL, TRAIN, bigram_loss, rows


@dataclasses.dataclass
class Noted:
    """Notes the rows that it reads, takes `pause` seconds for a batch, and gives none from `hang` on."""

    loader: PackedLoader
    path: Path
    pause: float
    hang: int

    @property
    def fingerprint(self):
        return self.loader.fingerprint

    def __call__(self, step):
        time.sleep(1000 if step == self.hang else self.pause)
        with self.path.open("a") as file:
            records = self.loader.order.indices(step)[self.loader.part]
            file.write(f"{step}: {' '.join(map(str, records))}\n")
        return self.loader(step)


def train(workdir, *, mesh, pause=0.0, hang=(0, -1), **settings):
    """Train in `workdir`. hang: the process, and the step, from 0, whose rows it never has."""
    model, mesh, data = describe(MODEL), make_mesh(mesh), rows()
    process, step = hang
    config = dataclasses.replace(TRAIN, **settings)
    loader = Noted(
        PackedLoader(data, config.batch_size, config.seed, **this_host(mesh)),
        workdir / f"rows.{jax.process_index()}.txt",
        pause,
        step if jax.process_index() == process else -1,
    )
    held_out = [{name: values[:8] for name, values in data.items()}]
    task = Task(model, bigram_loss, loader, make_evaluate(model, bigram_loss, held_out, mesh))
    return fit(task, config, mesh, workdir, steps=config.steps)


def main(argv):
    workdir, settings = Path(argv[1]), json.loads(argv[2])
    workdir.mkdir(exist_ok=True)
    (workdir / f"pid.{jax.process_index()}").write_text(str(os.getpid()))
    distributed.SILENCE = settings.pop("silence", distributed.SILENCE)
    train(workdir, **settings)
    print(f"process {jax.process_index()} is done", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
