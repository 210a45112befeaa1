"""Scripts whose work the processes of torchrun share."""

import os
from collections.abc import Callable

from common.command_line import front, place_sentence
from common.errors import UserError, printable
from launcher import RANK_VARIABLES


def front_of_ranks(words: list[str], doc: str | None, carry_out: Callable[[list[str]], object]) -> int:
    """Carry out a command line as `front` does; where torchrun has started several processes, this one's part in it."""
    if not os.environ.keys() >= RANK_VARIABLES:
        return front(words, doc, carry_out)
    from backends.workers import run_distributed

    def own_part() -> None:
        try:
            outcome = carry_out(words)
        except OSError as error:
            raise UserError(place_sentence(error)) from error
        if isinstance(outcome, str):
            print(printable(outcome))

    run_distributed(own_part)
