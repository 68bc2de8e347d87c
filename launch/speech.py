"""How trained weights are spoken to: a tokenizer that knows what begins a text and what ends one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from model.problems import BadInput
from train.data.tokenizer import Encoder, eos_id, load_tokenizer
from train.pretrained import TOKENIZER, Source, ends_of


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of trained weights, as they are spoken to.

    Attributes:
        tokenizer: of Hugging Face's library.
        ends: the tokens that end a text.
        begins: the token that `encode` puts before a text; None where the tokenizer puts there what is to be there.
    """

    tokenizer: tokenizers.Tokenizer
    ends: frozenset[int]
    begins: int | None
    _encoder: Encoder

    def encode(self, text: str) -> list[int]:
        """Encode a text, behind what stood before a text in training; special tokens that it spells are text."""
        ids = self._encoder.encode(text, add_special_tokens=True)
        return ids if self.begins is None else [self.begins, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens to text; special tokens are left out."""
        return str(self.tokenizer.decode([*ids]))

    def continuation(self, prompt: Sequence[int], made: Sequence[int]) -> str:
        """Decode new tokens where they stand: some decoders take a space from whatever begins a text.

        Args:
            prompt: the tokens before them.
            made: the new tokens.
        """
        before, whole = self.decode(prompt), self.decode([*prompt, *made])
        return whole[len(before) :] if whole.startswith(before) else self.decode(made)


def tokenizer_of(source: Source, path: Path | None = None) -> Tokenizer:
    """Load the tokenizer of trained weights.

    A run of ours has trained on documents one after another, so that the end of another comes before a text, unless
    the tokenizer marks the beginning. What comes from elsewhere is spoken to as `transformers` does: before a text is
    what tokenizer.json puts there, be it nothing, whatever the files beside it say.

    Args:
        source: of the weights.
        path: of a tokenizer.json, or a folder with one, to take instead of the one beside the weights.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    path = path or source.tokenizer
    if path is None:
        raise BadInput([f"{source.path}: {TOKENIZER} is missing; beside the weights it would work"])
    loaded = load_tokenizer(path)
    encoder = Encoder(loaded, str(path))
    if source.described is not None:
        return Tokenizer(loaded, frozenset(ends_of(source)), None, encoder)
    eos = eos_id(loaded, path)
    return Tokenizer(loaded, frozenset({eos}), None if loaded.encode("").ids else eos, encoder)
