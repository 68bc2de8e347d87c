"""Dry runs: ranks of a job run whole steps with the code that trains, on meta tensors and with nobody else there.

`rank.run` runs one rank and says what it holds, computes and sends; `matching` whether all ranks' messages pair up.
"""

from parallel.dry_run.rank import Exchange, RankRun, RankSection, enough_micro_batches, run

__all__ = ["Exchange", "RankRun", "RankSection", "enough_micro_batches", "run"]
