"""The settings that every training run has: its optimizer, length, records and checkpoints."""

import dataclasses
import re
from typing import ClassVar

from llm_jax.config.checks import choice, require, unread

# The optimizers, and which of these settings each of them reads; the other settings serve them all.
OPTIMIZERS = {
    "adamw": ("b1", "b2", "eps"),  # Loshchilov & Hutter 2019
    "adafactor": (),  # Shazeer & Stern 2018; learning_rate is relative to the RMS of each parameter
    "lion": ("b1", "b2"),  # Chen et al. 2023
    "muon": ("momentum", "b1", "b2", "eps"),  # Jordan et al. 2024 on the layers' matrices, else AdamW
    "sgd": ("momentum",),  # with momentum
}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimizer, its learning rate over time, clipping, weight decay (decoupled) and averaging."""

    learning_rate: float  # at the end of the warmup
    schedule: str = "cosine"  # "cosine" | "linear" | "constant" | "wsd", after a linear warmup from 0
    warmup_fraction: float = 0.05  # of all steps
    final_fraction: float = 0.0  # learning rate of the last step / learning_rate
    optimizer: str = "adamw"  # of OPTIMIZERS
    decay_fraction: float = 0.2  # of all steps; wsd is constant, then falls linearly over these
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices and embeddings; never on norms and biases
    clip_norm: float = 1.0  # largest global norm of the gradient; 0 = no clipping
    ema_decay: float = 0.0  # of a moving average of the parameters, used for evaluation; 0 = none

    def __post_init__(self):
        require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "positive")
        choice("optim.schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
        choice("optim.optimizer", self.optimizer, tuple(OPTIMIZERS))
        for name in ("warmup_fraction", "final_fraction", "decay_fraction"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "in [0, 1]")
        for name in ("momentum", "b1", "b2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more")
        require(self.eps > 0, "optim.eps", self.eps, "positive")
        other = tuple(
            name for name in ("momentum", "b1", "b2", "eps") if name not in OPTIMIZERS[self.optimizer]
        )
        unread(self, other, f"optimizer={self.optimizer!r}", "optim.")
        if self.schedule != "wsd":
            unread(self, "decay_fraction", f"schedule={self.schedule!r}", "optim.")
        if self.schedule == "constant":
            unread(self, "final_fraction", "schedule='constant'", "optim.")
        require(
            self.schedule != "wsd" or self.warmup_fraction + self.decay_fraction <= 1,
            "optim.decay_fraction",
            self.decay_fraction,
            f"at most 1 - warmup_fraction={1 - self.warmup_fraction}",
        )


# Settings of a run that may differ when it is resumed: how it is watched, kept and mended.
MAY_CHANGE = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep",
    "keep_best",
    "best_metric",
    "keep_every",
    "on_bad_loss",
    "spike_factor",
    "max_rollbacks",
    "wandb_project",
    "profile_steps",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training run has: how to optimize, how long, how often to log, evaluate and save."""

    optional: ClassVar[bool] = False  # whether `steps` and `epochs` may both be 0: no training
    optim: OptimConfig
    batch_size: int  # rows per optimizer step, over all devices
    steps: int = 0  # optimizer steps; 0 = as many as `epochs` makes
    epochs: float = 0.0  # passes over the training data, where `steps` is 0
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    seed: int = 0
    log_every: int = 10  # steps; all of these count optimizer steps
    eval_every: int = 0  # 0 = at the end only
    checkpoint_every: int = 0  # 0 = at the end only
    keep: int = 2  # newest checkpoints that stay
    keep_best: int = 0  # best ones that stay besides; each checkpoint is then evaluated as it is written
    best_metric: str = "eval/loss"  # which are best: a loss is good when low, other metrics when high
    keep_every: int = 0  # steps; checkpoints of their multiples stay for ever; 0 = none
    # When loss or gradient are not finite, or the loss is a spike: "abort"; "skip" the step; "rollback"
    # to the newest checkpoint and go on with the batch after the bad one.
    on_bad_loss: str = "abort"
    spike_factor: float = 0.0  # a positive loss above so many times the median of 64 is one; 0 = none is
    max_rollbacks: int = 3  # in one run
    wandb_project: str = ""  # Weights & Biases gets the records too; "" = it does not
    profile_steps: str = ""  # "10-12" writes a trace of these steps to WORKDIR/profile; "" = none

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "log_every", "keep"):
            require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        counts = ("steps", "epochs", "eval_every", "checkpoint_every", "keep_best", "keep_every", "seed")
        for name in (*counts, "max_rollbacks"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        choice("on_bad_loss", self.on_bad_loss, ("abort", "skip", "rollback"))
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            "spike_factor",
            self.spike_factor,
            "more than 1, or 0 for no spikes",
        )
        require(
            self.best_metric.startswith("eval/"),
            "best_metric",
            self.best_metric,
            'a name of the evaluation, such as "eval/loss" or "eval/accuracy"',
        )
        require(
            self.optional or self.steps > 0 or self.epochs > 0,
            "steps, epochs",
            (self.steps, self.epochs),
            "one of them positive",
        )
        require(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"a divisor of batch_size={self.batch_size}",
        )
        if self.profile_steps:
            numbers = re.fullmatch(r"(\d+)-(\d+)", self.profile_steps)
            ordered = numbers is not None and 0 < int(numbers[1]) <= int(numbers[2])
            require(ordered, "profile_steps", self.profile_steps, 'first and last step, as "10-12"')

    @property
    def traced_steps(self) -> tuple[int, int]:
        """First and last step of `profile_steps`; (0, 0), before all steps, where there is none."""
        first, last = (self.profile_steps or "0-0").split("-")
        return int(first), int(last)
