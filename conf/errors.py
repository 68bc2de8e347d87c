"""What a user did that cannot work, said so that they can mend it."""

from collections.abc import Sequence


class BadInput(Exception):
    """Settings or data that cannot work; raised with every problem found, not only the first.

    Args:
        problems: one sentence each, of the form ``key=value: what is wrong; what would work``.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
