"""The settings of `train/`: data, optimizer, schedule, length, checkpoints, tracking.

`model/config.py` and `parallel/layout.py` hold those of their floors; `conf/schema.py` composes them all.
"""

from dataclasses import dataclass, field, fields, replace
from enum import Enum


class Source(Enum):
    """The kind of corpus that documents are read from."""

    stdlib = "stdlib"
    """The source files of the running interpreter's standard library: text that every machine has. Its codec tables and
    generated help (`encodings`, `pydoc_data`) are left out."""
    files = "files"
    """Local text, JSONL (also .gz or .zst), Parquet or Arrow."""
    hub = "hub"
    """A dataset by its hub name."""
    tokens = "tokens"
    """Files of token ids: Megatron's .bin with .idx, datatrove's .ds, .npy, plain .bin."""


class Packing(Enum):
    """How documents are put into sequences."""

    concat = "concat"
    best_fit = "best_fit"


@dataclass
class CorpusConfig:
    """What tells one corpus from another: where its documents lie, and how they are found there."""

    path: str | None = None
    """files: a file, a folder (searched recursively) or a glob. .jsonl/.ndjson/.jsonlines/.json(.gz/.zst) hold a
    document per line, .parquet and .arrow one per row (a folder of datasets' save_to_disk is read as such); every
    other file is one document of plain text (.gz and .zst too). A URL is read where it lies (s3://, gs://, hf:// and
    all that fsspec has a package for).
    tokens: the same of .bin with .idx (or what stands before both endings), .ds, .npy and .bin; they are read in place,
    a URL by ranges of which this machine keeps what it has read under cache_dir. The end of each file is held out."""
    token_dtype: str | None = None
    """tokens: the type of the ids in .bin files without an .idx: uint16, uint32, int32, uint8 or int64."""
    name: str | None = None
    """hub: the dataset's name, such as HuggingFaceFW/fineweb-edu."""
    subset: str | None = None
    """hub: the dataset's configuration, where it has several."""
    split: str = "train"
    """hub: the split to read."""
    revision: str | None = None
    """hub: a commit or tag, for a corpus that cannot change under a run."""
    text_field: str = "text"
    """The field of a JSONL line, or the column of a Parquet file or hub dataset, that holds the text."""
    document_separator: str | None = None
    """Cut plain-text files into documents at this string, such as "\\n\\n"; null makes each file one document."""


@dataclass
class NamedCorpus(CorpusConfig):
    """A corpus among others that have names: one of `eval.sets`."""

    source: Source | None = None
    """stdlib, files, hub or tokens; null is files where `path` is given, and hub where `name` is."""


@dataclass
class SourceConfig(NamedCorpus):
    """A corpus of a mixture: one of `data.sources`."""

    weight: float = 1.0
    """The source's share of the tokens, in proportion to the weights of the others; 0 leaves it out."""
    max_epochs: float | None = None
    """A run that would repeat the source more often than this is refused before it starts; null sets no limit."""


@dataclass
class DataStage:
    """A stretch of a run with weights or a sequence length of its own: mid-training, annealing, a longer context."""

    until: float = 0.0
    """Tokens trained on, from the beginning of the run, at which the stage ends; may be written 1.6e12. The next stage
    begins with the first step before which so many are. The last stage's must reach train.total_tokens."""
    weights: dict[str, float] | None = None
    """Weights by source; a source that is not named has none in this stage. Null: the sources' own."""
    seq_len: int | None = None
    """Tokens per sequence in this stage; null is train.seq_len. A stage of another length than the one before cuts
    every source into sequences of that length and shuffles them anew, from a first epoch on: what was trained on in
    sequences of another length may come again, and a length that comes back goes on where it was."""


@dataclass
class DataConfig(CorpusConfig):
    """Corpus or mixture of corpora, tokenizer, and the split into training and held-out documents."""

    source: Source = Source.stdlib
    """stdlib, files, hub or tokens: the kind of the one corpus, where there are no `sources`."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """A mixture of several corpora by name, such as {web: {path: /web, weight: 0.7}, code: {path: /code, weight: 0.3}}.
    They share the tokenizer and all keys below; path, name and the like are then each source's. Which source and which
    of its sequences is the n-th sample is a function of n and train.seed alone, and no source is ever a sequence
    away from its share."""
    stages: list[DataStage] = field(default_factory=list)
    """Stages one after another, such as [{until: 1.6e12}, {until: 2e12, weights: {books: 1, code: 1}}]; none means
    that the whole run is one, with the sources' own weights and train.seq_len."""
    tokenizer: str | None = None
    """An existing tokenizer.json (or a folder with one), for tokens the one that made them; null trains a byte-level
    BPE on the corpus."""
    tokenizer_vocab_size: int | None = None
    """Size of the tokenizer trained here, special tokens included; null makes it min(model.vocab_size, 100015),
    DeepSeek LLM's 100,000 tokens and 15 special ones (arXiv 2401.02954, section 2.1)."""
    tokenizer_sample_mb: int = 256
    """The BPE is trained on at most this much text, taken evenly over the corpus by document."""
    val_fraction: float = 0.01
    """Share of the documents held out for validation, chosen by a hash of their text, so that exact duplicates
    never stand on both sides."""
    document_mask: bool | None = None
    """Whether attention and positions stop at the borders of documents (`train/data/documents.py`). Null is true for a
    new run; a run whose checkpoint says false, or is older than this key, goes on as it was trained. Llama 3 (arXiv
    2407.21783, section 3.2) and SmolLM3 train so, and arXiv 2402.13991 finds losses and downstream tasks better for it;
    DeepSeek-V3 (arXiv 2412.19437, section 4.1) does not, nor does Megatron-LM by default. Less is computed with it."""
    packing: Packing = Packing.concat
    """How training documents are put into sequences: concat or best_fit. concat lays them one after another and cuts
    the whole into sequences, without padding. best_fit cuts none that fits a sequence (`train/data/best_fit.py`); tests
    in arXiv 2404.10830 gain by it, most of all where answers hang on a context. It pads the room that is left, which
    counts as tokens trained on and is printed beside the share of documents that are cut. Held-out documents are
    concatenated in either case, so that validation losses compare."""
    max_bad: float = 0.05
    """The largest share of the records, or of the files' bytes, that may be unusable (not UTF-8, not JSON, without
    text, damaged); a corpus with more is refused, since it is not what its settings say."""
    workers: int | None = None
    """Processes that tokenise on this machine, each a core; null starts one for each core."""
    cache_dir: str = "~/.cache/deepnarrow"
    """Where prepared corpora are kept, each under a fingerprint of all that shaped it. The environment variable
    DEEPNARROW_CACHE moves it for every run."""


def corpora(data: DataConfig) -> dict[str, DataConfig]:
    """Return the settings of each corpus by its name, each with all that preparation asks of one corpus alone.

    Args:
        data: one corpus, which is then named by its kind (stdlib, files, hub or tokens), or a mixture.
    """
    if not data.sources:
        return {data.source.value: replace(data, stages=[])}
    return {name: of_corpus(data, of) for name, of in data.sources.items()}


def of_corpus(data: DataConfig, of: NamedCorpus) -> DataConfig:
    """Return the settings of a corpus that has a name, with those that it shares with the others."""
    source = of.source or (Source.hub if of.name is not None and of.path is None else Source.files)
    own = {each.name: getattr(of, each.name) for each in fields(CorpusConfig)}
    return replace(data, source=source, sources={}, stages=[], **own)


class Decay(Enum):
    """The learning-rate schedules."""

    multi_step = "multi_step"
    cosine = "cosine"
    wsd = "wsd"


@dataclass
class ScheduleConfig:
    """Learning rate against tokens seen, as a share of optimizer.lr."""

    decay: Decay = Decay.multi_step
    """multi_step (DeepSeek LLM), cosine, or wsd (warmup, stable, decay)."""
    warmup_steps: int = 2000
    """Steps of linear rise from zero."""
    step_at: list[float] = field(default_factory=lambda: [0.8, 0.9])
    """multi_step: shares of train.total_tokens at which the rate drops."""
    step_to: list[float] = field(default_factory=lambda: [0.316, 0.1])
    """multi_step: the share of the peak rate after each drop."""
    final: float = 0.1
    """cosine and wsd: the share of the peak rate at the end."""
    decay_share: float = 0.2
    """wsd: the last share of the tokens, over which the rate falls linearly."""


@dataclass
class OptimizerConfig:
    """AdamW; weight decay acts on matrices only (embedding included), never on norm weights."""

    lr: float = 4.2e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    clip: float | None = 1.0
    """Largest allowed norm of the gradient over the whole model, all stages together; null does not clip."""


class Precision(Enum):
    """The dtype that stages compute in; master weights, moments and accumulated gradients are fp32 in every case."""

    auto = "auto"
    """bf16 on a GPU, fp32 on the CPU."""
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class TrainConfig:
    """Length of a run, batch, evaluation, what is logged and traced."""

    seed: int = 1
    """Decides initial weights and sample order."""
    seq_len: int = 4096
    """Tokens per sequence, at most model.max_seq_len. A run that is resumed with another length shuffles its sources
    anew, in sequences of that length."""
    global_batch: int | str = 2304
    """Sequences per optimizer step, over all ranks. "0:768 250e9:1536" is a batch size ramp-up: 768 from the first
    token on, 1536 from the first step on that begins with 250e9 tokens trained on. Sequences are those of the stage:
    a stage of another length has batches of as many, which are more or fewer tokens."""
    micro_batch: int = 1
    """Sequences per forward pass of one rank. Accumulation follows: global_batch / (micro_batch x dp)."""
    total_tokens: float = 2e12
    """Length of the run, over which the schedule is spread, rounded up to whole steps; may be written 2e12."""
    skip_samples: int = 0
    """Sequences of the order to pass over: an uptraining goes on in the data where the original run stood."""
    max_steps: int | None = None
    """For trials: stop after so many steps, with the schedule of the full run."""
    max_skipped: int | None = 10
    """The run has diverged, and stops with exit code 3, after so many steps in a row whose updates were skipped, as
    not finite or as spikes; null sets no limit. Weights that are not finite stop it at once."""
    spike_sigmas: float | None = 6.0
    """The update of a step is skipped, on all ranks, where its loss or its gradient norm before clipping is more than
    so many standard deviations above the mean of the last 128 steps (`train/spikes.py`; 6 and 128 are what OLMo-core's
    skip-step optimizers have). Nothing is skipped for it in the first 64 steps, nor in those after a change of batch,
    length or mixture. Which samples the batch was is in skipped.jsonl. Batches of a few hundred tokens are so uneven
    that one in a hundred is a spike. Null skips only what is not finite."""
    skip_steps: list[str] = field(default_factory=list)
    """Steps to pass over, such as [812,830-840], both ends included: their batches are neither read nor trained on and
    their updates are not made, but they count, so that all other steps have the samples and the rate that they had.
    They have to come after the checkpoint that the run goes on from, which resume=PATH says."""
    skip_samples_at: list[str] = field(default_factory=list)
    """Places in the order of samples that are passed over, such as [6496-6503], both ends included; skipped.jsonl has
    those of a batch that was skipped. The samples behind them move up, so that no step is lost. They have to come after
    the checkpoint that the run goes on from, and stay in the settings from then on. The places are those behind
    train.skip_samples."""
    straggler_percent: float | None = 20.0
    """A rank whose passes take so many percent longer than the median of the ranks of its stage is named, with its
    host, in the log and in metrics.jsonl; where there is one replica, than the fastest that the rank has been before.
    A run of one process has none. Null measures nothing."""
    straggler_steps: int = 50
    """The steps whose median is compared, each time that so many have been taken."""
    precision: Precision = Precision.auto
    """auto, bf16 or fp32."""
    val_every: int = 1000
    """Steps between validations; there is always one at the end, and one before the first step of a run that begins
    with trained weights. 0: no others."""
    val_at: list[int] = field(default_factory=list)
    """Steps after which to validate as well."""
    timeline_at: list[int] = field(default_factory=lambda: [10])
    """Steps of which the timeline is kept and drawn, where there are pipeline stages."""
    profile: list[int] = field(default_factory=list)
    """Steps to trace operator by operator, for Perfetto; they take longer, and do not count in the run's speed."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Global ranks that trace them."""
    log_every: int | None = None
    """Steps from one line about training in the log to the next; null writes one a minute."""
    deterministic: bool = False
    """Bitwise reproducible on GPUs too, slower: PyTorch's deterministic algorithms. On a CPU runs always are."""
    val_sequences: int = 2048
    """At most so many held-out sequences, of train.seq_len tokens and always the same: those of a mixture have the
    shares of its sources' own weights, in every stage, and end where the first source has no more. The loss is that of
    all of them; of a mixture it is said by source as well, with perplexity and bits per byte."""


@dataclass
class CheckpointConfig:
    """When a checkpoint is saved, and which are kept. One is also saved when training ends or is told to stop."""

    enabled: bool = True
    """false saves nothing, for trials; what is there is still resumed from."""
    every_minutes: float | None = 5.0
    """Minutes from one save to the next; null does not go by time."""
    every_steps: int | None = None
    """Steps from one save to the next; null does not go by steps."""
    keep_last: int = 3
    """The newest so many are kept."""
    keep_every: int | None = None
    """Those of steps that this divides are kept for good; null keeps none beyond the newest."""


class Rate(Enum):
    """How the learning rate of an uptraining is set."""

    end = "end"
    """The rate that the original run ended with, held to the end."""
    again = "again"
    """The original schedule from warm-up to decay, spread over the uptraining."""


@dataclass
class UptrainConfig:
    """Uptraining: a short training on from `init_from`, with the recipe of the run that made those weights."""

    alpha: float | None = None
    """Tokens to train on, as a share of those that the weights were trained on (arXiv 2305.13245 settles on 0.05).
    Null: init_from gives the shape and the first weights, and the rest of the recipe is the command's."""
    rate: Rate = Rate.end
    """end or again. Either way the warm-up is as short as the run, alpha times the original's, since Adam's moments
    begin at zero."""


@dataclass
class SampleConfig:
    """Text drawn from the model: when training ends, and after steps that are asked for."""

    prompts: list[str] = field(default_factory=lambda: ["The", "In", "A"])
    """One sample each, from the start of a document; data=stdlib brings its own."""
    tokens: int = 64
    """Tokens to add to each prompt; 0 samples nothing."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    every_steps: int | None = None
    """Steps from one sample of each prompt to the next, kept in samples.jsonl; null samples at the end alone."""
    at: list[int] = field(default_factory=list)
    """Steps after which to sample as well."""


class WandbMode(Enum):
    """Where W&B logs a run."""

    auto = "auto"
    """online where an API key is set up, else offline."""
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode = WandbMode.auto
    """auto, online, offline or disabled."""
    project: str = "deepnarrow"
    """The W&B project."""
    entity: str | None = None
    """The W&B team or user; null is the account's default."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    finish_seconds: float = 120.0
    """Seconds that the end of a run waits for W&B to take, and online to upload, what it has been told. No step ever
    waits for W&B. What it does not take is said, and is in metrics.jsonl."""
