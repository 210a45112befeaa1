"""What is known of a search's trials: the values of the next one, and what each came to; every change is in the journal."""

from dataclasses import dataclass
from typing import Any

import optuna
from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from searches.journal import Journal
from searches.plan import Plan
from searches.samplers import generation_size, sampler_for
from searches.space import Value

PRUNERS = {"none": NopPruner, "median": MedianPruner, "halving": SuccessiveHalvingPruner}


@dataclass
class Study:
    """The study of a search. optuna: the library's own, whose storage is the journal."""

    plan: Plan
    journal: Journal
    optuna: optuna.Study

    @property
    def storage(self) -> Any:
        return self.optuna._storage

    def trials(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def may_ask(self) -> bool:
        """Return whether a further trial may begin: one is left, and CMA-ES has the values of the generations before."""
        trials = self.trials()
        number = len(trials)
        if self.plan.sampler == "cmaes":
            size = generation_size(self.plan.space)
            return number < self.plan.count and all(t.state.is_finished() for t in trials[: number // size * size])
        return number < self.plan.count

    def ask(self) -> tuple[int, dict[str, Value]]:
        """Return number and values of a new trial, which the journal knows of from here on."""
        plan, trials = self.plan, self.trials()
        self.optuna.sampler = sampler_for(plan.sampler, plan.space, plan.seed, len(trials), trials, plan.higher)
        with self.journal.together():
            asked = self.optuna.ask({varied.key: varied.distribution for varied in plan.space})
        return asked.number, asked.params

    def prunes(self, number: int, step: int, value: float) -> bool:
        """Take note of a trial's score at a step, once; return whether the pruner finds it worse than others were there."""
        known = self.trials()[number]
        if step in known.intermediate_values:
            return False
        self.storage.set_trial_intermediate_value(known._trial_id, step, value)
        if not self.optuna.pruner.prune(self.optuna, self.storage.get_trial(known._trial_id)):
            return False
        self.optuna.tell(number, state=TrialState.PRUNED)
        return True

    def tell(self, number: int, value: float) -> bool:
        """Give the score of a finished trial to the sampler; return whether it is the best so far."""
        self.optuna.tell(number, value)
        return self.optuna.best_trial.number == number

    def give_up(self, number: int, why: str) -> None:
        """Take note that a trial has failed."""
        with self.journal.together():
            self.storage.set_trial_user_attr(self.trials()[number]._trial_id, "why", why)
            self.optuna.tell(number, state=TrialState.FAIL)


def study_in(journal: Journal, plan: Plan) -> Study:
    """Return the study of a journal, begun there where it is empty."""
    storage, pruner = optuna.storages.JournalStorage(journal), PRUNERS[plan.pruner]()
    if journal.rows:
        return Study(plan, journal, optuna.load_study(study_name=plan.name, storage=storage, pruner=pruner))
    with journal.together():
        direction = StudyDirection.MAXIMIZE if plan.higher else StudyDirection.MINIMIZE
        study = optuna.create_study(storage=storage, study_name=plan.name, direction=direction, pruner=pruner)
        study.set_user_attr("search", plan.settings())
    return Study(plan, journal, study)
