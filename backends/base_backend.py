"""The backend contract: where a checked run is carried out."""

from abc import ABC, abstractmethod
from typing import Any


class Backend(ABC):
    """Carries out runs somewhere. A new place is one subclass and one YAML in configs/backend."""

    elsewhere = False  # True: on a machine with other files and memory, where what hangs on them is checked
    queues = False  # True: runs wait in a queue; a teacher is trained there, and sweeps go by submit_all

    @abstractmethod
    def submit(self, overrides: list[str], config: dict[str, Any]) -> float | None:
        """Carry out the run that `overrides` (as typed) name; `config` is what they compose to, resolved and checked.

        Returns the run's best monitored value where it is known on return, for sweepers that minimise it.
        """

    @abstractmethod
    def describe(self, overrides: list[str], config: dict[str, Any]) -> dict[str, str]:
        """Return what `submit` would do with the same arguments, and where: lines by their names, such as "where" and
        "command".

        UserError for all that `submit` would refuse at once. Starts, writes and sends nothing.
        """

    def check(self, overrides: list[str], config: dict[str, Any]) -> None:
        """Raise UserError for what describe refuses of the run's settings alone, wherever it is asked."""

    def lacking(self) -> str | None:
        """Return why no run can be submitted from this machine, in a sentence; None where one can."""
        return None

    def submit_all(self, configs: list[dict[str, Any]], name: str) -> None:
        """Submit the jobs of a sweep at once, under one name; called where `queues`."""

    def hand_in(self, configs: list[dict[str, Any]], name: str) -> str:
        """Submit runs without a word; returns the number of their job. Called where `queues`."""
        raise NotImplementedError

    def script(self, configs: list[dict[str, Any]], name: str) -> str:
        """Return the text that would be submitted for these runs; empty where there is none. UserError as in describe."""
        return ""
