"""Held-out sets besides the run's own corpus (`eval.sets`): checked, and prepared with the run's tokenizer."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from conf.schema import Config
from conf.train_settings import CorpusConfig, DataConfig, NamedCorpus, Packing, of_corpus
from model.problems import BadInput
from train.data import corpus
from train.data.packing import PackedSequences
from train.data.prepare import PreparedData, prepare_sources
from train.data.sources import PreparedSources
from train.evaluate.held_out import HeldOutSet

KEY = "eval.sets"


def problems(data: DataConfig, sets: Mapping[str, NamedCorpus], key: str = KEY) -> list[str]:
    """Find what is wrong with sets before any is read, in a sentence each.

    Args:
        data: the settings of the run's corpus, whose cache the sets share.
        sets: by name.
        key: the setting or argument that names them.
    """
    own = [f"data.{each.name}=" for each in fields(NamedCorpus)]
    return [
        _of_set(key, name, problem)
        for name, one in sets.items()
        for problem in corpus.check(of_corpus(data, one))
        if problem.startswith(tuple(own))
    ]


def prepare_sets(
    data: DataConfig,
    sets: Mapping[str, NamedCorpus],
    tokenizer: Path,
    vocab_size: int,
    seq_len: int,
    *,
    progress: bool = True,
    verify: bool = False,
    key: str = KEY,
) -> PreparedSources:
    """Tokenise sets, or find them tokenised: all of their documents, whatever the run holds out.

    Args:
        data: the settings of the run's corpus, whose cache and cores the sets share.
        sets: by name.
        tokenizer: the tokenizer.json of the model.
        vocab_size: rows of the model's embedding.
        seq_len: predictions per sequence.
        progress: show progress bars on stderr.
        verify: compare all of what is prepared with its checksums.
        key: the setting or argument that names them.

    Raises:
        BadInput: with all problems of all sets.
    """
    # What is held out of a corpus is its validation split; a set as a whole is the other one of a corpus without any.
    shared = replace(data, tokenizer=str(tokenizer), val_fraction=0.0, packing=Packing.concat, sources={}, stages=[])
    found: dict[str, PreparedData] = {}
    wrong: list[str] = []
    for name, one in sets.items():
        try:
            of = {name: of_corpus(shared, one)}
            found |= prepare_sources(of, vocab_size, 1, progress=progress, verify=verify)
        except BadInput as error:
            wrong += [_of_set(key, name, problem) for problem in error.problems]
            continue
        if (tokens := found[name].num_train_tokens) <= seq_len:
            wrong.append(
                f"{key}.{name}: has only {tokens:,} tokens, and one sequence takes {seq_len + 1:,}; a larger set, or a "
                "shorter train.seq_len, would work"
            )
    if wrong:
        raise BadInput(list(dict.fromkeys(wrong)))
    return PreparedSources(found)


def extra_sets(config: Config, sets: PreparedSources) -> list[HeldOutSet]:
    """Return the sets that are prepared, each cut as the run's own held-out documents are."""
    seq_len, mask = config.train.seq_len, bool(config.data.document_mask)
    found = []
    for name, data in sets.by_name.items():
        sequences = data.train(seq_len)
        assert isinstance(sequences, PackedSequences)
        found.append(HeldOutSet(name, sequences, min(len(sequences), config.train.val_sequences), data.eos_id, mask))
    return found


def _of_set(key: str, name: str, problem: str) -> str:
    """Say of which set a problem is that was found as one of a corpus."""
    own = "|".join(each.name for each in fields(CorpusConfig)) + "|source"
    return re.sub(rf"\bdata\.(?:sources\.{re.escape(name)}\.)?({own})=", rf"{key}.{name}.\1=", problem)
