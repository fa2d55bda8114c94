"""Kill a training run again and again, and see that nobody could tell from its curve.

    python scripts/soak.py --config=configs/sentiment.py --workdir=/tmp/soak --kills=20 --seed=0 \
        -- --config.model.num_layers=1

Runs scripts/train.py once undisturbed in WORKDIR/whole and once in WORKDIR/killed, where each of its
processes but the last gets a signal at a random moment: at start, in a step, in a save. Then the
records of metrics.jsonl must be the same to the last bit, but for times and speeds. What follows "--"
goes to scripts/train.py. The exit status is 1 when they differ.
"""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from llm_jax import cli
from llm_jax.train.metrics_log import read_metrics

CONFIG = flags.DEFINE_string("config", None, "Config file, as for scripts/train.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where both runs go.")
KILLS = flags.DEFINE_integer("kills", 20, "How many times the run is killed.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
STEPS = flags.DEFINE_integer("steps", 60, "Optimizer steps of the run.")
EVERY = flags.DEFINE_integer("checkpoint_every", 3, "Steps between checkpoints.")
SIGNALS = flags.DEFINE_list("signals", ["KILL"], "Drawn from for each kill: KILL, TERM, INT.")
JSON = flags.DEFINE_bool("json", False, "Print the report as a JSON object.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
    train = Path(__file__).with_name("train.py")
    every = [f"--config.{name}={EVERY.value}" for name in ("checkpoint_every", "eval_every")]
    settings = [f"--config.steps={STEPS.value}", "--config.log_every=1", *every, *argv[1:]]
    command = [sys.executable, str(train), f"--config={CONFIG.value}", *settings]
    workdir, rng, seconds = Path(WORKDIR.value), random.Random(SEED.value), time.time()
    whole, killed = ([*command, f"--workdir={workdir / name}"] for name in ("whole", "killed"))
    run(whole)
    ends, saving = [], 0
    for target in sorted(rng.randrange(STEPS.value) for _ in range(KILLS.value)):
        process = subprocess.Popen(killed, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        ends.append(kill(process, workdir / "killed", target, rng))
        saving += any((workdir / "killed" / "checkpoints").glob("*.orbax-checkpoint-tmp"))
    run(killed)
    expected, found = records(workdir / "whole"), records(workdir / "killed")
    report = {
        "kills": sum(end != 0 for end in ends),
        "in_a_save": saving,
        "exit_statuses": {str(end): ends.count(end) for end in sorted(set(ends))},
        "records": len(expected),
        "different": sum(a != b for a, b in itertools.zip_longest(expected, found)),
        "seconds": round(time.time() - seconds),
    }
    print(json.dumps(report) if JSON.value else "\n".join(f"{k}: {v}" for k, v in report.items()))
    sys.exit(int(report["different"] > 0))


def run(command):
    """Run to the end; what it says is shown when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr}")


def kill(process, workdir, target, rng):
    """Send a signal within a second after step `target` is recorded; how the process ended."""
    started = time.time()
    if rng.random() < 0.1:
        time.sleep(rng.uniform(0, 5))  # before there is a step
    else:
        while process.poll() is None:
            newest = read_metrics(workdir / "metrics.jsonl")[-1:]
            if any(r["step"] >= target and r["time"] > started for r in newest):
                break
            time.sleep(0.01)
        time.sleep(rng.choice([0.0, rng.uniform(0, 1)]))
    process.send_signal(signal.Signals[f"SIG{rng.choice(SIGNALS.value)}"])
    return process.wait()


def records(workdir):
    """The records without what differs from run to run."""
    kept = lambda name: name != "time" and not name.startswith("perf/")  # noqa: E731
    found = read_metrics(workdir / "metrics.jsonl")
    return [{name: r[name] for name in filter(kept, r)} for r in found]


if __name__ == "__main__":
    cli.run(main)
