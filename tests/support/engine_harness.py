"""What the engine's tests share: a runner that checks what it is given, and the engine around it.

Nothing here depends on time: `Fixed` stands in for the pace that an engine learns.
"""

from __future__ import annotations

import json
import queue
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pinaivu_box.engine import chat_template, grammar_validation, image_decoding, messages
from pinaivu_box.engine import engine as engines
from pinaivu_box.engine.drafting import Allowance
from pinaivu_box.engine.fake_runner import END, N_VOCAB, FakeRunner
from pinaivu_box.engine.image_encoder import ImageEncoded, ImageEncoder
from pinaivu_box.engine.messages import Add, Cancel, Embed, LoadModel, Named, Sampling, StepFrame
from pinaivu_box.engine.output import OutputBuffer
from pinaivu_box.engine.own_templates import CHATML
from pinaivu_box.engine.prefix_store import PrefixStore
from pinaivu_box.engine.request_preparer import PreparedRequest, RequestPreparer
from pinaivu_box.engine.runner import Batch, NoSlot, Runner
from pinaivu_box.engine.sandboxed_template import SandboxedTemplate
from pinaivu_box.engine.sandboxes import Sandboxes, SandboxRun
from pinaivu_box.engine.step_cost import ModelDraft, StepCostModel

BUDGET = 32
MAX_STEPS = 20_000


class Fixed(StepCostModel):
    """Depends on nothing: all that fits of prompts, drafts of one length, and drafts of a model of
    the length `by_model` for all."""

    def __init__(self, draft: int = 0, by_model: int = 0) -> None:
        super().__init__()
        self.draft = draft
        self.by_model = by_model

    def prompt_budget(self, rows: int, max_tokens: int) -> int:
        return max_tokens

    def draft_length(self, rows: int, expected: float, rate: float, max_tokens: int) -> int:
        return min(self.draft, max_tokens)

    def knows(self, rows: int) -> bool:
        return True

    def model_draft(
        self,
        rows: int,
        expected: float,
        rates: Sequence[float],
        limits: Sequence[int],
        draft: StepCostModel,
    ) -> ModelDraft:
        return ModelDraft(len(rates) if self.by_model else 0, self.by_model, 1.0)


class Unlimited(Allowance):
    """Whatever the time that drafts take."""

    def add(self, steps: float) -> None:
        return None


NO_DRAFTS = Fixed()


class Cell:
    """A cell of the KV cache; several sequences may share it."""

    def __init__(self, token: int) -> None:
        self.token = token


class KVCells:
    """The plainest model of a unified KV cache: a list of shared cells for each sequence id."""

    def __init__(self) -> None:
        self.of: dict[int, list[Cell]] = {}

    @property
    def used(self) -> int:
        return self.distinct(self.of)

    def distinct(self, ids: Iterable[int]) -> int:
        return len({id(cell) for one in ids for cell in self.of.get(one, [])})

    def tokens(self, sequence_id: int) -> list[int]:
        return [cell.token for cell in self.of.get(sequence_id, [])]

    def append(self, sequence_id: int, position: int, token: int) -> None:
        cells = self.of.setdefault(sequence_id, [])
        assert position == len(cells), "a gap, or a cell that was not freed"
        cells.append(Cell(token))

    def remove(self, sequence_id: int) -> None:
        self.of.pop(sequence_id, None)

    def truncate(self, sequence_id: int, length: int) -> None:
        assert 0 < length <= len(self.of[sequence_id])
        del self.of[sequence_id][length:]

    def copy(self, source: int, target: int, length: int) -> None:
        assert not self.of.get(target), "copied over a sequence that is there"
        assert 0 < length <= len(self.of[source])
        self.of[target] = self.of[source][:length]


class StrictRunner(FakeRunner):
    """A model whose next token depends on everything before it in its own cells.

    It keeps the cells as llama.cpp would and refuses a batch that no honest engine sends, so that
    a wrong position, a stale cell or a mixed-up sequence changes the output or raises.
    `cells` is how many tokens really fit (the engine may have been told more); `no_slot` may say
    that there is no room although there is.  `ids` and `sharing` go to the facts.
    """

    def __init__(
        self,
        given_load: LoadModel,
        *,
        cells: int | None = None,
        no_slot: Callable[[Batch], bool] = lambda batch: False,
        can_end: bool = False,
        ids: int = 0,
        sharing: bool = True,
    ) -> None:
        super().__init__(given_load)
        self.facts = replace(self.facts, sequence_ids=ids, sharing=sharing)
        self.kv = KVCells()
        self.calls = 0
        self.computed = 0
        self._ids = max(ids, given_load.max_sequences)
        self._most_cells = given_load.kv_tokens if cells is None else cells
        self._most_tokens = max(given_load.token_budget, given_load.max_sequences)
        self._no_slot = no_slot
        self._can_end = can_end

    @property
    def cells(self) -> dict[int, list[Cell]]:
        return self.kv.of

    @property
    def used(self) -> int:
        return self.kv.used

    def decode(self, batch: Batch) -> npt.NDArray[np.float32]:
        self.calls += 1
        if self.calls > MAX_STEPS:
            raise AssertionError("the engine does not come to an end")
        size = len(batch.tokens)
        assert 1 <= size <= self._most_tokens
        assert size == len(batch.positions) == len(batch.sequence_ids) == len(batch.outputs)
        if self.used + size > self._most_cells or self._no_slot(batch):
            raise NoSlot
        rows = []
        for token, position, sequence_id, output in zip(
            batch.tokens.tolist(),
            batch.positions.tolist(),
            batch.sequence_ids.tolist(),
            batch.outputs.tolist(),
            strict=True,
        ):
            assert 0 <= sequence_id < self._ids
            assert position < self.facts.context, "beyond the model's context"
            self.kv.append(sequence_id, position, token)
            if output:
                rows.append(self.logits(self.kv.tokens(sequence_id)))
        self.computed += size
        return np.array(rows, np.float32).reshape(len(rows), self.facts.n_vocab)

    def logits(self, cells: list[int]) -> npt.NDArray[np.float32]:
        """Of the token after `cells`."""
        state = zlib.crc32(np.array(cells, np.int32).tobytes())
        logits = np.random.default_rng(state).normal(0, 2, N_VOCAB).astype(np.float32)
        logits[128:END] = -50  # ASCII only
        logits[END] = logits[END] if self._can_end else -50
        return logits

    def remove(self, sequence_id: int) -> None:
        self.kv.remove(sequence_id)

    def truncate(self, sequence_id: int, length: int) -> None:
        assert self.facts.sharing, "the state of a recurrent model cannot be cut"
        self.kv.truncate(sequence_id, length)

    def copy(self, source: int, target: int, length: int) -> None:
        assert self.facts.sharing, "the state of a recurrent model cannot be copied"
        self.kv.copy(source, target, length)

    def state(self, sequence_id: int, max_bytes: int) -> memoryview | None:
        return memoryview(array("i", self.kv.tokens(sequence_id)).tobytes())

    def restore(self, sequence_id: int, state: bytearray) -> bool:
        tokens = array("i", bytes(state))
        if self.used + len(tokens) > self._most_cells:
            return False
        for position, token in enumerate(tokens):
            self.kv.append(sequence_id, position, token)
        return True


class EndingRunner(StrictRunner):
    """Says any ASCII, and may end at any time."""

    def __init__(self, given_load: LoadModel, **more: Any) -> None:
        super().__init__(given_load, **{"can_end": True, **more})


class TemplatedRunner(FakeRunner):
    """A fake model with that chat template."""

    def __init__(self, source: str | None) -> None:
        super().__init__(load())
        self.facts = replace(self.facts, chat_template=source)


def load(path: str = "fake:0", **more: Any) -> LoadModel:
    sizes = {"context": 200, "kv_tokens": 2000, "max_sequences": 16, "token_budget": BUDGET}
    return LoadModel(path=path, offset=0, threads=0, **{**sizes, **more})


def sampling(temperature: float = 0.8, seed: int = 1, **more: Any) -> Sampling:
    cuts = {"top_p": 0.95, "top_k": 40, "min_p": 0.05, **more}
    return Sampling(temperature=temperature, seed=seed, **cuts)


def add(
    name: str = "r", text: str = "hello", max_tokens: int | None = 12, seed: int = 1, **more: Any
) -> Add:
    return Add(
        id=name,
        messages=[*more.pop("before", []), {"role": "user", "content": text}],
        sampling=more.pop("sampling", sampling(seed=seed)),
        max_tokens=max_tokens,
        stop=more.pop("stop", []),
        tenant=more.pop("tenant", "t"),
        scope=more.pop("scope", "s"),
        **more,
    )


def here(job: Callable[[bytes], bytes]) -> SandboxRun:
    """A sandbox's job, run in this process and without limits."""
    return lambda payload, _: job(payload)


IMAGES = here(image_decoding.make(b""))


def in_this_process() -> Sandboxes:
    return Sandboxes(
        here(chat_template.make(b"")),
        lambda setup: here(grammar_validation.validator(setup)),
        IMAGES,
    )


class Template(SandboxedTemplate):
    """A chat template that is run here; functions may also be a list."""

    def __init__(
        self,
        source: str | None = CHATML,
        *,
        bos: str = "",
        eos: str = "",
        model: str = "",
        controls: Sequence[str] = (),
    ) -> None:
        facts = FakeRunner(load()).facts
        facts = replace(
            facts, chat_template=source, bos=bos, eos=eos, controls=tuple(controls), context=1000
        )
        super().__init__(here(chat_template.make(b"")), facts, load(model=model))

    def render(self, messages: Any, functions: Any = None, variables: Any = None) -> str:
        return "".join(self.parts(messages, functions, variables))

    def parts(
        self, messages: Any, functions: Any = None, variables: Any = None, _: Any = None
    ) -> list[str]:
        told = json.dumps(functions) if isinstance(functions, list) and functions else None
        told = functions if isinstance(functions, str) else told
        return super().parts(messages, told, variables or {})


class Engine:
    """Preparation, engine and output as the worker joins them, without its threads.

    `policy` None leaves the pace that the engine learns.  `draft` is the runner of a draft model.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        token_budget: int,
        policy: Fixed | None = NO_DRAFTS,
        shift: bool = False,
        sandboxes: Sandboxes | None = None,
        parse_special: bool = False,
        store: PrefixStore | None = None,
        draft: Runner | None = None,
    ) -> None:
        drafting = policy is None or policy.draft > 0
        self._encoded: queue.SimpleQueue[ImageEncoded] = queue.SimpleQueue()
        self._preparer = RequestPreparer(
            runner,
            sandboxes or in_this_process(),
            load(drafting=drafting, context_shift=shift, parse_special=parse_special),
        )
        images = ImageEncoder(self._preparer.images, self._encoded.put)
        self._engine = engines.Engine(
            runner, token_budget=token_budget, images=images, draft=draft, store=store
        )
        self.save_prefixes = self._engine.save_prefixes
        self._output = OutputBuffer()
        self._unsaid = False
        self.images = self._preparer.images
        self.scheduler = self._engine.scheduler
        if policy is not None:
            step_cost: Any = self._engine.step_cost
            step_cost.prompt_budget = policy.prompt_budget
            step_cost.draft_length = policy.draft_length
            step_cost.model_draft = policy.model_draft
            step_cost.knows = policy.knows
            drafting_ = self.scheduler.drafting
            drafting_.for_drafts = drafting_.for_reading = Unlimited()

    @property
    def busy(self) -> bool:
        return bool(self._engine.busy or self._unsaid or self.scheduler)

    @property
    def computable(self) -> bool:
        """Whether a step need not wait for an image."""
        return self._engine.busy or self._unsaid

    def receive(self, message: Add | Embed | Cancel | Named) -> None:
        if isinstance(message, Named):
            self._preparer.set_named_prefixes(message.texts)
            return
        if isinstance(message, Cancel):
            self._engine.end(message.id, "cancelled")
            return
        prepared = self._preparer.prepare(message)
        self._output.take(prepared)
        self._unsaid = True
        if isinstance(prepared, PreparedRequest):
            if prepared.compile is not None and (refused := prepared.compile()):
                self._output.take(refused)
                return
            self._engine.add(prepared.sequence)

    def step(self) -> StepFrame:
        """As the worker does: it sleeps if there is nothing to compute before an image is seen."""
        while not self._encoded.empty() or (not self._engine.busy and self.scheduler):
            self._engine.encoded(self._encoded.get())
        output = self._engine.step()
        self._engine.check_integrity()
        for stopped in self._output.take(output):
            self._engine.end(stopped, "stop")
        self._unsaid = False
        return self._output.frame()


class Heard:
    """What an engine said, by request."""

    def __init__(self) -> None:
        self.text: dict[str, str] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        self.prompts: dict[str, list[int]] = {}
        self.refused: dict[str, messages.Refused] = {}
        self.queue_ms: dict[str, list[float]] = {}
        self.cached: dict[str, list[int]] = {}
        self.shifted: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[messages.TokenLogprob]] = {}
        self.numbers: dict[str, bytes] = {}
        self.replayed: dict[str, list[messages.ReplayedToken]] = {}
        self.load = messages.EngineLoad()

    def take(self, frame: StepFrame) -> None:
        for name, prompt in frame.prompts.items():
            assert name not in self.prompts
            self.prompts[name] = prompt.tokens
        for refused in frame.refused:
            self.refused[refused.id] = refused
        for name, output in frame.outputs.items():
            assert name in self.prompts, "output before its admission"
            assert name not in self.ends, "output after the end"
            self.text[name] = self.text.get(name, "") + output.text
            self.tokens.setdefault(name, []).extend(output.tokens)
            self.shifted.setdefault(name, []).append(output.shifted_tokens)
            self.logprobs.setdefault(name, []).extend(output.logprobs)
            if output.queue_ms is not None:
                self.queue_ms.setdefault(name, []).append(output.queue_ms)
            if output.cached_tokens is not None:
                self.cached.setdefault(name, []).append(output.cached_tokens)
            if output.finish_reason:
                self.ends[name] = output.finish_reason
        assert frame.numbers.keys() <= self.ends.keys()
        self.numbers |= frame.numbers
        for name, replayed in frame.replayed.items():
            self.replayed.setdefault(name, []).extend(replayed)
        self.load = frame.load

    def answer(self, name: str) -> tuple[str, list[int], str]:
        return self.text[name], self.tokens[name], self.ends[name]


def run(engine: Engine, received: Iterable[Add | Embed | Cancel]) -> Heard:
    """All at once, to the end."""
    for one in received:
        engine.receive(one)
    return finish(engine, Heard())


def finish(engine: Engine, heard: Heard) -> Heard:
    """Steps until nothing is left to do."""
    for _ in range(MAX_STEPS):
        if not engine.busy:
            return heard
        heard.take(engine.step())
    raise AssertionError("the engine does not come to an end")


def make(
    kind: type[StrictRunner] = StrictRunner,
    *,
    draft: int = 0,
    shift: bool = False,
    store: PrefixStore | None = None,
    **more: Any,
) -> tuple[Engine, StrictRunner]:
    """An engine over a strict runner; sizes go to Load, the rest to the runner."""
    ours = ("cells", "no_slot", "can_end", "ids", "sharing")
    options = {name: more.pop(name) for name in ours if name in more}
    given_load = load(**more)
    runner = kind(given_load, **options)
    budget = given_load.token_budget
    made = Engine(runner, token_budget=budget, policy=Fixed(draft), shift=shift, store=store)
    return made, runner


def alone(adds: Sequence[Add], **more: Any) -> dict[str, tuple[str, list[int], str]]:
    """Each on an engine of its own with room for everything."""
    return {one.id: run(make(**more)[0], [one]).answer(one.id) for one in adds}


def assorted(count: int, least: int = 5) -> list[Add]:
    """Requests of many lengths, seeds and temperatures, some with stop strings."""
    return [
        add(
            f"r{n}",
            "x" * (7 * n % 90) + str(n),
            max_tokens=least + n % 20,
            sampling=sampling(temperature=[0, 0.7, 1.0, 2.0][n % 4], seed=n * 31 - 5),
            stop=["e", "Qz"] if n % 3 == 0 else [],
        )
        for n in range(count)
    ]


def engine_prompt(text: str) -> list[int]:
    """The prompt that `add(text=text)` becomes."""
    return run(make(context=1000)[0], [add("r", text, max_tokens=1)]).prompts["r"]


def assert_only_kept(engine: Engine, runner: StrictRunner) -> None:
    """Nothing runs, and what is in the cells is what the books say."""
    assert engine.scheduler.kv_used == 0 and not engine.busy
    assert runner.used == engine.scheduler.prefixes.cells
    for sequence_id in list(runner.cells):
        assert not runner.cells[sequence_id] or sequence_id in engine.scheduler.prefixes
