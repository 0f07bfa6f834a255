"""A request on its way in: template, tokens, limits.  Runs beside the steps, in its own thread."""

from __future__ import annotations

from dataclasses import dataclass

from pinaivu_box.engine.chat_template import ChatTemplate
from pinaivu_box.engine.detokenizer import Detokenizer
from pinaivu_box.engine.lookup import Lookup
from pinaivu_box.engine.messages import Add, Admitted, Refused
from pinaivu_box.engine.runner import Runner
from pinaivu_box.engine.sequence import Sequence
from pinaivu_box.errors import ApiError, ContextOverflow, InvalidBody


@dataclass(frozen=True)
class Arrival:
    """What the output has to know (`admitted`, `detokenizer`), and what is to be scheduled."""

    admitted: Admitted
    detokenizer: Detokenizer
    sequence: Sequence


class Intake:
    """Uses only what is safe beside `decode`: the runner's tokenizer and its facts."""

    def __init__(self, runner: Runner, *, drafting: bool, context_shift: bool) -> None:
        facts = runner.facts
        self._runner = runner
        self._context = facts.context
        self._n_vocab = facts.n_vocab
        self._context_shift = context_shift
        self._drafting = drafting and facts.sharing
        self._template = ChatTemplate(facts.chat_template, bos=facts.bos, eos=facts.eos)

    def prepare(self, add: Add) -> Arrival | Refused:
        try:
            return self._prepare(add)
        except ApiError as error:
            return Refused(add.id, error.code, error.message)

    def _prepare(self, add: Add) -> Arrival:
        prompt = self._runner.tokenize(self._template.render(add.messages))
        if len(prompt) >= self._context:
            raise ContextOverflow(
                f"The prompt has {len(prompt)} tokens (n_prompt_tokens) and the model's context "
                f"here is {self._context} (n_ctx): shorten the messages."
            )
        for name in add.sampling.logit_bias:
            if int(name) >= self._n_vocab:
                raise InvalidBody(f"logit_bias names token {name}, but there are {self._n_vocab}")
        detokenizer = Detokenizer(self._runner.piece, add.stop)
        for token in add.output:
            detokenizer.push(token)  # said by an earlier leg
        room = self._context - len(prompt)
        # Without a limit of its own a request never needs a context shift: it would never end.
        asked = add.max_tokens or room
        limit = asked if self._context_shift else min(asked, room)
        sequence = Sequence(
            id=add.id,
            tenant=add.tenant,
            tokens=list(prompt),
            prompt_length=len(prompt),
            max_length=len(prompt) + limit,
            context=self._context,
            sampling=add.sampling,
            weight=add.weight,
            priority=add.priority,
            lookup=Lookup() if self._drafting and limit <= room else None,
        )
        for token in add.output:  # it may have shifted, as it did in that leg
            sequence.tokens.append(token)
            if len(sequence.tokens) >= self._context:
                sequence.shift()
        return Arrival(Admitted(add.id, prompt), detokenizer, sequence)
