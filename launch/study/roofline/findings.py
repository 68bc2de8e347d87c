"""When grouping pays: the points of prefill and decoding under a roofline, what fits, and where models part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from launch.study.roofline.counts import Ceilings, Phase, Work, cache_bytes, pass_work, weight_bytes
from model.config import ModelConfig

MOST_CONTEXT = 2**24
"""Tokens beyond which no context is looked for."""
PARTED = 1.1
"""Two models have parted where a step of one takes so many times as long as one of the other."""


def first_context(holds: Callable[[int], bool]) -> int | None:
    """Return the fewest tokens of context at which something holds that holds from there on; None where it never does.

    Contexts are looked for up to `MOST_CONTEXT`.
    """
    low, high = 0, 1
    while not holds(high):
        low, high = high, 2 * high
        if high > MOST_CONTEXT:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def roofline_findings(
    model: ModelConfig,
    kv_heads: Sequence[int],
    batches: Sequence[int],
    contexts: Sequence[int],
    ceilings: Ceilings,
    tp: int = 1,
    bytes_per_value: int = 2,
) -> dict[str, Any]:
    """Return what prefill and decoding take at least with several numbers of key/value heads.

    Args:
        model: the shape; its own n_kv_heads does not matter.
        kv_heads: of the models that are compared, most first.
        batches, contexts: of the points that are counted.
        ceilings: of the device.
        tp: the ranks that share every matrix; all figures are of one of them.
        bytes_per_value: 2 for bf16, 4 for fp32.

    Returns:
        A dict for JSON: ``device`` with its ceilings; ``models``, a list in the order of `kv_heads`, each with
        ``attention``, ``kv_heads``, ``parameters``, ``weight_bytes``, ``kv_cache_bytes_per_token``, ``points`` (a list
        with phase, batch, context, fits (whether weights and caches do, None where the memory is not known), flops,
        bytes, intensity, seconds, tokens_per_second and ``parts``), ``fits`` (by context the largest batch whose caches
        fit beside the weights, and tokens_per_second of it) and ``crossings``.
        Of the crossings, ``cache_equals_weights`` is by batch the context from which a step reads more bytes of cache
        than of weights, ``parted`` the one from which a step takes `PARTED` times as long as with the fewest heads, and
        ``attention_equals_products`` that from which a prefill's attention multiplies more than its matrices; None
        where there is no such context up to `MOST_CONTEXT`.
    """
    models = [replace(model, n_kv_heads=n) for n in kv_heads]
    counted = _Counted(ceilings, tp, bytes_per_value)
    return {
        "shape": f"{model.n_layers} layers of {model.d_model}, {model.n_heads} query heads of {model.d_head}",
        "window": model.window,
        "window_pattern": model.window_pattern,
        "tp": tp,
        "dtype": "bfloat16" if bytes_per_value == 2 else "float32",
        "batches": list(batches),
        "contexts": list(contexts),
        "device": {
            "name": ceilings.name,
            "source": ceilings.source,
            "product_flops_per_second": ceilings.product_flops,
            "attention_flops_per_second": ceilings.attention_flops,
            "bytes_per_second": ceilings.bytes_per_second,
            "ridge": ceilings.ridge,
            "memory_bytes": ceilings.memory_bytes,
        },
        "models": [
            {
                "attention": one.attention_name,
                "kv_heads": one.n_kv_heads,
                "parameters": one.num_params,
                "weight_bytes": weight_bytes(one, tp, bytes_per_value),
                "kv_cache_bytes_per_token": cache_bytes(one, 1, tp, bytes_per_value),
                "points": [
                    counted.point(one, phase, batch, context)
                    for phase in Phase
                    for batch in batches
                    for context in contexts
                ],
                "fits": [counted.fit(one, context) for context in contexts],
                "crossings": counted.crossings(one, models[-1], batches),
            }
            for one in models
        ],
    }


@dataclass(frozen=True)
class _Counted:
    """Counts of models on one device: the fields are those of `roofline_findings`."""

    ceilings: Ceilings
    tp: int
    bytes_per_value: int

    def work(self, model: ModelConfig, phase: Phase, batch: int, context: int) -> dict[str, Work]:
        return pass_work(model, phase, batch, context, self.tp, self.bytes_per_value)

    def seconds(self, work: Mapping[str, Work]) -> float:
        return sum(self.ceilings.seconds(part, one) for part, one in work.items())

    def point(self, model: ModelConfig, phase: Phase, batch: int, context: int) -> dict[str, Any]:
        work = self.work(model, phase, batch, context)
        whole, seconds = sum(work.values(), Work()), self.seconds(work)
        tokens = batch * (context if phase is Phase.prefill else 1)
        room = self.ceilings.memory_bytes
        return {
            "phase": phase.value,
            "batch": batch,
            "context": context,
            "fits": None if room is None else self._fills(model, batch, context) <= room,
            "flops": whole.flops,
            "bytes": whole.num_bytes,
            "intensity": whole.intensity,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "parts": {
                part: {
                    "flops": one.flops,
                    "weight_bytes": one.weights,
                    "cache_bytes": one.cache,
                    "activation_bytes": one.activations,
                    "sent_bytes": one.sent,
                    "intensity": one.intensity,
                    "seconds": self.ceilings.seconds(part, one),
                    "bound": self.ceilings.bound(part, one),
                }
                for part, one in work.items()
                if one != Work()
            },
        }

    def _fills(self, model: ModelConfig, batch: int, context: int) -> int:
        of_weights = weight_bytes(model, self.tp, self.bytes_per_value)
        return of_weights + batch * cache_bytes(model, context, self.tp, self.bytes_per_value)

    def fit(self, model: ModelConfig, context: int) -> dict[str, Any]:
        """Return the largest batch whose caches fit beside the weights; activations are not counted."""
        if self.ceilings.memory_bytes is None:
            return {"context": context, "batch": None, "tokens_per_second": None}
        room = self.ceilings.memory_bytes - self._fills(model, 0, context)
        batch = max(int(room // cache_bytes(model, context, self.tp, self.bytes_per_value)), 0)
        seconds = self.seconds(self.work(model, Phase.decode, batch, context)) if batch else None
        return {"context": context, "batch": batch, "tokens_per_second": batch / seconds if seconds else None}

    def crossings(self, model: ModelConfig, fewest: ModelConfig, batches: Sequence[int]) -> dict[str, Any]:
        def reads(batch: int, context: int) -> bool:
            work = self.work(model, Phase.decode, batch, context)
            return sum(one.cache for one in work.values()) > sum(one.weights for one in work.values())

        def parted(batch: int, context: int) -> bool:
            own, least = (self.seconds(self.work(one, Phase.decode, batch, context)) for one in (model, fewest))
            return own >= PARTED * least

        def multiplies(context: int) -> bool:
            work = self.work(model, Phase.prefill, 1, context)
            return work["attention"].flops > work["products"].flops

        return {
            "cache_equals_weights": {str(n): first_context(partial(reads, n)) for n in batches},
            "parted": {str(n): first_context(partial(parted, n)) for n in batches},
            "attention_equals_products": first_context(multiplies),
        }
