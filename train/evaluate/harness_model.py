"""A model of ours as lm-eval asks it: the tokens of a text are those that lm-eval's `HFLM` has of the exported model.

Which tokens stand before a text, where an answer begins and what a long text loses is as there; so are the numbers.
"""

import json
from array import array
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
_SAID = 3
"""Questions that cannot be asked, of which as many are named."""


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

    What has been read once is not tokenised again: an evaluation asks what the one before has asked.

    Attributes:
        scorer: asks the model; whoever evaluates gives it.

    Args:
        speech: how text is said to the model.
    """

    scorer: Scorer

    def __init__(self, speech: Speech):
        super().__init__()
        self._end, self.max_length = speech.end, speech.max_seq_len
        self._tokenizer: Tokenizer = load_tokenizer(speech.path)
        self._tokenizer.encode_special_tokens = False  # `transformers` takes their names for them
        begins = bos_id(self._tokenizer, speech.path)
        self._prefix = speech.end if begins is None else begins
        self._prefix_text = self._text([self._prefix], special=True)
        self._begins_text = None if begins is None else self._prefix_text
        self._end_text = self._text([speech.end], special=True)
        self._encoded: dict[str, list[int]] = {}
        self._answers: dict[tuple[str, str], tuple[Request, bool]] = {}
        self._texts: dict[str, list[Request]] = {}
        self._prompts: dict[str, list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text of which all is scored."""
        return self._prefix

    def read(self, instances: Sequence[Instance]) -> int:
        """Tokenise what will be asked, on all cores.

        Returns:
            How many of the instances lose their beginning, since they are longer than the context.

        Raises:
            BadInput: of some of them, what keeps them from being asked.
        """
        pairs = [instance.args for instance in instances if instance.request_type == "loglikelihood"]
        texts = [*{text: None for context, answer in pairs for text in (context.rstrip(), context + answer)}]
        self._encoded = {
            text: encoding.ids
            for text, encoding in zip(texts, self._tokenizer.encode_batch_fast(texts), strict=True)
            if not has_bos_prefix(text, self._prefix_text)
        }
        cut, problems = 0, dict[str, None]()
        for instance in instances:
            try:
                if instance.request_type == "loglikelihood":
                    cut += self._answer(*instance.args)[1]
                elif instance.request_type == "loglikelihood_rolling":
                    self._windows(*instance.args)
                else:
                    generation = self._generation(instance.args[1])
                    cut += len(self._prompt(instance.args[0])) > self.max_length - generation.num_tokens
            except BadInput as error:
                problems |= dict.fromkeys(error.problems)
        self._encoded = {}
        if more := [*problems][_SAID:]:
            raise BadInput([*[*problems][:_SAID], f"and {len(more):,} more like these"])
        if problems:
            raise BadInput([*problems])
        return cut

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text; names of special tokens in it become these tokens.

        Args:
            string: the text.
            add_special_tokens: whether the tokenizer puts around it what it puts around texts; None for yes, unless
                the text begins with the name of the token that begins one.
            kwargs: of other models.
        """
        if add_special_tokens is None:
            if string in self._encoded:
                return self._encoded[string]
            add_special_tokens = not has_bos_prefix(string, self._prefix_text)
        return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Compute the log-likelihoods of answers behind their questions, in nats, and whether each is the likeliest.

        What is too long for the context loses its beginning.

        Raises:
            BadInput: an answer has no token of its own, or is itself longer than the context.
        """
        scores = self.scorer.score([self._answer(*instance.args)[0] for instance in requests])
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Compute the log-likelihoods of whole texts, in nats, each token given as much before it as the context holds.

        A long text is cut into pieces of the context's length, of which the last reaches back over the one before.
        """
        windows = [self._windows(*instance.args) for instance in requests]
        scores = iter(self.scorer.score([window for of_one in windows for window in of_one]))
        return [sum(next(scores).log_likelihood for _ in of_one) for of_one in windows]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score tokens behind others, for whatever of lm-eval has tokenised a text by itself."""
        scores = self.scorer.score([self._behind(*one)[0] for one in requests])
        return [(score.log_likelihood, score.greedy) for score in scores]

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
            generation = self._generation(requests[indices[0]].args[1])
            room = self.max_length - generation.num_tokens
            prompts = {index: self._prompt(requests[index].args[0])[-room:] for index in indices}
            order = sorted(indices, key=lambda index: -len(prompts[index]))
            while order:
                rows = max(_TOKENS_AT_A_TIME // (len(prompts[order[0]]) + generation.num_tokens), 1)
                together, order = order[:rows], order[rows:]
                texts = self._completed([prompts[index] for index in together], generation)
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

    def _answer(self, context: str, answer: str) -> tuple[Request, bool]:
        """Tokenise an answer as `TemplateLM.loglikelihood` does; return as well whether the beginning is lost."""
        if (context, answer) not in self._answers:
            if context:
                behind, ids = self._encode_pair(context, answer)
            else:
                behind, ids = [self._prefix], self.tok_encode(answer, add_special_tokens=False)
                if ids[:1] == behind:
                    ids = ids[1:]
            self._answers[context, answer] = self._behind((context, answer), behind, ids)
        return self._answers[context, answer]

    def _windows(self, text: str) -> list[Request]:
        """Tokenise a whole text, and cut it."""
        if text not in self._texts:
            ids = self.tok_encode(text)
            pairs = get_rolling_token_windows(ids, self._prefix, self.max_length, context_len=1)
            self._texts[text] = [self._behind(("", text), *make_disjoint_window(pair))[0] for pair in pairs]
        return self._texts[text]

    def _behind(self, said: tuple[str, str], context: list[int], answer: list[int]) -> tuple[Request, bool]:
        if not 1 <= len(answer) <= self.max_length:
            raise BadInput([
                f"{''.join(said)[-60:]!r}: its answer has {len(answer)} tokens behind what is asked, and the model "
                f"scores from 1 to {self.max_length}, its context; a task without it would work"
            ])  # fmt: skip
        tokens = (context + answer)[-(self.max_length + 1) :]
        cut = len(tokens) < len(context) + len(answer)
        return Request(array("i", tokens), len(tokens) - len(answer)), cut

    def _generation(self, settings: Mapping[str, Any]) -> Generation:
        return Generation.of(settings, self.max_length, self._end_text)

    def _prompt(self, text: str) -> list[int]:
        """Encode a text to be completed: a token that is not named as the one that begins texts is put there again."""
        if text not in self._prompts:
            ids = self.tok_encode(text, not has_bos_prefix(text, self._begins_text))
            self._prompts[text] = ids or [self._prefix]
        return self._prompts[text]

    def _text(self, ids: Sequence[int], special: bool = False) -> str:
        return str(self._tokenizer.decode([*ids], skip_special_tokens=not special))
