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

from absl import app, flags, logging

from llm_jax import LLM, SamplingParams
from llm_jax.infer.timeline import Timeline

flags.DEFINE_string("model", None, "Hugging Face directory or hub id; default: the demo model.")
flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated. None: standard input.")
flags.DEFINE_string("prompt_file", None, "A file with one prompt per line.")
flags.DEFINE_bool("chat", False, "Prompts are user messages, put in the model's chat template.")
flags.DEFINE_string("mesh", "", "Mesh axes, e.g. data:1,fsdp:1,tensor:8 (one may be -1).")
flags.DEFINE_string("dtype", "", "Of parameters and computation; default by backend.")
flags.DEFINE_string("cache_dtype", "", "Of keys and values; default: as --dtype.")
flags.DEFINE_integer("batch_size", 32, "Rows generated at once.", lower_bound=1)
flags.DEFINE_integer("steps_per_dispatch", 8, "Tokens per host round trip.", lower_bound=1)
flags.DEFINE_string("timeline", None, "Write a Chrome trace here, and a PNG beside it.")
flags.DEFINE_bool("json", False, "One JSON object per continuation on stdout, nothing else.")
flags.DEFINE_multi_string("stop", [], "Stop before this text; may be repeated.")
flags.DEFINE_list("stop_ids", [], "Stop after one of these token ids.")
flags.DEFINE_list("logit_bias", [], "ID:VALUE pairs added to the logits.")
flags.DEFINE_integer("num_beams", 1, "Beam search with so many beams.", lower_bound=1)
flags.DEFINE_float("length_penalty", 1.0, "Beam search: exponent of the length.")
flags.DEFINE_integer("num_return_sequences", 1, "Continuations of each prompt.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Same seed, same tokens.")
flags.DEFINE_bool("ignore_eos", False, "Go on after the end of text.")
flags.DEFINE_integer("logprobs", None, "Alternatives per token to report log probabilities of.")
_OPTIONAL = {  # fields of SamplingParams with a flag of the same name, unset by default
    "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "Most tokens to add."),
    "min_new_tokens": flags.DEFINE_integer("min_new_tokens", None, "Fewest tokens before an end id."),
    "temperature": flags.DEFINE_float("temperature", None, "0 = greedy."),
    "top_k": flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens; 0 = all."),
    "top_p": flags.DEFINE_float("top_p", None, "Keep the smallest set of this probability."),
    "min_p": flags.DEFINE_float("min_p", None, "Keep tokens this likely, relative to the likeliest."),
    "repetition_penalty": flags.DEFINE_float("repetition_penalty", None, "1 = none."),
    "presence_penalty": flags.DEFINE_float("presence_penalty", None, "0 = none."),
    "frequency_penalty": flags.DEFINE_float("frequency_penalty", None, "0 = none."),
}
FLAGS = flags.FLAGS
REPORTED = ("prompt", "text", "token_ids", "logprobs", "top_logprobs", "finish_reason", "score")
SPEEDS = ("ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s")


def sampling(llm: LLM) -> SamplingParams:
    """The request that the flags describe, over the model's own defaults."""
    pairs = [pair.split(":") for pair in FLAGS.logit_bias]
    return llm.default_sampling(
        **{field: flag.value for field, flag in _OPTIONAL.items()},
        n=FLAGS.num_return_sequences,
        seed=FLAGS.seed,
        ignore_eos=FLAGS.ignore_eos,
        logprobs=0 if FLAGS.json and FLAGS.logprobs is None else FLAGS.logprobs,
        stop=tuple(FLAGS.stop),
        stop_ids=tuple(int(i) for i in FLAGS.stop_ids),
        logit_bias=tuple((int(i), float(v)) for i, v in pairs),
    )


def prompts() -> list:
    """Texts, or chats of one message, from --prompt, --prompt_file, or standard input as a whole."""
    texts = list(FLAGS.prompt)
    if FLAGS.prompt_file:
        with open(FLAGS.prompt_file, encoding="utf-8") as file:
            texts += [line.rstrip("\n") for line in file if line.strip()]
    texts = texts or [sys.stdin.read().rstrip("\n")]
    return [[{"role": "user", "content": t}] for t in texts] if FLAGS.chat else texts


def run(llm: LLM, asked: list, request: SamplingParams, live: bool) -> list:
    """The continuations; printed as they are made when `live`."""
    if FLAGS.num_beams > 1:
        search = {"num_beams": FLAGS.num_beams, "length_penalty": FLAGS.length_penalty}
        return llm.beam_search(asked, dataclasses.replace(request, n=1), num_return=request.n, **search)
    if FLAGS.timeline:  # a first run compiles, so that the timeline shows the second at full speed
        llm.generate(asked, request, timeline=Timeline())
    timeline = Timeline() if FLAGS.timeline else None
    show = (lambda _, text: print(text, end="", flush=True)) if live else None
    outputs = llm.generate(asked, request, on_text=show, timeline=timeline)
    if timeline:
        print("\ntimeline:", *timeline.write(FLAGS.timeline), file=sys.stderr)
    return outputs


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; prompts are given as --prompt=TEXT")
    if FLAGS.num_beams > 1 and FLAGS.timeline:
        raise app.UsageError("--timeline shows sampling step by step; leave out --num_beams")
    llm = LLM(
        FLAGS.model,
        mesh=FLAGS.mesh,
        dtype=FLAGS.dtype,
        cache_dtype=FLAGS.cache_dtype,
        max_batch=FLAGS.batch_size,
        steps_per_dispatch=FLAGS.steps_per_dispatch,
    )
    asked, request = prompts(), sampling(llm)
    live = not FLAGS.json and len(asked) * request.n == 1 and FLAGS.num_beams == 1
    if live and not FLAGS.chat:
        print(asked[0], end="", flush=True)
    outputs = run(llm, asked, request, live)
    for output in outputs:
        if FLAGS.json:
            record = {name: getattr(output, name) for name in REPORTED}
            record |= {name: getattr(llm.stats, name) for name in SPEEDS}
            print(json.dumps(record, ensure_ascii=False))
        else:
            print("" if live else f"{output.prompt}{output.text}\n{'-' * 40}")
    stats = llm.stats
    print(
        f"prefill {stats.prefill_tokens_per_s:.1f} tokens/s, decode {stats.decode_tokens_per_s:.1f} "
        f"tokens/s, first token after {stats.ttft_s * 1e3:.1f} ms, compiled in {stats.compile_s:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    app.run(main)
