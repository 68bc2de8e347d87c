"""A model of ours as lm-eval asks it: the tokens of a text are those that lm-eval's `HFLM` has of the exported model.

Which tokens stand before a text, where an answer begins and what a long text loses is as there; so are the numbers.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from model.generate import Sampling
from model.problems import BadInput
from parallel.scoring import Request
from train.data.tokenizer import bos_id, load_tokenizer
from train.evaluate.tasks import Scorer, Speech

_TOKENS_AT_A_TIME = 8192
"""Tokens of the texts that are completed together, their completions included: so much has room in the caches."""
_STRETCH = 16
"""Tokens that are made before texts that have come to their end are put aside; then twice as many, and so on."""
_TOKENS = 256
"""Tokens of a completion where a task does not say how many, as of `HFLM`."""
_OTHERWISE = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Settings of `transformers` that a task may give the values here, at which they change nothing."""
_IGNORED = ("use_cache", "pad_token_id", "eos_token_id", "early_stopping", "length_penalty")
"""Settings that change no text, or none without beams."""


@dataclass(frozen=True)
class Generation:
    """How lm-eval wants texts completed.

    Attributes:
        num_tokens: to make at most.
        stops: the texts that end a completion, and are not part of it.
        sampling: how tokens are drawn.
    """

    num_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def of(cls, settings: Mapping[str, Any], context: int, end: str) -> "Generation":
        """Read the `generation_kwargs` of a task.

        Args:
            settings: of the task.
            context: the most tokens of a text of the model.
            end: the text of the token that ends one.

        Raises:
            BadInput: what is asked for cannot be done here, or leaves no room in the context; by setting.
        """
        rest = dict(normalize_gen_kwargs(dict(settings), _TOKENS))
        num_tokens, stops = rest.pop("max_gen_toks"), handle_stop_sequences(rest.pop("until"), eos=end)
        sampled, temperature = rest.pop("do_sample"), rest.pop("temperature", 0.0)
        top_k, top_p = rest.pop("top_k", None), rest.pop("top_p", None)
        drawn = Sampling(temperature, top_k or None, 1.0 if top_p is None else top_p)
        sampling = drawn if sampled else Sampling(temperature=0)
        problems = [text.replace("--", "generation_kwargs: ") for text in sampling.problems()]
        if not 1 <= num_tokens < context:
            problems.append(
                f"generation_kwargs: max_gen_toks={num_tokens}: the model's context of {context} tokens holds what is "
                f"asked as well; from 1 to {context - 1} would work"
            )
        for name, value in rest.items():
            if name not in _IGNORED and (name not in _OTHERWISE or value != _OTHERWISE[name]):
                works = f"{name}={_OTHERWISE[name]}" if name in _OTHERWISE else f"a task without {name}"
                problems.append(f"generation_kwargs: {name}={value}: no completion is made so here; {works} would work")
        if problems:
            raise BadInput(problems)
        return cls(num_tokens, tuple(stop for stop in stops if stop), sampling)


class HarnessModel(TemplateLM):
    """A model that lm-eval asks: log-likelihoods of answers and of whole texts, and completions.

    Attributes:
        scorer: asks the model; whoever evaluates gives it.
        cut: how many texts have lost their beginning, since they are longer than the context.

    Args:
        speech: how text is said to the model.
    """

    scorer: Scorer

    def __init__(self, speech: Speech):
        super().__init__()
        self.cut = 0
        self._end, self.max_length = speech.end, speech.max_seq_len
        self._tokenizer: Tokenizer = load_tokenizer(speech.path)
        self._tokenizer.encode_special_tokens = False  # `transformers` takes their names for them
        begins = bos_id(self._tokenizer, speech.path)
        self._prefix = speech.end if begins is None else begins
        self._prefix_text = self._text([self._prefix], special=True)
        self._begins_text = None if begins is None else self._prefix_text
        self.end_text = self._text([speech.end], special=True)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text of which all is scored."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text; names of special tokens in it become these tokens.

        Args:
            string: the text.
            add_special_tokens: whether the tokenizer puts around it what it puts around texts; None for yes, unless
                the text begins with the name of the token that begins one.
            kwargs: of other models.
        """
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._prefix_text)
        return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Compute the log-likelihoods of answers behind their questions, in nats, and whether each is the likeliest."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score tokens behind others; what is too long for the context loses its beginning.

        Raises:
            BadInput: an answer has no token of its own, or is itself longer than the context.
        """
        asked = []
        for text, context, answer in requests:
            if not 1 <= len(answer) <= self.max_length:
                raise BadInput([
                    f"{''.join(text or [])[-60:]!r}: its answer has {len(answer)} tokens behind what is asked, and the "
                    f"model scores from 1 to {self.max_length}, its context; a task without it would work"
                ])  # fmt: skip
            tokens = (context + answer)[-(self.max_length + 1) :]
            self.cut += len(tokens) < len(context) + len(answer)
            asked.append(Request(tokens, len(tokens) - len(answer)))
        return [(score.log_likelihood, score.greedy) for score in self.scorer.score(asked)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Compute the log-likelihoods of whole texts, in nats, each token given as much before it as the context holds.

        A long text is cut into pieces of the context's length, of which the last reaches back over the one before.
        """
        owners, windows = [], []
        for owner, instance in enumerate(requests):
            ids = self.tok_encode(instance.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                owners.append(owner)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Complete texts until one of the texts comes that end a completion.

        Raises:
            BadInput: a task wants them made in a way that is not there.
        """
        alike = defaultdict(list)
        for index, instance in enumerate(requests):
            alike[json.dumps(instance.args[1], sort_keys=True, default=str)].append(index)
        made = [""] * len(requests)
        for indices in alike.values():
            generation = Generation.of(requests[indices[0]].args[1], self.max_length, self.end_text)
            room = self.max_length - generation.num_tokens
            prompts = {index: self._prompt(requests[index].args[0]) for index in indices}
            self.cut += sum(len(prompt) > room for prompt in prompts.values())
            order = sorted(indices, key=lambda index: -len(prompts[index]))
            while order:
                rows = max(_TOKENS_AT_A_TIME // (min(len(prompts[order[0]]), room) + generation.num_tokens), 1)
                together, order = order[:rows], order[rows:]
                texts = self._completed([prompts[index][-room:] for index in together], generation)
                for index, text in zip(together, texts, strict=True):
                    made[index] = text
        return made

    def _completed(self, prompts: Sequence[list[int]], generation: Generation) -> list[str]:
        """Complete prompts together; those that have come to their end are put aside between stretches."""
        rows: list[list[int]] = [[] for _ in prompts]
        going, made, stretch = [*range(len(prompts))], 0, _STRETCH
        while going and made < generation.num_tokens:
            stretch = min(stretch, generation.num_tokens - made)
            sampling = replace(generation.sampling, seed=generation.sampling.seed + made)
            found = self.scorer.complete([prompts[i] + rows[i] for i in going], stretch, [self._end], sampling)
            for i, new in zip(going, found, strict=True):
                rows[i] += new
            whole = [i for i, new in zip(going, found, strict=True) if len(new) == stretch]
            going = [i for i in whole if not any(stop in self._text(rows[i]) for stop in generation.stops)]
            made, stretch = made + stretch, 2 * stretch
        return [postprocess_generated_text(self._text(row), [*generation.stops], None) for row in rows]

    def _prompt(self, text: str) -> list[int]:
        """Encode a text to be completed: a token that is not named as the one that begins texts is put there again."""
        return self.tok_encode(text, not has_bos_prefix(text, self._begins_text)) or [self._prefix]

    def _text(self, ids: Sequence[int], special: bool = False) -> str:
        return str(self._tokenizer.decode([*ids], skip_special_tokens=not special))
