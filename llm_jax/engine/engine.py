"""Many requests at once: each step computes what the scheduler chose, for all of them together.

    engine = Engine(LLM("path/to/model"), EngineConfig(max_rows=64))
    outputs = engine.generate(["我喜欢编程。", "Once upon a time"], SamplingParams(max_new_tokens=64))

A step, in order: the scheduler plans rows of tokens and says which pages are theirs
(engine/scheduler.py); the plan is packed, sent and computed, and a token chosen for each row, on the
device (engine/runner.py); while that runs the next step is planned, whose rows take their newest token
from the device; then the chosen tokens are fetched, become text (infer/replies.py), and are committed.
Nothing is compiled after the beginning (engine/programs.py).
"""

import asyncio
import collections
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from llm_jax.config import EngineConfig
from llm_jax.engine.beams import BeamRules, Candidates, Search, check_beams
from llm_jax.engine.drafts import DraftLength, PromptLookup
from llm_jax.engine.live import Delta, Live, LiveRequests
from llm_jax.engine.pages import PoolSpec
from llm_jax.engine.plan import Event, Row, SchedulerConfig, StepPlan
from llm_jax.engine.request import Reason, Request
from llm_jax.engine.request import Sequence as Running
from llm_jax.engine.runner import Flight, Runner
from llm_jax.engine.scheduler import QueueFull, Scheduler
from llm_jax.engine.structured import Grammar
from llm_jax.engine.taps import Recorder, StepTaps
from llm_jax.engine.trace import TraceWriter
from llm_jax.infer.beam_options import BeamOptions
from llm_jax.infer.generate import check_lengths
from llm_jax.infer.llm import LLM
from llm_jax.infer.paged_steps import read_candidates, read_chosen
from llm_jax.infer.replies import Output, best_of
from llm_jax.kernels.forms import explain
from llm_jax.models import Params
from llm_jax.models.draft_head import DraftHeadModel
from llm_jax.ops.linear import LowRank
from llm_jax.ops.sampling import EVERYTHING, new_rows, pack_mask, pack_row, tier_of
from llm_jax.ops.sampling_params import SamplingParams
from llm_jax.ops.taps import Taps

logger = logging.getLogger(__name__)


class Engine:
    """Serves requests with one model on one mesh.

    `generate` for lists of prompts, `stream` in asyncio; `add`, `step` and `cancel` for a loop of one's
    own. All but the arrays are guarded by a lock: requests may come from other threads than steps.
    """

    def __init__(
        self,
        llm: LLM,
        config: EngineConfig | None = None,
        *,
        drafter: LLM | tuple[DraftHeadModel, Params] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """drafter: what `EngineConfig.speculation` names, a smaller LLM or what `load_draft_head` gives.
        clock: in seconds.
        """
        self.llm, self.config = llm, config or EngineConfig()
        model = llm.model
        if jax.process_count() > 1:
            raise ValueError(
                f"an Engine in {jax.process_count()} processes: expected one, on all of its devices; "
                "LLM.generate runs in many (scripts/generate.py)"
            )
        self.max_length = self.config.max_length or model.config.max_positions
        if self.max_length > model.config.max_positions:
            raise ValueError(
                f"max_length={self.max_length}: expected at most max_positions="
                f"{model.config.max_positions} of this model"
            )
        self._clock, self._live = clock, LiveRequests()
        self.runner = Runner(llm, self.config, drafter, self.max_length, self._live)
        settings = SchedulerConfig(
            max_rows=self.config.max_rows,
            token_budget=self.config.token_budget,
            page_size=self.config.page_size,
            pools=tuple(map(PoolSpec, self.runner.pages, self.runner.windows)),
            max_length=self.max_length,
            max_queue=self.config.max_queue,
            prefix_cache=self.config.prefix_cache,
            alignment=self.runner.alignment,
            preemption=self.config.preemption,
            host_pages=self.config.host_pages,
            prefix_host_pages=self.config.prefix_host_pages,
            aging_s=self.config.aging_s,
        )
        self.schedulers = [self._scheduler(settings, d) for d in range(self.runner.shards)]
        self.runner.allocate()
        self._flights: collections.deque[Flight] = collections.deque()
        self._numbers, self._lock = itertools.count(), threading.RLock()
        self._driver: asyncio.Task | None = None
        self._failure: BaseException | None = None  # what a step raised
        self._waits = False  # for the device
        self._deltas: list[Delta] = []  # that no call of `step` has returned yet
        self.busy_s = self.scheduling_s = 0.0  # seconds in steps, and of these in the schedulers
        self.drafted_tokens = self.accepted_tokens = 0

    # Requests.

    def add(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        adapter: str | None = None,
        beams: BeamOptions | None = None,
        taps: Taps | None = None,
        on_text: Callable[[Delta], None] | None = None,
    ) -> str:
        """Queue a request; returns its id.

        prompt: as `LLM.generate` takes them. priority: higher is sooner. deadline_s: seconds from now.
        adapter: the name of one that `load_adapter` was given; None is the model as it is.
        beams: search, with so many rows; all deltas come at its end, one for each of num_return.
        taps: what to record of this request, which comes as `Output.taps`, and what to change in it.
        on_text: called with every `Delta`; if it raises, the request ends with the reason "error".
        Raises ValueError for what can never be served, naming the field, and QueueFull.
        """
        params = self._default_params(beams) if params is None else params
        ids = self.llm.encode(prompt)
        check_lengths(self.llm.model, [ids], [params.max_new_tokens])
        stop_ids = self.llm.stops(params)
        asked, rows, search = params, params.n, None
        if beams is not None:
            check_beams(beams, params, stop_ids, self.config.max_beams)
            # Log probabilities come with the candidates.
            asked, rows = dataclasses.replace(params, n=beams.num_return, logprobs=None), beams.num_beams
            search = Search(BeamRules(beams, params.max_new_tokens, stop_ids))
        self._check(params, stop_ids)
        if taps is not None and beams is not None:
            raise ValueError("taps with beams: what beams compute is shared and given up; ask for one")
        if taps is not None:
            self._check_taps(taps, len(ids) + params.max_new_tokens - 1)
        grammar = None
        if params.structured is not None:
            if self.llm.tokenizer is None:
                raise ValueError("SamplingParams.structured needs a tokenizer, and this LLM has none")
            grammar = Grammar.compile(params.structured, self.llm.tokenizer, stop_ids or None)
        replies = self.llm.replies(prompt, ids, asked)
        with self._lock:
            self.runner.adapters.check(adapter)
            number = next(self._numbers)
            name = str(number) if id is None else id
            scheduler = min(self.schedulers, key=lambda s: (s.load().waiting_tokens, s.load().running))
            now = self._clock()
            request = Request(
                name,
                tuple(ids),
                params.max_new_tokens,
                rows,
                priority,
                None if deadline_s is None else now + deadline_s,
                adapter,
                params=params,
                # What is recorded has to be computed; what is patched is of no use to others.
                reuse_prefix=params.prompt_logprobs is None and taps is None,
                search=beams is not None,
            )
            if name in self._live:
                raise ValueError(f"id={name!r} is in use; give every request its own")
            scheduler.add(request)
            self._live[name] = Live(
                params,
                tier_of([asked]),
                stop_ids,
                number,
                self.schedulers.index(scheduler),
                replies,
                on_text,
                len(replies),
                pack_mask(params, self.llm.model.config.vocab_size) if params.masked else None,
                [grammar.start() for _ in replies if grammar],
                [self._draft_of(params) for _ in replies if self.runner.drafts],
                search,
                taps,
                [Recorder(taps, self.llm.model.config) for _ in replies if taps and taps.record],
            )
        return name

    def cancel(self, id: str) -> bool:
        """End a request now, wherever it is; False where there is none of that id."""
        with self._lock:
            live = self._live.get(id)
            return live is not None and self.schedulers[live.shard].cancel(id)

    def load_adapter(self, name: str, source: str | Path | Mapping[str, LowRank]) -> None:
        """Let requests name an adapter: a directory that PEFT saved, or what `LoraModel.change` gives.

        Nothing is compiled, and requests go on. ValueError naming it where it cannot be served.
        """
        change = self.runner.adapters.pack(name, source)
        with self._lock:
            self.runner.adapters.load(name, change)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. ValueError where there is none of that name, or requests of it are left."""
        with self._lock:
            self.runner.adapters.check(name)
            known = [x for s in self.schedulers for x in (*s.running, *s.waiting)]
            if left := {x.request.id for x in known if x.request.adapter == name}:
                raise ValueError(
                    f"adapter {name!r} is used by requests {sorted(left)}: cancel them or wait for them"
                )
            self.runner.adapters.unload(name)
            for scheduler in self.schedulers:
                scheduler.prefix.forget(name)

    def explain(self) -> list[str]:
        """Lines of text: the form of every operator at the shapes traced in this process so far, why it
        was chosen, and what its alternatives took where that was measured (see `kernels.forms`).
        """
        return explain()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, nor to report."""
        return not (self._live or self._flights or self._deltas)

    @property
    def misses(self) -> int:
        """Programs that had to be compiled after the beginning; 0 with `compile_ahead`."""
        return self.runner.misses

    # Steps.

    def step(self) -> list[Delta]:
        """Run one step, and take in what an earlier one chose; returns what became of requests.

        With `overlap` a step is left running while the next is planned, so what a call returns may be of
        the step before. An interrupt (Ctrl-C) while it waits for the device changes nothing; what else
        is raised here ends the engine, as its pages are then half written.
        """
        with self._lock, jax.set_mesh(self.llm.mesh):
            if self._failure is not None:
                raise RuntimeError(
                    "an earlier step of this engine failed, and what its pages hold is lost: make a new "
                    "Engine, and ask again"
                ) from self._failure
            start, self._waits = time.perf_counter(), False
            try:
                self._step()
            except BaseException as error:
                if not (self._waits and isinstance(error, KeyboardInterrupt)):
                    self._failure = error
                raise
            finally:
                self.busy_s += time.perf_counter() - start
            deltas, self._deltas = self._deltas, []
            return deltas

    def _step(self) -> None:
        self._catch_up(self._may_run_ahead)  # with what an interrupt left
        began = self._dispatch()
        self._deltas += self._reported(event for s in self.schedulers for event in s.poll())
        self._catch_up(began and self._may_run_ahead)

    def _catch_up(self, ahead: bool) -> None:
        """Take in all steps that run; ahead: but for the newest."""
        while len(self._flights) > ahead:
            self._waits = True
            self._flights[0].wait()
            self._waits = False
            self._deltas += self._land(self._flights.popleft())

    def generate(
        self,
        prompts: Sequence[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        taps: Taps | Sequence[Taps | None] | None = None,
        on_text: Callable[[Delta], None] | None = None,
    ) -> list[Output]:
        """Continuations of all prompts, in order; n for each. See `LLM.generate`.

        adapter, taps: of all of them, or of each; see `add`.
        """
        each = self._one_each(prompts, sampling, self._default_params())
        asked = each if on_text is not None else [params.candidates() for params in each]
        drawn = zip(self._serve(prompts, asked, adapter, taps, on_text=on_text), each, strict=True)
        return [output for found, params in drawn for output in best_of(found, params)]

    def beam_search(
        self,
        prompts: Sequence[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | Literal["never"] | None = None,
        num_return: int | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Output]:
        """The num_return best continuations of each prompt, best first. See `LLM.beam_search`.

        Needs `EngineConfig.max_beams`. adapter: of all prompts, or of each; see `add`.
        """
        beams = self.llm.default_search(
            num_beams=num_beams,
            num_return=num_return,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        each = self._one_each(prompts, sampling, self._default_params(beams))
        found = self._serve(prompts, each, adapter, beams=beams)
        return [output for outputs in found for output in outputs if output.score is not None]

    def _default_params(self, beams: BeamOptions | None = None) -> SamplingParams:
        """What the model asks for; searches do not sample."""
        return self.llm.default_sampling(temperature=None if beams is None else 0.0)

    def _one_each(
        self,
        prompts: Sequence[Any],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        default: SamplingParams,
    ) -> list[SamplingParams]:
        """The parameters of each prompt."""
        if isinstance(prompts, str):
            raise ValueError("prompts is a single string: expected a list of prompts")
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"sampling has {len(each)} entries for {len(prompts)} prompts")
        return [default if params is None else params for params in each]

    def _serve(
        self,
        prompts: Sequence[Any],
        each: list[SamplingParams],
        adapter: str | Sequence[str | None] | None,
        taps: Taps | Sequence[Taps | None] | None = None,
        **options: Any,
    ) -> list[list[Output]]:
        """Add all prompts, as fast as the queue takes them, and run steps until they have ended."""
        adapters = [adapter] * len(prompts) if isinstance(adapter, str | None) else list(adapter)
        if len(adapters) != len(prompts):
            raise ValueError(f"adapter has {len(adapters)} entries for {len(prompts)} prompts")
        asked = [taps] * len(prompts) if isinstance(taps, Taps | None) else list(taps)
        if len(asked) != len(prompts):
            raise ValueError(f"taps has {len(asked)} entries for {len(prompts)} prompts")
        work = collections.deque(zip(prompts, each, adapters, asked, strict=True))
        outputs: dict[str, list[Output]] = {}
        try:
            while work or any(name in self._live for name in outputs):
                try:
                    while work:
                        prompt, params, its, seen = work[0]
                        name = self.add(prompt, params, adapter=its, taps=seen, **options)
                        outputs[name] = [reply.output for reply in self._live[name].replies]
                        work.popleft()
                except QueueFull:
                    pass  # a step makes room
                self.step()
        finally:
            for name in outputs:
                self.cancel(name)
            # What was cancelled is reported, and a step that was begun ahead lands.
            left = lambda: any(name in self._live for name in outputs)  # noqa: E731
            while self._failure is None and (left() or not (self._live or self.idle)):
                self.step()
        return list(outputs.values())

    async def stream(
        self, prompt: Any, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Delta]:
        """The continuations of one prompt as they come, beside any number of others. See `add`.

        Leaving the loop early cancels the request.
        """
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        put = lambda delta: loop.call_soon_threadsafe(queue.put_nowait, delta)  # noqa: E731
        beams: BeamOptions | None = options.get("beams")
        params = self._default_params(beams) if params is None else params
        name = await asyncio.to_thread(self.add, prompt, params, on_text=put, **options)
        left = params.n if beams is None else beams.num_return
        try:
            while left:
                pull, driver = asyncio.ensure_future(queue.get()), self._driven(loop)
                await asyncio.wait({pull, driver}, return_when=asyncio.FIRST_COMPLETED)
                if not pull.done():
                    pull.cancel()
                    driver.result()  # raises what a step raised
                    continue
                delta = pull.result()
                left -= delta.finish_reason is not None
                yield delta
        finally:
            self.cancel(name)

    def _driven(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task:
        """The task that runs steps for all streams of an event loop, while there is something to do."""
        if self._driver is None or self._driver.done() or self._driver.get_loop() is not loop:
            self._driver = loop.create_task(self._drive())
        return self._driver

    async def _drive(self) -> None:
        while not self.idle:
            await asyncio.to_thread(self.step)

    @property
    def _may_run_ahead(self) -> bool:
        """Whether a step can be planned without the tokens of the one before."""
        waits = self._live.some("grammars", "search")
        return self.config.overlap and not self.runner.drafts and not waits

    # The device's side.

    def _dispatch(self) -> bool:
        """Plan a step and start it; False where there is nothing to do before one lands."""
        self._propose()
        self.runner.adapters.places.begin(x for scheduler in self.schedulers for x in scheduler.running)
        start = time.perf_counter()
        plans = [scheduler.plan() for scheduler in self.schedulers]
        self.scheduling_s += time.perf_counter() - start
        if not any(plans):
            return False
        self._flights.append(self.runner.run(plans))
        return True

    def _propose(self) -> None:
        """Give running sequences drafts of what may come next."""
        if not self.runner.drafts:
            return
        for sequence in itertools.chain(*(scheduler.running for scheduler in self.schedulers)):
            live = self._live[sequence.request.id]
            if live.search is not None:
                continue
            left = sequence.request.max_new_tokens - len(sequence.generated) - 1
            ready = sequence.pending == 0 and sequence.computed == sequence.length - 1 and left > 0
            if ready:
                draft = live.drafts[sequence.sample].propose(
                    sequence.tokens, min(left, self.runner.drafts)
                )
                if draft and live.grammars:
                    words = -(-self.llm.model.config.vocab_size // 32)
                    scratch = np.zeros((len(draft) + 1, words), np.uint32)
                    draft = draft[: live.grammars[sequence.sample].fill_draft(scratch, draft)]
                sequence.draft = draft

    def _draft_of(self, params: SamplingParams) -> PromptLookup | DraftLength:
        """What drafts for one continuation: of texts of a form the host must know it."""
        if self.runner.drafter is None or params.structured is not None:
            return PromptLookup(self.runner.drafts)
        return DraftLength(self.runner.drafts, self.runner.drafter.cost)

    def _land(self, flight: Flight) -> list[Delta]:
        """Take in what a step chose."""
        chosen: Any = flight.chosen
        made, *more = read_chosen(chosen if chosen.ndim == 4 else chosen[:, :, None])
        made = made.tolist()  # [D, S or R, P]; the arrays of `more` begin likewise
        scores = None if flight.scores is None else read_chosen(flight.scores)
        beams = () if flight.candidates is None else read_candidates(flight.candidates)
        deltas: list[Delta] = []
        for d, plan in enumerate(flight.plans):
            if plan is None:
                continue
            tokens, stopped, texts = {}, set(), {}
            for i, row in enumerate(plan.rows):
                if row.sequence.finished is not None:
                    continue
                if scores is not None and self._live.of(row).is_scored(row):
                    at = flight.starts[d, i]
                    self._score(row, [x[d, at : at + row.count] for x in scores])
                live = self._live.of(row)
                if row.samples and live.search is not None:
                    live.search.take(row.sequence, Candidates(*(x[d, i] for x in beams)))
                elif row.samples:
                    logs = [x[d, i] for x in more] if live.params.logprobs is not None else ()
                    tokens[i], texts[row.sequence], ended = self._reply(row, live, made[d][i], logs)
                    if ended:
                        stopped.add(i)
                if flight.taps is not None:
                    self._record(flight.taps, d, i, row, len(tokens.get(i, ())))
            start = time.perf_counter()
            events = self.schedulers[d].commit(plan, tokens, stopped)
            self.scheduling_s += time.perf_counter() - start
            deltas += self._reported(events, texts) + self._advance(d, plan)
        return deltas

    def _advance(self, d: int, plan: StepPlan) -> list[Delta]:
        """Let the searches of a step that has landed go on; what has become of those that are over."""
        scheduler = self.schedulers[d]
        for name in dict.fromkeys(row.sequence.request.id for row in plan.rows):
            search = self._live[name].search if name in self._live else None
            if search is not None and not search.advance(scheduler):
                scheduler.cancel(name, Reason.STOP)
        return self._reported(scheduler.poll())

    def _reply(
        self, row: Row, live: Live, made: list[int], logs: Sequence[np.ndarray]
    ) -> tuple[list[int], str, bool]:
        """(new tokens, their text, whether it ends there) of a row's choices, [P] and [P, ...]."""
        sample = row.sequence.sample
        reply, text, tokens = live.replies[sample], "", []
        for place, token in enumerate(made):
            if token < 0 or reply.stopped:
                break
            tokens.append(token)
            text += reply.take(token, [x[place] for x in logs] or None)
            if live.grammars:
                live.grammars[sample].accept(token)
        if row.drafted:
            accepted = sum(token >= 0 for token in made) - 1
            live.drafts[sample].learn(row.drafted, accepted)
            self.drafted_tokens += row.drafted
            self.accepted_tokens += accepted
        return tokens, text, reply.stopped

    def _record(self, taps: StepTaps, d: int, i: int, row: Row, made: int) -> None:
        """Note what was recorded of a row that made so many tokens, but for drafts that did not stay."""
        live = self._live.of(row)
        if not live.recorders:
            return
        count = row.count - (1 + row.drafted - made if row.samples else 0)
        recorder = live.recorders[row.sequence.sample]
        found = taps.of_row(d, i, count, recorder.layers)
        recorder.add(row.start, count, found)
        in_prompt = min(count, len(row.sequence.request.prompt) - row.start)
        if row.sequence.sample == 0 and in_prompt > 0:  # the others begin after it
            for other in live.recorders[1:]:
                other.add(row.start, in_prompt, found)

    def _score(self, row: Row, scores: list[np.ndarray]) -> None:
        """Note the log probabilities of the prompt's tokens after each of a row's."""
        live, prompt = self._live.of(row), row.sequence.request.prompt
        count = min(row.count, len(prompt) - 1 - row.start)
        for reply in live.replies:  # of a prompt that is computed again a part is known
            known = len(reply.output.prompt_logprobs or ()) - 1 - row.start
            reply.take_prompt(*(x[known:count] for x in scores[1:]))

    def _reported(self, events, texts: dict[Running, str] | None = None) -> list[Delta]:
        """The events as callers see them; requests that have ended are forgotten."""
        deltas = []
        for event in events:
            name = event.sequence.request.id
            live = self._live.get(name)
            if live is None:
                continue  # a search, which ended with the event of its first beam
            if live.search is not None:
                deltas += self._found(name, live, event.reason)
            else:
                deltas.append(self._delta(event, (texts or {}).get(event.sequence, "")))
        return deltas

    def _delta(self, event: Event, text: str) -> Delta:
        name, sample = event.sequence.request.id, event.sequence.sample
        live = self._live[name]
        reply = live.replies[sample]
        if event.reason is not None:
            text += "" if event.reason in (Reason.STOP, Reason.LENGTH) else reply.end()
            reply.output.finish_reason = str(event.reason)
            reply.output.taps = live.recorders[sample].whole() if live.recorders else None
            live.left -= 1
        reason = None if event.reason is None else str(event.reason)
        delta = Delta(name, sample, text, tuple(event.tokens), reason, reply.output)
        if not live.left:
            del self._live[name]
        self._tell(live, delta)
        return delta

    def _found(self, name: str, live: Live, reason: Reason) -> list[Delta]:
        """What a search that ends now has found; outputs beyond that stay empty, without a score."""
        assert live.search is not None
        del self._live[name]
        deltas, found = [], live.search.rules.found()
        for sample, reply in enumerate(live.replies):
            output = reply.output
            if sample < len(found):
                self.llm.fill(
                    output, live.params, list(found[sample].tokens), list(found[sample].logprobs)
                )
                output.score = float(found[sample].score)
            if sample >= len(found) or reason != Reason.STOP:
                output.finish_reason = str(reason)
            tokens, ended = tuple(output.token_ids), output.finish_reason
            deltas.append(Delta(name, sample, output.text, tokens, ended, output))
            self._tell(live, deltas[-1])
        return deltas

    def _tell(self, live: Live, delta: Delta) -> None:
        """Call a request's own callback."""
        if live.on_text is not None:
            try:
                live.on_text(delta)
            except Exception:  # the caller's own: it must not touch other requests
                logger.exception("request %s: its callback raised, it ends here", delta.id)
                live.on_text = None
                self.schedulers[live.shard].cancel(delta.id, Reason.ERROR)

    # Checks and sizes.

    def _scheduler(self, settings: SchedulerConfig, shard: int) -> Scheduler:
        if self.config.trace:
            path = Path(f"{self.config.trace}.{shard}" if shard else self.config.trace)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w", encoding="utf-8", buffering=1)  # whole lines, whatever happens
            return TraceWriter(settings, self._clock, file)
        may_begin = self.runner.adapters.places.may_begin if self.config.adapters else None
        return Scheduler(settings, self._clock, may_begin)

    def _check(self, params: SamplingParams, stop_ids: tuple[int, ...]) -> None:
        """Refuse by name what the steps cannot do."""
        if params.best_of is not None:
            raise ValueError(
                f"SamplingParams.best_of is {params.best_of}: what is chosen at the end cannot come in "
                "pieces; use None, or `generate` without on_text"
            )
        vocab = self.llm.model.config.vocab_size
        if params.prompt_logprobs is not None and not self.config.prompt_logprobs:
            raise ValueError(
                f"SamplingParams.prompt_logprobs is {params.prompt_logprobs}: this engine was not made "
                "for it; set EngineConfig.prompt_logprobs"
            )
        tier_of([params])
        table = new_rows(1, vocab, EVERYTHING, history=False)
        pack_row(
            table,
            0,
            params,
            vocab_size=vocab,
            sample_index=0,
            stop_ids=stop_ids,
            default_seed=0,
            stream=0,
        )

    def _check_taps(self, taps: Taps, tokens: int) -> None:
        """Refuse by name what cannot be recorded or patched in a text of so many inputs."""
        if self.config.strict_numerics:
            raise ValueError(
                "taps with strict_numerics=True: a step with taps is another program, which may round "
                "otherwise for all its requests; take an engine without strict_numerics"
            )
        taps.check(self.llm.model.config, tokens)
