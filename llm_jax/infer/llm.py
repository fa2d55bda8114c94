"""Text in, text out: a loaded model with its tokenizer, in five lines.

from llm_jax import LLM, SamplingParams

llm = LLM("path/to/model")  # a Hugging Face directory, a hub id, or nothing for the demo model
for output in llm.generate(["我喜欢编程。"], SamplingParams(max_new_tokens=32, temperature=0)):
    print(output.text, output.token_ids, output.logprobs)
"""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_config, load_generation_config, load_hf, resolve
from llm_jax.compress.quantize import read_weights
from llm_jax.config import EngineConfig
from llm_jax.data.chat import encode_chat
from llm_jax.data.detokenize import StreamingDecoder
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.infer.beam import beam_search
from llm_jax.infer.beam_options import BeamOptions, check_searchable
from llm_jax.infer.generate import Chunk, Compiled, Timing, check_lengths, generate
from llm_jax.infer.replies import Output, Reply, best_of
from llm_jax.infer.scoring import score_at_once, score_strictly
from llm_jax.infer.timeline import Timeline
from llm_jax.models import Model, Params, describe
from llm_jax.models.key_heads import repeat_key_heads, served
from llm_jax.ops.sampling import SamplingParams
from llm_jax.sharding import make_mesh
from llm_jax.tree import unstack

logger = logging.getLogger(__name__)

DEMO_MODEL = Path(__file__).resolve().parent.parent / "assets" / "demo_lm"
# Our name of each setting of generation_config.json, and its name there.
_EVERY_TEXT = {n: n for n in ("max_new_tokens", "min_new_tokens", "repetition_penalty")}
_SAMPLED = {n: n for n in ("temperature", "top_k", "top_p", "min_p", "typical_p")}
_SAMPLED |= {"n": "num_return_sequences"}
_SEARCH = {n: n for n in ("num_beams", "length_penalty", "early_stopping")}
_SEARCH |= {"num_return": "num_return_sequences"}


@dataclasses.dataclass
class Stats:
    """Speed of one `generate` call; compile time is not in the rates."""

    ttft_s: float = 0.0  # call to first token, without compilation
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    compile_s: float = 0.0


class LLM:
    """A causal language model ready to generate, on a mesh.

    Its `model` and `params` are as they serve there, see models/key_heads.py.

    Args:
        model: Hugging Face directory or hub id; None takes the bundled demo model.
        mesh: a Mesh or a text like "data:1,tensor:8".
        dtype: of parameters and computation; "" = float32 on CPU, bfloat16 elsewhere.
        weights: of the parameters alone: a dtype; "int8", matrices rounded to int8; "w8a8", what they
            are multiplied by too; "" = as dtype. See docs/quantization.md.
        cache_dtype: of keys and values; "" = as dtype.
        attention: "auto", "pallas" or "xla", see `ModelConfig.attention`.
        max_batch: rows generated at once; longer lists of prompts run in turns.
        steps_per_dispatch: tokens made on the device for one round trip to the host.
        seed: for requests that name none.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        mesh: Mesh | str = "",
        dtype: str = "",
        weights: str = "",
        cache_dtype: str = "",
        attention: str = "auto",
        max_batch: int = 32,
        steps_per_dispatch: int = 8,
        seed: int = 0,
    ):
        mesh = _inference_mesh(mesh)
        directory = resolve(str(model)) if model is not None else demo_model()
        config = load_config(directory)
        if config.head != "lm" or not config.causal:
            raise ValueError(
                f"{directory}: head={config.head!r} of family {config.family!r} cannot generate; "
                "expected a causal language model"
            )
        param_dtype, scheme = read_weights(weights, dtype)
        config = dataclasses.replace(
            config,
            param_dtype=param_dtype,
            compute_dtype=dtype,
            cache_dtype=cache_dtype or dtype,
            attention=attention,
        )
        described = served(describe(config), mesh)
        params = load_hf(directory, described, mesh, scheme=scheme)
        tokenizer = load_tokenizer(directory)
        self._setup(described, params, mesh, tokenizer, max_batch, steps_per_dispatch, seed, owned=True)
        self.generation_config = load_generation_config(directory)

    @classmethod
    def from_params(
        cls,
        model: Model,
        params: Params,
        tokenizer: Tokenizer | None,
        *,
        mesh: Mesh | str = "",
        max_batch: int = 32,
        steps_per_dispatch: int = 8,
        seed: int = 0,
    ) -> "LLM":
        """From parameters at hand, e.g. those being trained; without a tokenizer, prompts are ids.

        They stay as they are: those with key heads that the mesh does not divide are copied, and on
        GPUs all of the layers' (see `tree.PerLayer`).
        """
        self = cls.__new__(cls)
        mesh = _inference_mesh(mesh)
        params, model = repeat_key_heads(params, model, mesh), served(model, mesh)
        self._setup(model, params, mesh, tokenizer, max_batch, steps_per_dispatch, seed)
        self.generation_config = {}
        return self

    def _setup(
        self, model, params, mesh, tokenizer, max_batch, steps_per_dispatch, seed, *, owned=False
    ):
        for name, value in (("max_batch", max_batch), ("steps_per_dispatch", steps_per_dispatch)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        self.model, self.mesh, self.tokenizer = model, mesh, tokenizer
        self.max_batch, self.steps_per_dispatch, self.seed = max_batch, steps_per_dispatch, seed
        self.compiled, self.stats, self._runs = Compiled(), Stats(), 0
        if _layers_lie_apart(mesh):
            params = dict(params, layers=unstack(params["layers"], release=owned))
        self.params = params

    def default_sampling(self, **changes: Any) -> SamplingParams:
        """What the model's generation_config.json asks for, with changes; greedy if it says nothing."""
        changes = {name: value for name, value in changes.items() if value is not None}
        sampled = self.generation_config.get("do_sample") and changes.get("temperature") != 0
        values = {"temperature": 1.0} | self._settings(_SAMPLED) if sampled else {"temperature": 0.0}
        return SamplingParams(**(values | self._settings(_EVERY_TEXT) | changes))

    def default_search(self, **changes: Any) -> BeamOptions:
        """The beam search that the model's generation_config.json asks for, with changes; else one beam.

        Raises ValueError when it asks for beams that are sampled, unless num_beams is among the changes.
        """
        changes = {name: value for name, value in changes.items() if value is not None}
        values = {"num_beams": 1} | self._settings(_SEARCH)
        sampled = self.generation_config.get("do_sample") and values["num_beams"] != 1
        if sampled and "num_beams" not in changes:
            raise ValueError(
                f"generation_config.json asks for beam sampling (num_beams={values['num_beams']} and "
                "do_sample=true), which is not supported; set num_beams=1 to sample, or num_beams and "
                "temperature=0 to search"
            )
        return BeamOptions(**(values | changes))

    def _settings(self, names: dict[str, str]) -> dict[str, Any]:
        """Those of generation_config.json, under our names."""
        given = self.generation_config
        return {ours: given[theirs] for ours, theirs in names.items() if given.get(theirs) is not None}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text: of generation_config.json, else of the tokenizer."""
        ends = self.generation_config.get("eos_token_id")
        if ends is None and self.tokenizer is not None:
            ends = self.tokenizer.eos_id
        return () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)

    def encode(self, prompt: str | Sequence[int] | Sequence[dict]) -> list[int]:
        """Ids of a prompt: a text, a chat (list of {"role", "content"}), or ids as they are."""
        if not isinstance(prompt, str) and all(not isinstance(p, dict) for p in prompt):
            return [int(i) for i in prompt]
        if self.tokenizer is None:
            raise ValueError("this LLM has no tokenizer; give prompts as lists of token ids")
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            ids = encode_chat(self.tokenizer, prompt, add_generation_prompt=True)
        if not ids and self.tokenizer.bos_id is not None:
            ids = [self.tokenizer.bos_id]  # an empty prompt starts from nothing
        return ids

    def generate(
        self,
        prompts: Sequence[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
        timeline: Timeline | None = None,
    ) -> list[Output]:
        """Continuations of texts, chats or id lists, in order; n for each prompt.

        Without `sampling`, `default_sampling` decides; the beams of a generation_config.json, which a
        warning names, are for `beam_search`. on_text(output index, text) is called with every new piece
        of text as it streams.
        Raises ValueError for prompts that cannot fit the model, naming the prompt, and for requests that
        this cannot serve, naming the field.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is a single string: expected a list of prompts")
        requests = self._requests(sampling, len(prompts))
        if on_text is not None:
            _check_streams(requests)
        outputs: list[Output] = []
        for first, output, text in self._stream(prompts, requests, timeline):
            if output is None:
                outputs.extend(first)
            elif on_text is not None and text:
                on_text(next(i for i, o in enumerate(outputs) if o is output), text)
        drawn = iter(outputs)
        return [
            output
            for request in requests
            for output in best_of(list(itertools.islice(drawn, request.candidates().n)), request)
        ]

    def stream(self, prompt: Any, sampling: SamplingParams | None = None) -> Iterator[str]:
        """Pieces of text of one continuation as they are made; never half a character."""
        requests = self._requests(sampling, 1)
        _check_streams(requests)
        for _, output, text in self._stream([prompt], requests, None):
            if output is not None and output.sample == 0 and text:
                yield text

    def beam_search(
        self,
        prompts: Sequence[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | Literal["never"] | None = None,
        num_return: int | None = None,
    ) -> list[Output]:
        """The num_return best continuations of each prompt by beam search, best first, with scores.

        What is not given is as `default_search` has it: one beam, one continuation, length_penalty 1 and
        no early stopping, where generation_config.json says nothing.

        sampling gives the limits on length, stop ids, penalties and bias; what only sampling can use
        (a temperature, top_p, ...) is refused. See `BeamOptions` for the rest. A prompt has fewer
        outputs when a bias leaves fewer continuations possible. Raises ValueError naming the field.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is a single string: expected a list of prompts")
        options = self.default_search(
            num_beams=num_beams,
            num_return=num_return,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        began, timing, outputs = time.perf_counter(), Timing(), []
        ids = [self.encode(p) for p in prompts]
        if sampling is None:
            sampling = self.default_sampling(temperature=0.0)
        requests = self._requests(sampling, len(ids))
        check_searchable(requests)
        for batch in self._batches([dataclasses.replace(r, n=options.num_beams) for r in requests]):
            found = beam_search(
                self.model,
                self.params,
                self.mesh,
                [ids[i] for i in batch],
                [requests[i] for i in batch],
                options,
                stop_ids=[self.stops(requests[i]) for i in batch],
                compiled=self.compiled,
                timing=timing,
            )
            for row, i in enumerate(batch):
                for sample, score in enumerate(found.scores[row].tolist()):
                    if score > -math.inf:
                        output = Output(_text_of(prompts[i]), ids[i], sample, score=score)
                        tokens = [t for t in found.tokens[row, sample].tolist() if t >= 0]
                        logprobs = found.logprobs[row, sample, : len(tokens)].tolist()
                        self.fill(output, requests[i], tokens, logprobs)
                        outputs.append(output)
        self.stats = Stats()
        self.stats.ttft_s = time.perf_counter() - began - timing.compile_s  # nothing comes sooner
        self._set_rates(timing)
        return outputs

    def score(
        self, texts: Sequence[Any], *, strict: bool = False, page_size: int | None = None
    ) -> list[list[float]]:
        """Log probabilities of each text's tokens but the first, given those before (natural log).

        texts: as the prompts of `generate`; a text of one token has none. By the forward of training, or
        strict: bit for bit what an `Engine` with strict_numerics says of them, which is slow.
        page_size: of that engine; as `EngineConfig` has it if not given.
        Raises ValueError for texts that are longer than the model's positions, or empty.
        """
        if page_size is not None and not strict:
            raise ValueError(f"page_size={page_size}: only strict scores have pages; leave it out")
        page_size = EngineConfig.page_size if page_size is None else page_size
        if page_size < 1:
            raise ValueError(f"page_size={page_size}: expected at least 1")
        ids = [self.encode(text) for text in texts]
        check_lengths(self.model, ids, [0] * len(ids))
        found: list[list[float]] = []
        for first in range(0, len(ids), self.max_batch):
            given = (self.model, self.params, self.mesh, ids[first : first + self.max_batch])
            if strict:
                rows = score_strictly(*given, self.compiled, page_size)
            else:
                rows = score_at_once(*given, self.compiled)
            found += [row.tolist() for row in rows]
        return found

    def fill(
        self, output: Output, request: SamplingParams, tokens: list[int], logprobs: list[float]
    ) -> None:
        """Write what a beam search found into its output: tokens, as many log probabilities, text."""
        output.token_ids = tokens
        output.logprobs = None if request.logprobs is None else logprobs
        ended = tokens[-1] in self.stops(request)
        output.finish_reason = "stop" if ended else "length"
        if (decoder := self._decoder(output.prompt_ids)) is not None:
            shown = tokens[: len(tokens) - ended]
            output.text = "".join(map(decoder.push, shown)) + decoder.flush()

    def _stream(self, prompts, requests, timeline):
        """Yields (new outputs, None, "") at the start of a batch, then (None, output, text)."""
        requests = [request.candidates() for request in requests]
        began, timing = time.perf_counter(), Timing()
        self.stats = Stats()
        timeline = timeline or Timeline(enabled=False)
        with timeline.phase("tokenize"):
            ids = [self.encode(p) for p in prompts]
        check_lengths(self.model, ids, [request.max_new_tokens for request in requests])
        for batch in self._batches(requests):
            rows = [row for i in batch for row in self.replies(prompts[i], ids[i], requests[i])]
            yield [row.output for row in rows], None, ""
            chunks = generate(
                self.model,
                self.params,
                self.mesh,
                [ids[i] for i in batch],
                [requests[i] for i in batch],
                stop_ids=[self.stops(requests[i]) for i in batch],
                compiled=self.compiled,
                timing=timing,
                default_seed=self.seed + self._runs,  # another batch, other noise
                steps_per_dispatch=self.steps_per_dispatch,
                timeline=timeline,
            )
            self._runs += 1
            for tick, chunk in enumerate(chunks):
                if not self.stats.ttft_s:
                    self.stats.ttft_s = time.perf_counter() - began - timing.compile_s
                if chunk.prompt is not None:
                    for r, row in enumerate(rows):
                        places = len(row.output.prompt_ids) - 1
                        p = r // requests[batch[0]].n
                        row.take_prompt(*(x[p, :places] for x in chunk.prompt))
                with timeline.phase("detokenize", tick):
                    texts = [_read(row, chunk, r) for r, row in enumerate(rows)]
                timeline.label(tick, "|".join(texts))
                for row, text in zip(rows, texts, strict=True):
                    yield None, row.output, text
        self._set_rates(timing)

    def _set_rates(self, timing: Timing) -> None:
        self.stats.compile_s = timing.compile_s
        self.stats.prefill_tokens_per_s = timing.prefill_tokens / max(timing.prefill_s, 1e-9)
        self.stats.decode_tokens_per_s = timing.decode_tokens / max(timing.decode_s, 1e-9)

    def _requests(self, sampling, count: int) -> list[SamplingParams]:
        if sampling is None:
            sampling = self.default_sampling()
            if self.generation_config.get("num_beams", 1) != 1:
                logger.warning(
                    "generation_config.json: num_beams=%s, which was not used here: call beam_search",
                    self.generation_config["num_beams"],
                )
        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * count
        if len(sampling) != count:
            raise ValueError(f"sampling has {len(sampling)} entries for {count} prompts")
        if any(request.structured for request in sampling):
            raise ValueError("SamplingParams.structured needs the engine (llm_jax.engine)")
        return list(sampling)

    def _batches(self, requests: list[SamplingParams]) -> Iterator[list[int]]:
        """Indices of prompts run together: in order, of one n, at most max_batch rows."""
        batch: list[int] = []
        for i, request in enumerate(requests):
            if batch and (
                request.n != requests[batch[0]].n or (len(batch) + 1) * request.n > self.max_batch
            ):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def stops(self, request: SamplingParams) -> tuple[int, ...]:
        """Ids that end a request's texts."""
        return (*request.stop_ids, *(() if request.ignore_eos else self.end_ids))

    def replies(self, prompt: Any, ids: list[int], request: SamplingParams) -> list[Reply]:
        """The continuations of a prompt, n, before their first token. ids: `encode` of the prompt.

        Raises ValueError for stop strings where there is no tokenizer.
        """
        text, stops = _text_of(prompt), self.stops(request)
        return [
            Reply(Output(text, ids, sample), request, stops, self._decoder(ids))
            for sample in range(request.n)
        ]

    def _decoder(self, prompt: list[int]) -> StreamingDecoder | None:
        """A decoder that has read the prompt, so that a word begun after it keeps its space."""
        if self.tokenizer is None:
            return None
        decoder = self.tokenizer.stream()
        decoder.push(prompt)
        return decoder


def _read(reply: Reply, chunk: Chunk, r: int) -> str:
    """Add a row's tokens of a chunk to its reply; returns the text that may be shown now."""
    text = ""
    for m, token in enumerate(chunk.tokens[:, r].tolist()):
        if reply.stopped or token < 0:
            break
        found = None
        if chunk.logprobs is not None and chunk.top_ids is not None and chunk.top_logprobs is not None:
            found = (chunk.logprobs[m, r], chunk.top_ids[m, r], chunk.top_logprobs[m, r])
        text += reply.take(token, found)
    if reply.stopped:
        chunk.finish(r)
    return text


def _check_streams(requests: Sequence[SamplingParams]) -> None:
    for request in requests:
        if request.best_of is not None:
            raise ValueError(
                f"SamplingParams.best_of is {request.best_of}: what is chosen at the end cannot stream; "
                "use None"
            )


def _layers_lie_apart(mesh: Mesh) -> bool:
    """Whether each layer has arrays of its own, as XLA would copy slices of stacks: `tree.PerLayer`.

    On a CPU mesh of several devices they stay stacked, so that compiling is as it is on TPUs.
    """
    platform = mesh.devices.flat[0].platform
    return platform == "gpu" or (platform == "cpu" and mesh.size == 1)


def _inference_mesh(mesh: Mesh | str) -> Mesh:
    """The mesh, or that of a description; ValueError where it has the layers in stages."""
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh)
    if mesh.shape["stage"] > 1:
        raise ValueError(
            f"--mesh has stage={mesh.shape['stage']}: stages are for training and cannot generate; "
            "take tensor or fsdp in place of stage"
        )
    return mesh


def _text_of(prompt: Any) -> str | None:
    """A prompt as people gave it: the text, or the last message of a chat; None for ids."""
    if isinstance(prompt, str):
        return prompt
    return prompt[-1]["content"] if len(prompt) and isinstance(prompt[-1], dict) else None


def demo_model() -> Path:
    """Directory of the bundled demo model."""
    if not (DEMO_MODEL / "config.json").exists():
        raise ValueError(
            f"the demo model is missing from {DEMO_MODEL}; name a model, or reinstall llm_jax"
        )
    return DEMO_MODEL
