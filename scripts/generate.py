"""Generate text from prompts, streaming as it is made.

    python scripts/generate.py --prompt=我喜欢编程。 --max_new_tokens=40 --temperature=0
    python scripts/generate.py --model=DIR --prompt_file=prompts.txt --json --mesh=tensor:4
    echo "Once upon a time" | python scripts/generate.py --model=DIR --num_beams=4

Without --model the bundled demo model answers. A flag that is not given takes what the model's
generation_config.json says. --json prints one object per continuation and nothing else on stdout.
"""

import dataclasses
import json
import sys

from absl import app, flags

from llm_jax import LLM, SamplingParams, cli, distributed
from llm_jax.infer import sampling_flags
from llm_jax.infer.beam import BeamOptions
from llm_jax.infer.timeline import Timeline
from llm_jax.kernels.forms import explain

flags.DEFINE_string("model", None, "Hugging Face directory or hub id; default: the demo model.")
flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated. None: standard input.")
flags.DEFINE_string("prompt_file", None, "A file with one prompt per line.")
flags.DEFINE_bool("chat", False, "Prompts are user messages, put in the model's chat template.")
flags.DEFINE_string("mesh", "", "Mesh axes, e.g. data:1,fsdp:1,tensor:8 (one may be -1).")
flags.DEFINE_string("dtype", "", "Of parameters and computation; default by backend.")
flags.DEFINE_string("weights", "", "Of the parameters: a dtype, int8 or w8a8; default: as --dtype.")
flags.DEFINE_string("cache_dtype", "", "Of keys and values; default: as --dtype.")
flags.DEFINE_enum("attention", "auto", ["auto", "pallas", "xla"], "By kernels or by XLA.")
flags.DEFINE_integer("batch_size", 32, "Rows generated at once.", lower_bound=1)
flags.DEFINE_integer("steps_per_dispatch", 8, "Tokens per host round trip.", lower_bound=1)
flags.DEFINE_string("timeline", None, "Write a Chrome trace here, and a PNG beside it.")
flags.DEFINE_bool("json", False, "One JSON object per continuation on stdout, nothing else.")
flags.DEFINE_bool("explain", False, "Tell which form of each operator ran, and why, on stderr.")
sampling_flags.define()
FLAGS = flags.FLAGS
REPORTED = ("prompt", "text", "token_ids", "logprobs", "top_logprobs", "finish_reason", "score")
SPEEDS = ("ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s")


def prompts() -> list:
    """Texts, or chats of one message, from --prompt, --prompt_file, or standard input as a whole."""
    texts = list(FLAGS.prompt)
    if FLAGS.prompt_file:
        with open(FLAGS.prompt_file, encoding="utf-8") as file:
            texts += [line.rstrip("\n") for line in file if line.strip()]
    texts = texts or [sys.stdin.read().rstrip("\n")]
    return [[{"role": "user", "content": t}] for t in texts] if FLAGS.chat else texts


def run(llm: LLM, asked: list, request: SamplingParams, search: BeamOptions | None, live: bool) -> list:
    """The continuations; printed as they are made when `live`."""
    if search is not None:
        return llm.beam_search(asked, request, **dataclasses.asdict(search))
    if FLAGS.timeline:  # a first run compiles, so that the timeline shows the second at full speed
        llm.generate(asked, request, timeline=Timeline())
    timeline = Timeline() if FLAGS.timeline else None
    show = (lambda _, text: print(text, end="", flush=True)) if live else None
    outputs = llm.generate(asked, request, on_text=show, timeline=timeline)
    if timeline and distributed.is_main():
        print("\ntimeline:", *timeline.write(FLAGS.timeline), file=sys.stderr)
    return outputs


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; prompts are given as --prompt=TEXT")
    names = ("model", "mesh", "dtype", "weights", "cache_dtype", "attention", "steps_per_dispatch")
    llm = LLM(**{name: FLAGS[name].value for name in names}, max_batch=FLAGS.batch_size)
    request, search = sampling_flags.requested(llm, logprobs=0 if FLAGS.json else None)
    if search and FLAGS.timeline:
        raise app.UsageError("--timeline shows sampling step by step; it needs --num_beams=1")
    asked = prompts()
    distributed.agree("prompts", dict(enumerate(asked)), "Give them by --prompt or --prompt_file.")
    live = not FLAGS.json and len(asked) * request.n == 1 and search is None
    if live and not FLAGS.chat:
        print(asked[0], end="", flush=True)
    outputs = run(llm, asked, request, search, live)
    if not distributed.is_main():
        return
    speeds = {name: getattr(llm.stats, name) for name in SPEEDS}
    for output in outputs:
        shown = "" if live else f"{output.prompt}{output.text}\n{'-' * 40}"
        record = {name: getattr(output, name) for name in REPORTED} | speeds
        print(json.dumps(record, ensure_ascii=False) if FLAGS.json else shown)
    stats = llm.stats
    print(
        f"prefill {stats.prefill_tokens_per_s:.1f} tokens/s, decode {stats.decode_tokens_per_s:.1f} "
        f"tokens/s, first token after {stats.ttft_s * 1e3:.1f} ms, compiled in {stats.compile_s:.1f} s",
        file=sys.stderr,
    )
    if FLAGS.explain:
        print(*explain(), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
