"""The command `deepnarrow tokenizer`: how a tokenizer serves a corpus, beside others, and any text at all."""

import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.compose import compose_overrides, quoted
from conf.paths import expanded
from conf.train_settings import DataConfig, corpora
from conf.train_settings import Source as Kind
from launch.tokenizer_probes import kinds_of_tokens, probes, round_trip
from model.problems import BadInput
from train.data import corpus
from train.data.build import document_hash, sample_pieces
from train.data.tally import Tally
from train.data.token_bytes import bytes_of_tokens
from train.data.tokenizer import Encoder, load_tokenizer, size, tokenizer_file
from train.data.tokenizer_cache import PreparedTokenizer, prepare_tokenizer
from train.data.units import documents_of, units_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_AGAINST, _GPT2_NOW = "gpt2", "openai-community/gpt2"
_ANY_SIZE = 1 << 31
_BATCH = 256
_LONGEST = 10
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@dataclass(frozen=True)
class Sample:
    """Text of a source to measure on.

    Attributes:
        pieces: of documents, each with what stands before it in its document.
        unseen: whether the tokenizer was trained on none of it; None where that is not known.
    """

    pieces: list[tuple[str, str]]
    unseen: bool | None


def run(words: Sequence[str], against: Sequence[str], out: Path | None, as_json: bool, sample_mb: float) -> int:
    """Print the report of a tokenizer; return the exit code.

    Args:
        words: the overrides of a run, and at most one path: a tokenizer.json or a folder with one, which stands for
            ``data.tokenizer=PATH``. Without either the tokenizer is trained as `deepnarrow prepare` would train it.
        against: other tokenizers: paths or hub names.
        out: a file to write the report to, as JSON.
        as_json: print JSON.
        sample_mb: megabytes of text to measure on, of each source.

    Returns:
        0; 1 where a text does not come back as it was, or can spell a special token.

    Raises:
        BadInput: the corpus or a tokenizer cannot be read; it lists every problem.
    """
    if len(paths := [word for word in words if "=" not in word]) > 1:
        raise BadInput([f"{' '.join(paths)}: one tokenizer is reported on at a time; {paths[0]} --against {paths[1]} "
                        "would work"])  # fmt: skip
    overrides = [word if "=" in word else f"data.tokenizer={quoted(word)}" for word in words]
    composition = compose_overrides(overrides)
    config = composition.config
    sources = corpora(config.data)
    problems = list(composition.problems)
    for name, data in sources.items():
        found = corpus.check(data)
        if data.source is Kind.tokens:
            found = [
                "data.source=tokens: a tokenizer is measured on text; the text that the tokens were made of would work"
            ]
        problems += corpus.of_source(sources, name, found)
    if not sample_mb > 0:
        problems.append(f"--sample-mb={sample_mb}: nothing to measure on; 4 would work")
    others, missing = _others(against, problems)
    if problems:
        raise BadInput(problems)
    wanted = config.data.tokenizer_vocab_size
    # Whether it fits the model is for `prepare` to say; what it would be trained to follows from the same settings.
    vocab_size = _ANY_SIZE if config.data.tokenizer or wanted else config.model.vocab_size
    prepared = prepare_tokenizer(sources, vocab_size, progress=sys.stderr.isatty())
    samples = {name: _sample(data, prepared, name, int(sample_mb * 1e6)) for name, data in sources.items()}
    report = report_of(prepared, samples, others)
    report["tokenizer"]["wanted"] = wanted if config.data.tokenizer is None else None
    report["missing"] = missing
    print(json.dumps(report, indent=1, ensure_ascii=False) if as_json else as_text(report))
    if out is not None:  # last: what a disk does not take has been printed
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 1 if report["round_trip"]["failed"] or report["spelled"]["failed"] or report["corpus"]["failed"] else 0


def report_of(
    prepared: PreparedTokenizer, samples: Mapping[str, Sample], others: Mapping[str, "Tokenizer"]
) -> dict[str, Any]:
    """Measure a tokenizer.

    Args:
        prepared: the tokenizer.
        samples: text of each source.
        others: tokenizers to compare it with, by the names that they are given in the report.

    Returns:
        JSON-able: `tokenizer` (tokens, merges, special tokens, kinds and longest of tokens), `sources` (of each, and of
        each tokenizer on it, bytes and characters per token and tokens per word), what the probes found, and `corpus`,
        the round trip of the samples.
    """
    tokenizer = load_tokenizer(prepared.path)
    encoder = Encoder(tokenizer, prepared.said)
    special = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    seen = np.zeros(size(tokenizer), dtype=np.int64)
    sources = {}
    for name, sample in samples.items():
        ids = encoder.encode_batch(sample.pieces)
        for each in ids:
            seen += np.bincount(each, minlength=len(seen))
        texts = [text for _, text in sample.pieces]
        num_bytes = sum(len(text.encode("utf-8")) for text in texts)
        of = {"this": _rates(texts, num_bytes, sum(map(len, ids)))}
        of |= {other: _rates(texts, num_bytes, _num_tokens(theirs, texts)) for other, theirs in others.items()}
        sources[name] = {"bytes": num_bytes, "unseen": sample.unseen, "tokenizers": of}
    spelled_bytes = {token: raw for token, raw in bytes_of_tokens(tokenizer).items() if token not in special}
    readable = [text for raw in spelled_bytes.values() if (text := _decoded(raw)) is not None]
    longest = sorted((t for t in readable if any(map(str.isalpha, t))), key=lambda t: (-len(t.encode("utf-8")), t))
    ordinary = [number for number in spelled_bytes if number < len(seen)]
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "tokenizer": {
            "path": str(prepared.path),
            "tokens": size(tokenizer),
            "special": list(special.values()),
            "merges": len(model["merges"]) if "merges" in model else None,
            "unused": float(np.mean(seen[ordinary] == 0)) if ordinary else 0.0,
            "parts_of_characters": len(spelled_bytes) - len(readable),
            "mixed": kinds_of_tokens(readable),
            "longest": longest[:_LONGEST],
        },
        "sources": sources,
        "corpus": round_trip(tokenizer, encoder, [text for sample in samples.values() for _, text in sample.pieces]),
        **probes(tokenizer, encoder, special),
    }


def _rates(texts: Sequence[str], num_bytes: int, tokens: int) -> dict[str, float]:
    words = sum(len(text.split()) for text in texts)
    return {
        "tokens": tokens,
        "bytes_per_token": num_bytes / max(tokens, 1),
        "characters_per_token": sum(map(len, texts)) / max(tokens, 1),
        "tokens_per_word": tokens / max(words, 1),
    }


def _num_tokens(tokenizer: "Tokenizer", texts: Sequence[str]) -> int:
    batches = (texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH))
    return sum(len(e.ids) for batch in batches for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False))


def _sample(data: DataConfig, prepared: PreparedTokenizer, name: str, budget: int) -> Sample:
    """Take pieces of documents that the tokenizer was not trained on, from all over a corpus, where there are any."""
    sampled = prepared.sampled_of(data)
    if sampled is not None:
        pieces = list(_pieces(data, budget, sampled))
        if pieces:
            return Sample(pieces, True)
    pieces = list(_pieces(data, budget, 0))
    if not pieces:
        raise BadInput([f"{prepared.said}: source {name} has no text to measure on; a corpus with some would work"])
    return Sample(pieces, None if sampled is None else False)


def _pieces(data: DataConfig, budget: int, begin: int) -> Iterator[tuple[str, str]]:
    """Yield pieces, with what is before them, whose hash is `begin` or more; of the hub, what follows so many bytes."""
    units = units_of(data)
    random.Random(1).shuffle(units)
    left, passed = budget, 0
    for unit in units:
        share = max(left if data.source is Kind.hub else 4 * budget // len(units), 1 << 16)
        for text in documents_of(data, unit, Tally()):
            before = ""
            for piece in sample_pieces(text):
                length = len(piece.encode("utf-8"))
                passed += length
                wanted = passed > begin if data.source is Kind.hub else document_hash(piece, "sample") >= begin
                if wanted:
                    yield before, piece
                    left, share = left - length, share - length
                before = piece
                if left <= 0:
                    return
            if share <= 0:
                break


def _others(against: Sequence[str], problems: list[str]) -> tuple[dict[str, "Tokenizer"], dict[str, str]]:
    """Load the tokenizers to compare with; what was asked for and cannot be had is a problem, GPT-2's else is said."""
    found, missing = {}, {}
    if not against:
        from huggingface_hub import try_to_load_from_cache

        kept = [try_to_load_from_cache(name, "tokenizer.json") for name in (DEFAULT_AGAINST, _GPT2_NOW)]
        if files := [file for file in kept if isinstance(file, str)]:
            found[DEFAULT_AGAINST] = _load(files[0])
        else:
            missing[DEFAULT_AGAINST] = "not in the cache of Hugging Face; --against gpt2 fetches it, --against PATH " \
                                       "compares with another tokenizer"  # fmt: skip
    for given in against:
        try:
            found[given] = _load(given)
        except Exception as error:  # the library raises bare Exception, the hub a dozen kinds
            reason = "; ".join(error.problems) if isinstance(error, BadInput) else str(error).strip().split("\n")[0]
            problems.append(f"--against={given}: cannot be read ({reason[:200]}); a tokenizer.json, a folder with one "
                            "or with vocab.json and merges.txt, or a hub name, would work")  # fmt: skip
    return found, missing


def _load(given: str) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = expanded(given)
    for vocab, merges in _GPT2_FILES:
        if (path / vocab).is_file() and (path / merges).is_file():
            made = Tokenizer(models.BPE.from_file(str(path / vocab), str(path / merges)))
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
            return made
    if tokenizer_file(path).is_file():
        return load_tokenizer(path)
    if path.exists() or given.startswith(("/", "~", ".")) or given.count("/") > 1 or given.endswith(".json"):
        raise BadInput(["no tokenizer is there"])
    loaded = Tokenizer.from_pretrained(given)
    loaded.no_truncation()
    loaded.no_padding()
    loaded.encode_special_tokens = True
    return loaded


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def as_text(report: dict[str, Any]) -> str:
    """Set the report for people."""
    of = report["tokenizer"]
    merges = "" if of["merges"] is None else f", {of['merges']:,} merges"
    lines = [f"{of['path']}: {of['tokens']:,} tokens{merges}, {len(of['special'])} special tokens"]
    if of["wanted"] and of["wanted"] > of["tokens"]:
        lines.append(f"{of['wanted']:,} tokens were wanted: the sample has no more pairs that come twice; a larger "
                     "data.tokenizer_sample_mb, or a larger corpus, would give more")  # fmt: skip
    names = [name for name in next(iter(report["sources"].values()))["tokenizers"] if name != "this"]
    lines += ["", f"{'':16}{'MB':>8}{'bytes/token':>13}{'chars/token':>13}{'tokens/word':>13}"
              + "".join(f"{name[-24:]:>25}" for name in names)]  # fmt: skip
    seen = {True: "", False: "  (it was trained on this text)", None: ""}
    for name, source in report["sources"].items():
        rates = source["tokenizers"]
        ours = rates["this"]
        row = f"{name[:15]:16}{source['bytes'] / 1e6:>8.2f}{ours['bytes_per_token']:>13.3f}"
        row += f"{ours['characters_per_token']:>13.3f}{ours['tokens_per_word']:>13.3f}"
        for other in names:
            theirs = rates[other]
            share = ours["tokens"] / max(theirs["tokens"], 1)
            row += f"{theirs['bytes_per_token']:>12.3f} ({share:.0%} of its)"
        lines.append(row + seen[source["unseen"]])
    lines += [f"{name} is not compared with: {why}" for name, why in report["missing"].items()]
    parts = f"{of['parts_of_characters']:,} tokens are parts of characters"
    lines += ["", f"unused in these samples: {of['unused']:.1%} of the tokens; {parts}"]
    lines += ["tokens that mix: " + ", ".join(f"{kind} {count:,}" for kind, count in of["mixed"].items())]
    lines += ["longest with letters: " + ", ".join(map(repr, of["longest"]))]
    lines += ["tokens of numbers: " + ", ".join(f"{text!r} {n}" for text, n in report["digits"].items())]
    lines += ["tokens of white space: " + ", ".join(f"{text} {n}" for text, n in report["white_space"].items())]
    lines += ["bytes/token of CJK prose: " + ", ".join(f"{name} {rate:.2f}" for name, rate in report["cjk"].items())]
    for what, found in (("characters and random texts", report["round_trip"]), ("samples", report["corpus"])):
        tried = f"{found['texts']:,} texts of {found['characters']:,} characters"
        lines.append(f"round trip of {what}: {tried}, {found['failed']:,} came back otherwise")
        lines += [f"  {example}" for example in found["examples"]]
    wrong = report["spelled"]["failed"]
    stays = (
        f"can be spelled or do not come back: {', '.join(wrong)}" if wrong else "each stays text where text spells it"
    )
    return "\n".join([*lines, f"names of special tokens: {report['spelled']['names']}, {stays}"])
