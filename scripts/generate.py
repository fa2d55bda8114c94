"""Generate text from prompts, streaming as it is made.

    python scripts/generate.py --prompt=我喜欢编程。 --max_new_tokens=40 --temperature=0
    python scripts/generate.py --model=DIR --prompt_file=prompts.txt --json --mesh=tensor:4
    echo "Once upon a time" | python scripts/generate.py --model=DIR --num_beams=4

Without --model the bundled demo model answers. A flag that is not given takes what the model's
generation_config.json says. --json prints one object per continuation and nothing else on stdout.
"""

import json
import sys

from absl import app, flags, logging

from llm_jax import LLM, SamplingParams
from llm_jax.infer.llm import Output
from llm_jax.infer.timeline import Timeline

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory or hub id; default: the demo model.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A file with one prompt per line.")
_CHAT = flags.DEFINE_bool("chat", False, "Prompts are user messages, put in the model's chat template.")
_MESH = flags.DEFINE_string("mesh", "", "Mesh axes, e.g. data:1,fsdp:1,tensor:8 (one may be -1).")
_DTYPE = flags.DEFINE_string("dtype", "", "Of parameters and computation; default by backend.")
_CACHE_DTYPE = flags.DEFINE_string("cache_dtype", "", "Of keys and values; default: as --dtype.")
_BATCH = flags.DEFINE_integer("batch_size", 32, "Rows generated at once.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps_per_dispatch", 8, "Tokens per host round trip.", lower_bound=1)
_TIMELINE = flags.DEFINE_string("timeline", None, "Write a Chrome trace here, and a PNG beside it.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object per continuation on stdout, nothing else.")
_SAMPLING = {  # SamplingParams field -> flag
    "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "Most tokens to add."),
    "min_new_tokens": flags.DEFINE_integer("min_new_tokens", None, "Fewest tokens before an end id."),
    "temperature": flags.DEFINE_float("temperature", None, "0 = greedy."),
    "top_k": flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens; 0 = all."),
    "top_p": flags.DEFINE_float("top_p", None, "Keep the smallest set of this probability."),
    "min_p": flags.DEFINE_float("min_p", None, "Keep tokens this likely, relative to the likeliest."),
    "repetition_penalty": flags.DEFINE_float("repetition_penalty", None, "1 = none."),
    "presence_penalty": flags.DEFINE_float("presence_penalty", None, "0 = none."),
    "frequency_penalty": flags.DEFINE_float("frequency_penalty", None, "0 = none."),
    "seed": flags.DEFINE_integer("seed", 0, "Same seed, same tokens."),
    "ignore_eos": flags.DEFINE_bool("ignore_eos", None, "Go on after the end of text."),
    "n": flags.DEFINE_integer("num_return_sequences", None, "Continuations of each prompt."),
    "logprobs": flags.DEFINE_integer("logprobs", None, "Alternatives per token to report log probs of."),
}
_STOP = flags.DEFINE_multi_string("stop", [], "Stop before this text; may be repeated.")
_STOP_IDS = flags.DEFINE_list("stop_ids", [], "Stop after one of these token ids.")
_LOGIT_BIAS = flags.DEFINE_list("logit_bias", [], "ID:VALUE pairs added to the logits.")
_BEAMS = flags.DEFINE_integer("num_beams", 1, "Beam search with so many beams.", lower_bound=1)
_LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Beam search: exponent of the length.")


def sampling(llm: LLM) -> SamplingParams:
    """The request that the flags describe, over the model's own defaults."""
    changes = {field: flag.value for field, flag in _SAMPLING.items()}
    if _JSON.value and changes["logprobs"] is None:
        changes["logprobs"] = 0
    pairs = [pair.split(":") for pair in _LOGIT_BIAS.value]
    return llm.default_sampling(
        **changes,
        stop=tuple(_STOP.value),
        stop_ids=tuple(int(i) for i in _STOP_IDS.value),
        logit_bias=tuple((int(i), float(v)) for i, v in pairs),
    )


def prompts() -> list[str]:
    """From --prompt, --prompt_file, or standard input (one prompt, as a whole)."""
    texts = list(_PROMPT.value)
    if _PROMPT_FILE.value:
        with open(_PROMPT_FILE.value, encoding="utf-8") as file:
            texts += [line.rstrip("\n") for line in file if line.strip()]
    return texts or [sys.stdin.read().rstrip("\n")]


def report(llm: LLM, output: Output) -> dict:
    """What --json prints of one continuation."""
    return {
        "prompt": output.prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "logprobs": output.logprobs,
        "top_logprobs": output.top_logprobs,
        "finish_reason": output.finish_reason,
        "ttft_s": llm.stats.ttft_s,
        "prefill_tokens_per_s": llm.stats.prefill_tokens_per_s,
        "decode_tokens_per_s": llm.stats.decode_tokens_per_s,
    }


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; prompts are given as --prompt=TEXT")
    if _BEAMS.value > 1 and _TIMELINE.value:
        raise app.UsageError("--timeline shows sampling step by step; leave out --num_beams")
    llm = LLM(
        _MODEL.value,
        mesh=_MESH.value,
        dtype=_DTYPE.value,
        cache_dtype=_CACHE_DTYPE.value,
        max_batch=_BATCH.value,
        steps_per_dispatch=_STEPS.value,
    )
    texts, request = prompts(), sampling(llm)
    asked = [[{"role": "user", "content": t}] for t in texts] if _CHAT.value else texts
    if _TIMELINE.value:  # a first run compiles, so that the timeline shows the second at full speed
        llm.generate(asked, request, timeline=Timeline())
    timeline = Timeline() if _TIMELINE.value else None
    live = not _JSON.value and len(texts) * request.n == 1 and _BEAMS.value == 1
    if live:
        print(texts[0], end="", flush=True)
    if _BEAMS.value > 1:
        outputs = llm.beam_search(
            asked, request, num_beams=_BEAMS.value, length_penalty=_LENGTH_PENALTY.value
        )
    else:
        stream = (lambda _, text: print(text, end="", flush=True)) if live else None
        outputs = llm.generate(asked, request, on_text=stream, timeline=timeline)
    for text, output in zip([t for t in texts for _ in range(request.n)], outputs, strict=True):
        output.prompt = text
        if _JSON.value:
            print(json.dumps(report(llm, output), ensure_ascii=False))
        elif not live:
            print(f"{output.prompt}{output.text}\n" + "-" * 40)
    if live:
        print()
    stats = llm.stats
    print(
        f"prefill {stats.prefill_tokens_per_s:.1f} tokens/s, decode {stats.decode_tokens_per_s:.1f} tokens/s, "
        f"first token after {stats.ttft_s * 1e3:.1f} ms (compiled in {stats.compile_s:.1f} s)",
        file=sys.stderr,
    )
    if timeline is not None:
        print("timeline: " + ", ".join(map(str, timeline.write(_TIMELINE.value))), file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
