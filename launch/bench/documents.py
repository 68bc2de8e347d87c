"""The cost of document masks: tokens per second of a stage whose attention stops at borders, against one that does not.

Attention is measured by itself as well, with the kernels that compute what is seen and with a mask of all pairs.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table

from conf.schema import Config
from launch.bench.common import composed, device_name, random_stages, synchronised
from launch.tables import rendered
from model.batch import Batch
from model.config import ModelConfig
from model.context import Context
from model.documents import Documents, documents_of
from model.kernels import causal_attention, sdpa_masked, which_and_why
from parallel.build import forward_functions
from parallel.stages import Stage

ON_GPU = ["model=7b", "train.seq_len=4096"]
ON_CPU = ["model=8x512", "train.seq_len=2048", "model.vocab_size=8192"]
"""The overrides before the user's. On a CPU the sequence is half as long as on a GPU, and so are the documents."""
MEAN_SHARE = 500 / 4096
"""The mean length of a document, as a share of a sequence."""
BLOCKS = 2
"""The blocks of the stage, which has the embedding and the head as well."""

Run = Callable[[], None]


def measure(overrides: Sequence[str], rounds: int = 3) -> dict[str, Any]:
    """Run each way by turns, forward and backward; return medians over the rounds, before which one is not counted.

    Args:
        overrides: the overrides of the model and `train`.
        rounds: the number of rounds.

    Returns:
        ``documents``, their number, mean length and ``attended``, the share of a causal sequence's pairs that they
        have; ``rows``, each with ``what``, ``way``, ``seconds``, ``tokens_per_second`` and ``speedup`` over sequences
        without borders.

    Raises:
        BadInput: the settings cannot work.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    config = composed(ON_GPU if on_gpu else ON_CPU, overrides).config
    dtype = torch.bfloat16 if on_gpu else torch.float32
    train = config.train
    whole, packed = (random_batch(config.model, train.micro_batch, train.seq_len, mask) for mask in (False, True))
    tokens, documents = packed.tokens.numel(), packed.documents
    assert documents is not None
    subjects = {
        "attention": _attention(config.model, packed.to(device), device, dtype),
        f"a stage of {BLOCKS} blocks": _stage(config, {"whole": whole, "documents": packed}, device, dtype),
    }
    rows = []
    for what, ways in subjects.items():
        medians = _by_turns(ways, device, rounds)
        rows += [
            {
                "what": what,
                "way": way,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "speedup": medians["whole"] / seconds,
            }
            for way, seconds in medians.items()
        ]
    return {
        "device": device_name(device),
        "precision": str(dtype).removeprefix("torch."),
        "kernels": which_and_why(config.model, device, dtype, documents=True),
        "sequences": [train.micro_batch, train.seq_len],
        "documents": {
            "number": len(documents.lengths),
            "mean": tokens / len(documents.lengths),
            "attended": config.model.attention_flops(packed.lengths)[0]
            / config.model.attention_flops(whole.lengths)[0],
        },
        "rows": rows,
    }


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    documents, (sequences, seq_len) = found["documents"], found["sequences"]
    title = f"forward and backward of {sequences} x {seq_len} tokens in {documents['number']} documents of "
    title += f"{documents['mean']:.0f} on average, which see {documents['attended']:.1%} of the pairs; "
    title += f"{found['precision']} on {found['device']}; {found['kernels']}"
    table = Table("what", "way", "ms", "tokens/s", "times as fast", title=title, title_justify="left")
    for row in found["rows"]:
        ms, speed = f"{1000 * row['seconds']:.2f}", f"{row['tokens_per_second']:,.0f}"
        table.add_row(row["what"], row["way"], ms, speed, f"{row['speedup']:.2f}")
    return rendered(table)


def random_batch(model: ModelConfig, micro_batch: int, seq_len: int, document_mask: bool) -> Batch:
    """Return random tokens, the same each time, in documents of exponentially distributed lengths.

    Args:
        model: whose vocabulary the tokens are of.
        micro_batch: the number of sequences.
        seq_len: tokens of each.
        document_mask: whether the batch has documents.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(model.vocab_size, (2, micro_batch, seq_len), generator=generator)
    begins = torch.rand(tokens.shape, generator=generator) < 1 / (MEAN_SHARE * seq_len)
    return Batch(tokens, labels, documents_of(begins) if document_mask else None)


def _attention(model: ModelConfig, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    def leaf(heads: int) -> torch.Tensor:
        return torch.randn(*batch.tokens.shape, heads, model.d_head, device=device, dtype=dtype).requires_grad_()

    q, k, v = leaf(model.n_heads), leaf(model.n_kv_heads), leaf(model.n_kv_heads)

    def of(documents: Documents | None) -> Run:
        def run() -> None:
            out = causal_attention(q, k, v, model.attention, documents)
            torch.autograd.grad(out, [q, k, v], torch.ones_like(out))

        return run

    def masked() -> None:
        assert batch.documents is not None
        out = sdpa_masked(q, k, v, batch.documents)
        torch.autograd.grad(out, [q, k, v], torch.ones_like(out))

    return {"whole": of(None), "documents": of(batch.documents), "documents, a mask of all pairs": masked}


def _stage(config: Config, batches: dict[str, Batch], device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    stages = random_stages(config.model, [Stage(0, 0, BLOCKS + 1, 1.0)], device)
    for layer in stages.in_order():
        layer.module.to(dtype)
    functions, _ = forward_functions(stages, config.parallel.recompute, config.parallel.head_pieces)

    def of(batch: Batch) -> Run:
        batch = batch.to(device)

        def run() -> None:
            y = batch.tokens
            for function in functions[0]:
                y = function(y, Context(batch.documents))
            y.backward(torch.ones_like(y))

        return run

    return {way: of(batch) for way, batch in batches.items()}


def _by_turns(ways: dict[str, Run], device: torch.device, rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            begin = synchronised(device)
            run()
            if number:
                seconds[way].append(synchronised(device) - begin)
    return {way: statistics.median(times) for way, times in seconds.items()}
