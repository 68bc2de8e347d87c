"""The scaling laws that DeepSeek LLM was made by (arXiv 2401.02954, section 3), and what they give for a run."""

from dataclasses import dataclass

from conf.schema import Config
from launch.scaling.fits import PowerLaw
from train.length import length_of

LEARNING_RATE = PowerLaw(0.3118, -0.1250)
"""The best peak rate by compute, equation 1."""
BATCH_TOKENS = PowerLaw(0.2920, 0.3271)
"""The best batch by compute, in tokens, equation 1."""
M_OPT = PowerLaw(0.1715, 0.5243)
"""The best non-embedding FLOPs a token by compute, equation 4."""
D_OPT = PowerLaw(5.8316, 0.4757)
"""The tokens that go with it, equation 4."""
RATE_FITTED, ALLOCATION_FITTED = (1e17, 2e19), (1e17, 3e20)
"""FLOPs of the smallest and the largest runs that rate and batch, and model and data, were fitted on."""


@dataclass(frozen=True)
class Advice:
    """What the laws give for a run, beside what is set.

    Attributes:
        compute: C = M D of the run, in FLOPs.
        tokens: D that is set.
        m: M of the model.
        lr, lr_set: the peak rate.
        batch_tokens, batch_tokens_set: tokens of a step, the last one's where batches grow.
        m_opt, d_opt: the best M and D for this compute.
    """

    compute: float
    tokens: float
    m: int
    lr: float
    lr_set: float
    batch_tokens: float
    batch_tokens_set: int
    m_opt: float
    d_opt: float


def advice(config: Config) -> Advice:
    """Return what the laws give for a model and its tokens.

    Args:
        config: a sound configuration.
    """
    m, tokens = config.model.scaling_m(config.train.seq_len), float(config.train.total_tokens)
    compute, last = m * tokens, length_of(config).spans[-1].first
    return Advice(
        compute,
        tokens,
        m,
        LEARNING_RATE.at(compute),
        config.optimizer.lr,
        BATCH_TOKENS.at(compute),
        last.global_batch * last.seq_len,
        M_OPT.at(compute),
        D_OPT.at(compute),
    )


def as_text(found: Advice, seq_len: int) -> str:
    """Render advice as lines.

    Args:
        found: the advice.
        seq_len: tokens of a sequence of the last step, in which a batch is said as well.
    """
    fits = f"rate and batch fitted up to {RATE_FITTED[1]:.0e} FLOPs, M and tokens up to {ALLOCATION_FITTED[1]:.0e}"
    beyond = "" if RATE_FITTED[0] <= found.compute <= ALLOCATION_FITTED[1] else f"\n  ({fits}; extrapolated here)"
    return (
        f"by the scaling laws of arXiv 2401.02954, section 3, for C = M D = {found.compute:.3g} FLOPs{beyond}\n"
        f"  peak rate {found.lr:.2e} (set: {found.lr_set:.2e}); batch {found.batch_tokens:,.4g} tokens or "
        f"{found.batch_tokens / seq_len:,.0f} sequences (set: {found.batch_tokens_set:,.4g} or "
        f"{found.batch_tokens_set / seq_len:,.0f})\n"
        f"  best M {found.m_opt:.3g} (this model's: {found.m:.3g}); best tokens {found.d_opt:.3g} "
        f"(set: {found.tokens:.3g})"
    )
