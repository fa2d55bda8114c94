"""Which tokens of which sequences the next step computes, in which pages: a state machine, no device.

    request -> waiting -> running: prompt in chunks -> one token a step -> finished
                  ^                      |                   |
                  +----- preempted ------+-------------------+

The engine calls `plan`, runs the step on the device, and gives the sampled tokens to `commit`. It may
ask for one more plan before that commit, so that the device never waits: then a sequence has pending
tokens, which the device knows and the host does not. Device steps run in order, so a page may be given
to a later plan as soon as nobody needs it after the plans made so far.

All sequences have a rank: priority, plus one for every `aging_s` seconds since the request arrived,
running or not. As all age alike, the order of two never changes, and none is overtaken forever. Who
ranks higher is served first, and never loses pages to one that ranks lower: so the first always gets on.
"""

import bisect
import collections
import heapq
from collections.abc import Callable, Collection, Mapping

from llm_jax.engine.pages import HostPages, PagePool, PoolSpec
from llm_jax.engine.plan import Event, Load, Row, SchedulerConfig, Statistics, StepPlan
from llm_jax.engine.prefix import Match, PrefixCache
from llm_jax.engine.request import Reason, Request, Sequence

PIPELINE = 2  # plans that may await their commit


class QueueFull(RuntimeError):
    """No more requests are taken for now."""


class Scheduler:
    """Holds all requests from `add` until they end. One thread; `clock` in seconds is its only outside.

    A method reads the clock once at most. What ends comes as an Event of the next `commit` or `poll`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        clock: Callable[[], float],
        may_begin: Callable[[Sequence], bool] | None = None,
    ):
        self.config = config
        self._may_begin = may_begin  # asked by rank of what else could run now; False: others pass by it
        self.pools = [PagePool(spec.pages) for spec in config.pools]
        host_pages = config.host_pages + config.prefix_host_pages
        self._hosts = [HostPages(host_pages, config.prefix_host_pages) for _ in self.pools]
        self.prefix = PrefixCache(config.page_size, config.pools, self.pools, self._hosts)
        self.statistics = Statistics()
        self._clock = clock
        self._waiting: list[Sequence] = []  # by rank, as is _running; a leader stands for its siblings
        self._running: list[Sequence] = []
        self._slots = list(range(config.max_rows))  # free ones, a heap
        self._live: dict[str, list[Sequence]] = {}
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap; may hold what has ended
        self._open: collections.deque[StepPlan] = collections.deque()  # await their commit
        self._events: list[Event] = []
        self._released: list[Sequence] = []
        self._short: tuple[Sequence | None, list[int]] = (None, [])  # waits for pages, available then
        self._margin = [int(spec.pages * config.watermark) for spec in config.pools]

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences with a slot, highest rank first."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The queue, next one first. Of a request that has not begun only the first sample is here."""
        return tuple(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to plan or to commit."""
        return not (self._live or self._open)

    def load(self) -> Load:
        """How busy it is now."""
        return Load(
            running=self.config.max_rows - len(self._slots),
            waiting=len(self._waiting),
            waiting_tokens=sum(sequence.length - sequence.computed for sequence in self._waiting),
            free_pages=tuple(pool.available for pool in self.pools),
            total_pages=tuple(pool.pages - 1 for pool in self.pools),
            free_host_pages=tuple(host.available for host in self._hosts),
        )

    # Requests.

    def add(self, request: Request) -> None:
        """Queue a request. ValueError where it can never run or its id is in use; QueueFull for now."""
        now = self._clock()
        self._check(request)
        if len(self._waiting) >= self.config.max_queue:
            self.statistics.refused += 1
            raise QueueFull(f"{len(self._waiting)} requests wait, max_queue={self.config.max_queue}")
        number = self.statistics.requests
        self.statistics.requests += 1
        age = now / self.config.aging_s
        samples = [
            Sequence(
                request,
                sample,
                rank=(age - request.priority, number, sample),
                tokens=list(request.prompt),
                pages=self._no_pages(),
            )
            for sample in range(request.n)
        ]
        self._live[request.id] = samples
        samples[0].siblings = samples[1:]
        bisect.insort(self._waiting, samples[0], key=_rank)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, number, request))

    def cancel(self, id: str, reason: Reason = Reason.CANCELLED) -> bool:
        """End all samples of a request now; False where the id is not in use."""
        return self._end_all(id, reason)

    def extend(self, beams: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Let a search go on with these n beams: each continues one of its sequences by a token.

        Returns the sequences of the new beams: a sequence goes on as its first child, and the others,
        which share its pages, take the place of sequences without a child. No row of the search may
        await its commit. ValueError where a parent is not computed.
        """
        for parent, _ in beams:
            if parent.slot < 0 or parent.computed != parent.length:
                raise ValueError(f"sequence {parent.key} is not computed: extend it after its commit")
        parents = {parent for parent, _ in beams}
        given_up = [s for s in self._live[beams[0][0].request.id] if s not in parents]
        for sequence in given_up:
            self._release_pages(sequence)
        extended = []
        for parent, _ in beams:
            if parent not in extended:
                extended.append(parent)
                continue
            extended.append(given_up.pop(0))
            extended[-1].tokens = list(parent.tokens)
            self._share_pages(parent, extended[-1], parent.computed)
        for sequence, (_, token) in zip(extended, beams, strict=True):
            sequence.tokens.append(token)
        return extended

    def poll(self) -> list[Event]:
        """Events that no commit has returned: cancellations, deadlines met while planning."""
        return self._take_events()

    # Steps.

    def plan(self) -> StepPlan | None:
        """The next step, to be run, or None where there is nothing before a commit or a new request.

        ValueError where PIPELINE plans already await their commit.
        """
        if len(self._open) >= PIPELINE:
            raise ValueError(f"{PIPELINE} plans await their commit: commit the oldest first")
        self._expire(self._clock())
        plan = StepPlan(self.statistics.steps)
        preemptions = self.statistics.preemptions
        self._plan_running(plan)
        if preemptions == self.statistics.preemptions or not plan.cost:  # else pages are short
            self._admit(plan)
        self._move_prefixes(plan)
        if not (plan.cost or plan.offloads):
            return None
        for row in plan.rows:
            self._after(row)
        plan.released, self._released = self._released, []
        self._open.append(plan)
        self._count(plan)
        return plan

    def commit(
        self, plan: StepPlan, tokens: Mapping[int, list[int]], stopped: Collection[int] = ()
    ) -> list[Event]:
        """Take in what the oldest open plan sampled; returns the events since the last time.

        tokens: by index into plan.rows, for rows that sample: one token, or up to 1 + drafted; none for
        beams, see `extend`. stopped: indices of rows whose last token ends them. What has ended already
        is ignored.
        """
        if not self._open or self._open[0] is not plan:
            raise ValueError(f"plan {plan.number} is not the oldest that awaits its commit")
        self._open.popleft()
        for index, row in enumerate(plan.rows):
            if _expected(row) and row.sequence.finished is None:
                self._accept(row, tokens.get(index, []), index in stopped)
        self._expire(self._clock())
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # Running sequences.

    def _plan_running(self, plan: StepPlan) -> None:
        """Rows for the running sequences: the decodes, then the prompts."""
        decodes, prompts = [], []
        for sequence in self._running:
            length = sequence.length
            if sequence.verifying is None and _to_sample(sequence, length) > 0:
                (decodes if length - sequence.computed == 1 else prompts).append(sequence)
        for number, sequence in enumerate(decodes, 1):
            if sequence.slot >= 0:  # else it just gave up its pages to another
                after = len(decodes) - number
                drafted = self._trim_draft(plan, sequence, after) if sequence.draft else 0
                self._place(plan, sequence, 1 + drafted, drafted)
        for sequence in prompts:
            count = self._chunk(plan, sequence.length - sequence.computed)
            if sequence.slot >= 0 and count:
                self._place(plan, sequence, count)

    def _trim_draft(self, plan: StepPlan, sequence: Sequence, after: int) -> int:
        """Cut a draft to what it may bring and the budget bears with `after` rows and a chunk."""
        alignment = self.config.alignment
        spare = self.config.token_budget - plan.cost - after - alignment
        left = _to_sample(sequence, sequence.length)
        most = min(left, spare // alignment * alignment, self.config.chunk_limit) - 1
        if sequence.pending:
            most = 0  # it was drafted before its last token was known
        sequence.draft = sequence.draft[: max(0, most)]
        return len(sequence.draft)

    def _chunk(self, plan: StepPlan, left: int) -> int:
        """How many of the `left` tokens of a sequence the step can take."""
        room = self.config.token_budget - plan.cost
        if left == 1:
            return min(1, room)
        return min(left, self.config.chunk_limit, room // self.config.alignment * self.config.alignment)

    def _cost(self, count: int) -> int:
        """Tokens of the budget that a row of `count` tokens takes."""
        return count if count == 1 else -(-count // self.config.alignment) * self.config.alignment

    def _place(self, plan: StepPlan, sequence: Sequence, count: int, drafted: int = 0) -> None:
        """Plan a row of a running sequence, unless its pages lack and it has to be preempted itself."""
        start = sequence.computed
        if not self._hold(plan, sequence, start, start + count):
            return
        samples = start + count - drafted >= sequence.length
        row = Row(sequence, start, count, samples, sequence.fresh, drafted)
        (plan.decodes if count == 1 else plan.chunks).append(row)
        plan.cost += self._cost(count)
        sequence.fresh = False
        sequence.computed += count
        sequence.pending += _expected(row)
        if drafted:
            sequence.verifying = row

    def _after(self, row: Row) -> None:
        """What the step of a row makes possible for later ones: prefix pages, the other samples."""
        sequence = row.sequence
        if row.count > 1:
            self._remember(sequence)
        if row.samples and sequence.siblings:
            for sibling, slot in zip(sequence.siblings, sequence.spare, strict=True):
                sibling.slot, sibling.fresh = slot, True
                self._share_pages(sequence, sibling, self._in_common(sequence, sibling))
                bisect.insort(self._running, sibling, key=_rank)
            sequence.siblings, sequence.spare = [], []

    def _accept(self, row: Row, tokens: list[int], stopped: bool) -> None:
        """Add a row's sampled tokens to its sequence, which may have lost its slot since."""
        sequence = row.sequence
        if not 1 <= len(tokens) <= 1 + row.drafted:
            raise ValueError(
                f"{len(tokens)} tokens for a row of {sequence.key}: expected 1 to {1 + row.drafted}"
            )
        sequence.tokens.extend(tokens)
        sequence.pending -= 1 + row.drafted
        if sequence.verifying is row:
            sequence.verifying, sequence.draft = None, []
            sequence.computed -= row.count - len(tokens)
        if stopped:
            self._finish(sequence, Reason.STOP, tokens)
        elif len(sequence.tokens) - len(sequence.request.prompt) >= sequence.request.max_new_tokens:
            self._finish(sequence, Reason.LENGTH, tokens)
        else:
            self._remember(sequence)
            self._events.append(Event(sequence, tokens, None))

    # Admission.

    def _admit(self, plan: StepPlan) -> None:
        """Rows for waiting sequences by rank. None goes before one that waits for pages."""
        free = len(self._slots)
        for sequence in self._waiting[:free] if self._may_begin is None else list(self._waiting):
            free -= 1 + len(sequence.siblings)
            if free < 0 or plan.cost + self.config.alignment > self.config.token_budget:
                return
            if sequence.pending:
                continue  # until its commit
            if self._may_begin is not None and not self._may_begin(sequence):
                free += 1 + len(sequence.siblings)
                continue
            if self._still_short(sequence):
                return
            if sequence.host:
                self._trim_host(sequence)
            match = self._match(sequence)
            if not sequence.host and self._comes(plan, sequence, match.tokens):
                self.statistics.deferred += 1
                continue
            count = self._chunk(plan, sequence.length - match.tokens)
            if not self._fits(sequence, match, match.tokens + count):
                self._short = sequence, [pool.available for pool in self.pools]
                return
            self._enter(plan, sequence, match)
            self._place(plan, sequence, count)

    def _still_short(self, sequence: Sequence) -> bool:
        """Whether pages lacked for this sequence and none came back since: spares the search."""
        which, available = self._short
        return (
            which is sequence
            and bool(self._running)
            and all(pool.available <= n for pool, n in zip(self.pools, available, strict=True))
        )

    def _match(self, sequence: Sequence) -> Match:
        """What there is of a waiting sequence: its host pages, or what the prefix cache has for it."""
        if sequence.host:
            absent = [[-1] * len(pages) for pages in sequence.host]
            return Match(sequence.computed, absent, sequence.host)
        if self._caches(sequence):
            return self.prefix.match(sequence.tokens, sequence.request.adapter)
        return Match(0, self._no_pages(), self._no_pages())

    def _comes(self, plan: StepPlan, sequence: Sequence, matched: int) -> bool:
        """Whether a prompt of this plan computes the page that the sequence would have to begin with."""
        stop = matched + self.config.page_size
        if stop >= len(sequence.tokens) or not self._caches(sequence):
            return False
        page = sequence.tokens[matched:stop]
        return any(
            row.start < stop <= len(row.sequence.tokens)
            and row.sequence.tokens[matched:stop] == page
            and row.sequence.tokens[:matched] == sequence.tokens[:matched]
            and row.sequence.request.adapter == sequence.request.adapter
            and self._caches(row.sequence)
            for row in plan.chunks
        )

    def _fits(self, sequence: Sequence, match: Match, stop: int) -> bool:
        """Whether there are pages for all known tokens, or those seen by a row that ends at `stop`."""
        others = bool(self._running)
        for spec, pool, pages, hosts, margin in zip(
            self.config.pools, self.pools, match.pages, match.hosts, self._margin, strict=True
        ):
            need = self._pages(stop if spec.window else sequence.length) - len(pages)
            need += sum(map(pool.is_idle, pages)) + sum(page >= 0 for page in hosts)
            if others:
                made = self._pages(sequence.length) - self._pages(len(sequence.request.prompt))
                need += margin + len(sequence.siblings) * (1 + made)  # beams differ in what they made
            if need > pool.available:
                return False
        return True

    def _enter(self, plan: StepPlan, sequence: Sequence, match: Match) -> None:
        """Give a waiting sequence its slots, what was computed of it, and pages for all known tokens."""
        _remove(self._waiting, sequence)
        bisect.insort(self._running, sequence, key=_rank)
        sequence.slot, *sequence.spare = (
            heapq.heappop(self._slots) for _ in range(1 + len(sequence.siblings))
        )
        sequence.fresh = True
        if sequence.host:
            self._restore(plan, sequence)
        elif self._caches(sequence):
            sequence.pages = self.prefix.use(len(sequence.tokens), match)
            self.statistics.hit_tokens = self.prefix.statistics.hit_tokens
            self.statistics.host_hit_tokens = self.prefix.statistics.host_hit_tokens
        sequence.computed = match.tokens
        for spec, pool, pages in zip(self.config.pools, self.pools, sequence.pages, strict=True):
            if not spec.window:  # a window's pages come with each row
                pages += pool.allocate(self._pages(sequence.length) - len(pages))

    # Pages.

    def _pages(self, tokens: int) -> int:
        """Pages of so many tokens."""
        return -(-tokens // self.config.page_size)

    def _no_pages(self) -> list[list[int]]:
        return [[] for _ in self.pools]

    def _caches(self, sequence: Sequence) -> bool:
        """Whether the prefix cache serves a sequence."""
        return self.config.prefix_cache and sequence.request.reuse_prefix

    def _hold(self, plan: StepPlan, sequence: Sequence, start: int, stop: int) -> bool:
        """Let a sequence have pages of its own for the tokens from start to stop, and give up what they
        see no more; False where that had it preempted.
        """
        first, whole = start // self.config.page_size, self._pages(stop)
        lacking = False
        for spec, pool, pages in zip(self.config.pools, self.pools, sequence.pages, strict=True):
            if spec.window:
                self._slide(spec, pool, pages, start)
            if whole > len(pages) or pool.references(pages[first]) > 1:
                lacking = True
        return not lacking or self._obtain(plan, sequence, first, whole)

    def _obtain(self, plan: StepPlan, sequence: Sequence, first: int, whole: int) -> bool:
        """New pages up to the page `whole`, and a copy of the page `first` where it is shared."""
        needs, shared = [], []
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            shared.append(first < len(pages) and pool.references(pages[first]) > 1)
            needs.append(max(0, whole - len(pages)) + shared[-1])
        if not self._make_room(plan, sequence, needs):
            return False
        for index, (pool, pages) in enumerate(zip(self.pools, sequence.pages, strict=True)):
            new = pool.allocate(needs[index])
            if shared[index]:
                plan.copies.append((index, pages[first], new[0]))
                pool.release(pages[first])
                pages[first] = new.pop(0)
            pages += new
        return True

    def _hidden(self, spec: PoolSpec, start: int) -> int:
        """Leading pages of a pool with a window that tokens from `start` on do not see."""
        return max(0, start - spec.window + 1) // self.config.page_size

    def _slide(self, spec: PoolSpec, pool: PagePool | HostPages, pages: list[int], start: int) -> None:
        """Release the pages of a pool with a window that tokens from `start` on do not see."""
        for at in range(self._hidden(spec, start) - 1, -1, -1):
            if pages[at] < 0:
                return  # so are those before
            pool.release(pages[at])
            pages[at] = -1

    def _make_room(self, plan: StepPlan, sequence: Sequence, needs: list[int]) -> bool:
        """Preempt the lowest ranks until there are pages; False when that is the sequence itself."""
        while any(need > pool.available for need, pool in zip(needs, self.pools, strict=True)):
            lowest = self._running[-1]
            self._preempt(plan, lowest)
            if sequence.slot < 0:
                return False
        return True

    def _share_pages(self, parent: Sequence, child: Sequence, computed: int) -> None:
        """Give a child the pages of its first `computed` tokens, which are the parent's too."""
        child.computed = computed
        whole = self._pages(computed)
        child.pages = [pages[:whole] for pages in parent.pages]
        for pool, pages in zip(self.pools, child.pages, strict=True):
            for page in pages:
                if page >= 0:
                    pool.share(page)

    def _in_common(self, parent: Sequence, child: Sequence) -> int:
        """Tokens whose pages of a running parent are a child's too, which computes its last itself."""
        most = min(parent.computed, len(child.tokens) - 1)
        pairs = enumerate(zip(parent.tokens[:most], child.tokens, strict=False))
        common = next((at for at, (a, b) in pairs if a != b), most)
        for spec, pages in zip(self.config.pools, parent.pages, strict=True):
            seen = self._hidden(spec, common) if spec.window else 0
            if min(pages[seen : self._pages(common)], default=0) < 0:
                return 0  # the parent's window is past what the child sees
        return common

    def _remember(self, sequence: Sequence) -> None:
        """Leave pages filled with known tokens in the prefix cache."""
        whole = min(sequence.computed, len(sequence.tokens)) // self.config.page_size
        if whole > sequence.kept and sequence.slot >= 0 and self._caches(sequence):
            sequence.node = self.prefix.insert(
                sequence.tokens, sequence.pages, whole, sequence.request.adapter, sequence.node
            )
            sequence.kept = whole

    # Leaving.

    def _preempt(self, plan: StepPlan, sequence: Sequence) -> None:
        """Send a running sequence back to the queue, without its slot, pages and row in this plan."""
        self.statistics.preemptions += 1
        if sequence.request.search:
            sequence = self._gather(plan, sequence.request.id)
        else:
            intact = self._undo(plan, sequence)
            if not (intact and self._offload(plan, sequence)):
                sequence.computed, sequence.verifying = 0, None
            self._leave(sequence)
        bisect.insort(self._waiting, sequence, key=_rank)

    def _gather(self, plan: StepPlan, id: str) -> Sequence:
        """Take all beams of a search out of their slots; the first, which now stands for the others.

        Beams wait for each other, so two searches of which each has some beams running could wait for
        each other's pages. The others will share what the first has computed, as samples do.
        """
        beams = [sequence for sequence in self._live[id] if sequence.slot >= 0]
        for sequence in beams:
            self._undo(plan, sequence)
            sequence.computed = 0
            self._leave(sequence)
        beams[0].siblings += beams[1:]
        return beams[0]

    def _undo(self, plan: StepPlan, sequence: Sequence) -> bool:
        """Take the row of a sequence out of the plan; whether its pages hold all that was computed."""
        row = next((row for row in plan.rows if row.sequence is sequence), None)
        if row is None:
            return True
        (plan.decodes if row.count == 1 else plan.chunks).remove(row)
        plan.cost -= self._cost(row.count)
        sequence.computed = row.start
        sequence.pending -= _expected(row)
        if row.drafted:
            sequence.verifying = None
        mine = {(pool, page) for pool, pages in enumerate(sequence.pages) for page in pages}
        copies = [copy for copy in plan.copies if (copy[0], copy[2]) not in mine]
        intact = len(copies) == len(plan.copies)  # else a page waits for a copy that is not made now
        plan.copies = copies
        return intact

    def _offload(self, plan: StepPlan, sequence: Sequence) -> bool:
        """Have what was computed of a sequence copied to host pages; False where they lack."""
        start = sequence.verifying.start if sequence.verifying else sequence.computed
        for spec, pool, pages in zip(self.config.pools, self.pools, sequence.pages, strict=True):
            if spec.window:
                self._slide(spec, pool, pages, start)
        whole = self._pages(sequence.computed)
        held = [pages[:whole] for pages in sequence.pages]
        needs = [sum(page >= 0 for page in pages) for pages in held]
        lacking = any(n > host.available for n, host in zip(needs, self._hosts, strict=True))
        if self.config.preemption != "offload" or not whole or lacking:
            return False
        for pool, (need, pages) in enumerate(zip(needs, held, strict=True)):
            hosts = self._hosts[pool].take(need)
            for at, page in enumerate(pages):
                if page >= 0:
                    pages[at] = hosts.pop()
                    plan.offloads.append((pool, page, pages[at]))
        sequence.host = held
        self.statistics.offloads += 1
        return True

    def _trim_host(self, sequence: Sequence) -> None:
        """Free the host pages of no use since a draft was judged: refused, or seen no more."""
        whole = self._pages(sequence.computed)
        for spec, host, pages in zip(self.config.pools, self._hosts, sequence.host, strict=True):
            if spec.window:
                self._slide(spec, host, pages, sequence.computed)
            for page in pages[whole:]:
                host.release(page)
            del pages[whole:]

    def _restore(self, plan: StepPlan, sequence: Sequence) -> None:
        """Give a sequence device pages for its host pages."""
        for index, (pool, pages) in enumerate(zip(self.pools, sequence.host, strict=True)):
            for at, page in enumerate(pages):
                if page >= 0:
                    pages[at] = pool.allocate(1)[0]
                    plan.restores.append((index, pages[at], page))
                    self._hosts[index].rest(page)
        sequence.pages, sequence.host = sequence.host, []

    def _move_prefixes(self, plan: StepPlan) -> None:
        """Have the plan move the pages that the prefix cache gave up or took back meanwhile."""
        offloads, restores = self.prefix.moves()
        plan.offloads += offloads
        plan.restores += restores

    def _leave(self, sequence: Sequence) -> None:
        """Take a running sequence's slots and pages."""
        _remove(self._running, sequence)
        for slot in [sequence.slot, *sequence.spare]:
            heapq.heappush(self._slots, slot)
        self._release_pages(sequence)
        sequence.slot, sequence.spare, sequence.draft = -1, [], []
        self._released.append(sequence)

    def _release_pages(self, sequence: Sequence) -> None:
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            for page in reversed(pages):  # so that the prefix cache gives up the last pages first
                if page >= 0:
                    pool.release(page)
        sequence.pages = self._no_pages()
        sequence.node, sequence.kept = None, 0

    def _finish(self, sequence: Sequence, reason: Reason, tokens: list[int] | None = None) -> None:
        """End a sequence wherever it is."""
        if sequence.slot >= 0:
            self._remember(sequence)
            self._leave(sequence)
        else:
            _remove(self._waiting, sequence)  # not there if its first sample stands for it
        for host, pages in zip(self._hosts, sequence.host or self._no_pages(), strict=True):
            for page in pages:
                if page >= 0:
                    host.release(page)
        sequence.host, sequence.siblings = [], []
        sequence.finished = reason
        self.statistics.finished += 1
        live = self._live[sequence.request.id]
        live.remove(sequence)
        if not live:
            del self._live[sequence.request.id]
        self._events.append(Event(sequence, tokens or [], reason))

    def _end_all(self, id: str, reason: Reason) -> bool:
        sequences = list(self._live.get(id, ()))
        for sequence in sequences:
            self._finish(sequence, reason)
        return bool(sequences)

    def _expire(self, now: float) -> None:
        """End requests whose deadline has come."""
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            live = self._live.get(request.id)
            if live and live[0].request is request:
                self._end_all(request.id, Reason.DEADLINE)

    # Checks and counts.

    def _check(self, request: Request) -> None:
        """ValueError where a request can never run."""
        config, total = self.config, len(request.prompt) + request.max_new_tokens
        name = f"request {request.id!r}"
        if request.id in self._live:
            raise ValueError(f"{name}: the id is in use; give every request its own")
        if not request.prompt:
            raise ValueError(f"{name}: prompt has no tokens; give at least one (a bos token will do)")
        if request.max_new_tokens < 1:
            raise ValueError(f"{name}: max_new_tokens={request.max_new_tokens}: must be at least 1")
        if not 1 <= request.n <= config.max_rows:
            raise ValueError(f"{name}: n={request.n}: must be from 1 to max_rows={config.max_rows}")
        if total > config.max_length:
            raise ValueError(
                f"{name}: {len(request.prompt)} prompt tokens and max_new_tokens="
                f"{request.max_new_tokens} are more than max_length={config.max_length}; shorten one"
            )
        windows = any(spec.window for spec in config.pools)  # beams may not share what these have passed
        for spec in config.pools:
            pages = self._pages(total - 1)  # the last token is never an input
            if spec.window:  # what a chunk sees, and the token after it; they begin anywhere in a page
                pages = min(pages, self._pages(spec.window + config.chunk_limit) + 1)
            beams = request.n if request.search else 1
            shared = 0 if windows else len(request.prompt) // config.page_size
            pages = shared + beams * (pages - shared)
            if pages > spec.pages - 1:
                of = f"{beams} beams of {total} tokens" if request.search else f"{total} tokens"
                raise ValueError(
                    f"{name}: {of} need {pages} pages and {spec} gives out {spec.pages - 1}: "
                    "shorten the request, or give the pool more pages"
                )

    def _count(self, plan: StepPlan) -> None:
        self.statistics.steps += 1
        self.statistics.rows += len(plan.decodes) + len(plan.chunks)
        self.statistics.scheduled_tokens += plan.tokens
        self.statistics.padded_tokens += plan.cost
        self.statistics.copied_pages += len(plan.copies)


def _remove(ranked: list[Sequence], sequence: Sequence) -> None:
    """Take a sequence out of a list by rank, if it is there."""
    at = bisect.bisect_left(ranked, sequence.rank, key=_rank)
    if at < len(ranked) and ranked[at] is sequence:
        del ranked[at]


def _rank(sequence: Sequence) -> tuple[float, int, int]:
    return sequence.rank


def _expected(row: Row) -> int:
    """Tokens that the commit of a row brings at most; beams get theirs by `extend`."""
    return 1 + row.drafted if row.samples and not row.sequence.request.search else 0


def _to_sample(sequence: Sequence, length: int) -> int:
    """Tokens that no planned row of a sequence of this length samples yet."""
    request = sequence.request
    return request.max_new_tokens - length + len(request.prompt)
