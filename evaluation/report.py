"""What an evaluation shows: a table of scores with their noise floors, and a picture of the samples beside real data."""

import math
import re
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from dataloaders.base_dataloaders import Batch
from dataloaders.tensor_dataset import TensorDataset
from evaluation.classifier_evaluator import ClassifierEvaluation, by_class
from evaluation.evaluator import SQUARED_ERROR, Evaluation, GeneratorEvaluation, held_out_beside
from evaluation.metrics.base_metric import Absent, Decode, Generation, Score, as_images, number
from evaluation.metrics.distances import nearest, squared_distances
from evaluation.pictures import (
    Panel,
    confusion_picture,
    image_grid_picture,
    matching,
    neighbours_picture,
    pick_by_class,
    scatter_picture,
)
from losses.weightings import UniformWeighting
from models.inputs import classes_in
from run_files.result import markdown

OF_FINITE_DATA = ("oracle/empirical", "oracle/copying")  # oracles that want no known density
Span = tuple[float, float] | None
MANY = 16  # numbers in a state, whose loss is also given for each
SHOWN_EXTRA = (
    "oracle/flow_map_error_median", "oracle/flow_map_error_exact_field", "oracle/log_prob_error_exact_field",
    "oracle/log_prob_error_probes",
)  # fmt: skip


def score_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Return (name, value ± standard error, noise floor) of each score."""
    loss = number(evaluation.values["eval/loss"]) + per_dimension(evaluation)
    error = [(SQUARED_ERROR, number(evaluation.values[SQUARED_ERROR]), "")] if SQUARED_ERROR in evaluation.values else []
    return [("eval/loss", loss, ""), *error, *rows_of(evaluation.scores)]


def per_dimension(evaluation: Evaluation) -> str:
    """Return in brackets the held-out loss over the numbers in a state, where it is a plain sum over many of them."""
    if not isinstance(evaluation, GeneratorEvaluation):
        return ""
    generation = evaluation.generation
    numbers = math.prod(generation.dataset.state_shape)
    plain = isinstance(generation.objective.weighting, UniformWeighting)
    return f" ({evaluation.values['eval/loss'] / numbers:.3g} a dimension)" if plain and numbers >= MANY else ""


def with_error(value: float, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error)}"


def rows_of(scores: list[Score]) -> list[tuple[str, str, str]]:
    """Return (name, value ± standard error, noise floor and what the training set scores) of each score."""
    rows = []
    for score in scores:
        rows.append((score.name, with_error(score.value, score.spread), floor_words(score)))
        rows += [(name, number(v), "") for name, v in (score.extra or {}).items() if name in SHOWN_EXTRA]
    return rows


def floor_words(score: Score) -> str:
    """Return the noise floor, whether the value lies beyond its end, and what the training set scores."""
    own = (score.extra or {}).get(f"{score.name}_train")
    trained = [] if own is None else [f"training set {number(own)}"]
    if score.floor is None:
        return "; ".join([f"none, {score.floor_note}"] * bool(score.floor_note) + trained)
    floor = ", ".join([with_error(score.floor, score.floor_sd), *[score.floor_end] * bool(score.floor_end)])
    return ", ".join([floor + (f" ({score.floor_note})" if score.floor_note else ""), *trained])


def absent_line(absent: list[Absent]) -> str:
    """Return the scores that are not given, each reason once, in brackets: oracles and few-step scores as what they are."""
    by_reason = defaultdict(list)
    for item in absent:
        oracle = item.name.startswith("oracle/") and not item.name.startswith(OF_FINITE_DATA)
        few = re.search(r"_\d+nfe$", item.name)
        by_reason[item.reason].append("few-step scores" if few else "oracles" if oracle else item.name)
    return "; ".join(f"{', '.join(dict.fromkeys(names))} ({reason})" for reason, names in by_reason.items())


def short_names(names: list[str]) -> list[str]:
    """Return few-step names that differ in their evaluations alone as one: x_{1,2,4}nfe."""
    steps: dict[str, list[str]] = {}
    for name in names:
        few = re.fullmatch(r"(.+)_(\d+)nfe", name)
        steps.setdefault(few[1] if few else name, []).extend([few[2]] if few else [])
    return [
        f"{stem}_{{{','.join(counts)}}}nfe" if len(counts) > 1 else "_".join([stem, *(f"{n}nfe" for n in counts)])
        for stem, counts in steps.items()
    ]


def provenance_lines(scores: list[Score]) -> list[str]:
    """Return one line for each provenance, naming the scores that have it."""
    by_provenance = defaultdict(list)
    for score in scores:
        by_provenance[score.provenance].append(score.name)
    return [f"{', '.join(short_names(names))}: by {words}" for words, names in by_provenance.items() if words]


def print_scores(evaluation: Evaluation, nfe: int) -> None:
    """Print the table of scores with their noise floors, and why some are absent."""
    print(evaluation.heading(nfe))
    print_table(evaluation.scores, evaluation.absent, score_rows(evaluation))
    if isinstance(evaluation, ClassifierEvaluation):
        shares = zip(evaluation.names, evaluation.class_accuracy.tolist(), strict=True)
        print(wrapped("accuracy by class: " + ", ".join(f"{name} {share:.1%}" for name, share in shares)))


def print_table(scores: list[Score], absent: list[Absent], rows: list[tuple[str, str, str]] | None = None) -> None:
    """Print the rows (those of the scores unless given), what the scores depend on, and why some are absent."""
    rows = rows_of(scores) if rows is None else rows
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, value, floor in rows:
        print(f"  {name:<{width}}  {value:<22}" + (f"floor {floor}" if floor else ""))
    verdicts = [f"{score.name}: {score.verdict}" for score in scores if score.verdict] + verdict_lines(scores)
    for line in verdicts + provenance_lines(scores) + [f"not given: {absent_line(absent)}"] * bool(absent):
        print(wrapped(line))


def verdict_lines(scores: list[Score]) -> list[str]:
    """Return one line that says by which scores the samples differ from real data, and by which no difference is seen."""
    judged = [score for score in scores if score.beyond_floor is not None]
    near = [score for score in judged if not score.beyond_floor]
    far = ", ".join(f"{score.name} ({distance_words(score)})" for score in judged if score.beyond_floor)
    names, rare = short_names([score.name for score in near]), [f"{score.p:.2g}" for score in near if score.p is not None]
    parts = [f"the samples differ from real data by {far}"] * bool(far)
    seen = f"no difference {'' if far else 'from real data '}is seen by {', '.join(names)}"
    parts += [seen + f" (p = {', '.join(rare)})" * bool(rare)] * bool(near)
    return ["; ".join(parts)] * bool(parts)


def distance_words(score: Score) -> str:
    """Return how far a score lies beyond its floor, and how likely that is of real data where it is known."""
    distance = score.beyond_floor or 0.0
    sds = f"{distance:.0f} sd " if math.isfinite(distance) else ""
    return f"{sds}beyond its floor" + ("" if score.p is None else f", p = {score.p:.2g}")


def wrapped(line: str) -> str:
    """Return the line as lines that fit a terminal."""
    return textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def class_table(evaluation: ClassifierEvaluation) -> str:
    """Return a Markdown table: of each class its held-out images, accuracy, precision, F1, and what it is taken for most."""
    lines = []
    found = by_class(evaluation.confusion)
    names = [re.sub(r"([|<&`])", r"\\\1", name) for name in evaluation.names]
    wrong = evaluation.confusion - evaluation.confusion.diag().diag()
    for k, (row, share) in enumerate(zip(wrong, evaluation.class_accuracy.tolist(), strict=True)):
        mistaken = f"{names[int(row.argmax())]} ({int(row.max())} times)" if row.any() else ""
        shares = (share, found["precision"][k], found["f1"][k])
        lines.append([names[k], f"{int(evaluation.confusion[k].sum())}", *(f"{one:.1%}" for one in shares), mistaken])
    return markdown(("class", "images", "accuracy", "precision", "F1", "most often taken for"), lines)


def draw_picture(path: Path, evaluation: Evaluation, title: str, images: int = 100) -> bool:
    """Draw samples beside real data: a scatter plot, or a grid of about so many `images`, by class where there are classes.

    A classifier's confusion matrix, beside it as a table in a .csv. False for data of any other form.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(evaluation, ClassifierEvaluation):
        confusion = evaluation.confusion.numpy()
        confusion_picture(path, confusion, title, evaluation.names)
        np.savetxt(path.with_suffix(".csv"), confusion, fmt="%d", delimiter=",", header="rows: class, columns: taken for")
        return True
    assert isinstance(evaluation, GeneratorEvaluation)
    made, real = evaluation.generation, (evaluation.reference, evaluation.reference_label)
    samples, label, shape = made.samples, made.classes, made.dataset.state_shape
    real = real[0], classes_in(real[1], made.dataset.num_classes)
    if shape == (2,):
        scatter_picture(path, samples[:2000].cpu().numpy(), real[0].cpu().numpy(), title, score_line(evaluation))
    elif drawable(shape, made.decode):
        if is_drawn_from_pictures(made):
            draw_pairs(path, made, title, images)
            return True
        shown = slice(images) if label is None else torch.from_numpy(pick_by_class(label.cpu().numpy(), images))
        some = samples[shown], None if label is None else label[shown]
        draw_images(path, some, real, made.decode, made.dataset.value_range, title)
    return shape == (2,) or drawable(shape, made.decode)


def is_drawn_from_pictures(made: Generation) -> bool:
    """Return whether the samples have conditions that are pictures of their own size."""
    condition = made.objective.network.condition_shape
    sized = condition is not None and len(condition) == 3 and condition[1:] == made.dataset.state_shape[1:]
    return sized and made.decode is None and drawable(condition or (), None)


def draw_pairs(path: Path, made: Generation, title: str, images: int) -> None:
    """Draw conditions, what was generated of each, and the held-out image that it belongs to, in grids side by side."""
    assert made.label is not None and made.objective.network.condition_shape is not None
    real = held_out_beside(made)[0][:images]
    conditions = made.label[: len(real), 2:].unflatten(1, made.objective.network.condition_shape)
    named = {"given": conditions, "generated": made.samples[: len(real)], "real": real}
    panels: dict[str, Panel] = {name: (shown.cpu().numpy(), None) for name, shown in named.items()}
    image_grid_picture(path, panels, shown_range(None, made.dataset.value_range), max(1, round(len(real) ** 0.5)), title)


def draw_neighbours(path: Path, evaluation: Evaluation, name: str, rows: int = 10, k: int = 5) -> bool:
    """Draw the `rows` samples that lie nearest to a training image, nearest first, each with the k training images nearest
    to it, by Euclidean distance of states: copies show. False unless it is the last evaluation, of finite data of images.
    """
    if not isinstance(evaluation, GeneratorEvaluation) or not evaluation.generation.final:
        return False
    dataset, decode = evaluation.generation.dataset, evaluation.generation.decode
    samples = evaluation.generation.samples[:2000]
    samples = samples[samples.flatten(1).isfinite().all(1)]
    if not isinstance(dataset, TensorDataset) or not drawable(dataset.state_shape, decode):
        return False
    if not len(samples) or dataset.train_size < k:
        return False
    train = dataset.train_states
    order = nearest(samples.flatten(1), train.flatten(1))[0].argsort()[:rows]
    index = squared_distances(samples[order].flatten(1), train.flatten(1)).topk(k, largest=False).indices
    path.parent.mkdir(parents=True, exist_ok=True)
    shown, beside = (as_images(states, decode).cpu().numpy() for states in (samples[order], train[index].flatten(0, 1)))
    title = f"{name}: the samples nearest to training images"
    neighbours_picture(path, shown, beside, shown_range(decode, dataset.value_range), title)
    return True


def drawable(state_shape: tuple[int, ...], decode: Decode | None) -> bool:
    """Return whether states of this shape are images, or become images."""
    return len(state_shape) == 3 and (decode is not None or state_shape[0] in (1, 3))


def shown_range(decode: Decode | None, low_high: Span) -> tuple[float, float]:
    """Return black and full brightness: [-1, 1] for decoded images and data of unknown range."""
    return (-1.0, 1.0) if decode is not None or low_high is None else low_high


def draw_images(path: Path, made: Batch, real: Batch | None, decode: Decode | None, low_high: Span, title: str) -> None:
    """Draw all samples in a grid, each row of one class where there are labels, beside as many real states of the same
    classes. Latents are decoded first; low_high: the data's value_range."""
    samples, label = made
    labels = None if label is None or (real is not None and real[1] is None) else label.cpu().numpy()
    panels = {"generated": (as_images(samples, decode).cpu().numpy(), labels)}
    if real is not None:
        beside, real_labels = np.arange(min(len(samples), len(real[0]))), None
        if labels is not None and real[1] is not None:
            beside = matching(labels, real[1].cpu().numpy())
            real_labels = real[1].cpu().numpy()[beside]
        panels["real"] = as_images(real[0][torch.from_numpy(beside)], decode).cpu().numpy(), real_labels
    image_grid_picture(path, panels, shown_range(decode, low_high), max(1, round(len(samples) ** 0.5)), title)


def score_line(evaluation: Evaluation) -> str:
    """Return the first score with its floor, in words."""
    if not evaluation.scores:
        return ""
    score = evaluation.scores[0]
    floor = "" if score.floor is None else f", noise floor {with_error(score.floor, score.floor_sd or 0)}"
    return f"{score.name.partition('/')[2].replace('_', ' ')} {number(score.value)}{floor}"
