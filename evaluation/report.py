"""What an evaluation shows: a table of scores with their noise floors, and a picture of the samples beside real data."""

import math
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloaders.tensor_dataset import TensorDataset
from evaluation.classifier_evaluator import ClassifierEvaluation
from evaluation.evaluator import Evaluation, GeneratorEvaluation
from evaluation.metrics.base_metric import Absent, Decode, Score, as_images
from evaluation.metrics.distances import nearest, squared_distances
from losses.weightings import UniformWeighting

MANY = 16  # numbers in a state, whose loss is also told for each
SHOWN_EXTRA = (
    "oracle/flow_map_error_median", "oracle/flow_map_error_exact_field", "oracle/log_prob_error_exact_field",
    "oracle/log_prob_error_probes",
)  # fmt: skip


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2g}"


def score_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Return (name, value +- standard error, noise floor) of each score."""
    loss = number(evaluation.values["eval/loss"]) + per_dimension(evaluation)
    return [("eval/loss", loss, ""), *rows_of(evaluation.scores)]


def per_dimension(evaluation: Evaluation) -> str:
    """Return the held-out loss over the numbers in a state, in brackets, where they are many and it is a plain sum over
    them.
    """
    if not isinstance(evaluation, GeneratorEvaluation):
        return ""
    generation = evaluation.generation
    numbers = math.prod(generation.dataset.state_shape)
    plain = isinstance(generation.objective.weighting, UniformWeighting)
    return f" ({evaluation.values['eval/loss'] / numbers:.3g} a dimension)" if plain and numbers >= MANY else ""


def rows_of(scores: list[Score]) -> list[tuple[str, str, str]]:
    """Return (name, value +- standard error, noise floor and what the training set scores) of each score."""
    rows = []
    for score in scores:
        value = number(score.value) + (f" +- {number(score.spread)}" if score.spread is not None else "")
        floor = "" if score.floor is None else number(score.floor)
        floor += "" if score.floor_sd is None else f" +- {number(score.floor_sd)}"
        if score.floor_q99 is not None:
            floor += f", {'above' if score.above_floor else 'within'} {number(score.floor_q99)}"
        floor += f" ({score.floor_note})" if floor and score.floor_note else ""
        own = (score.extra or {}).get(f"{score.name}_train")
        floor += "" if own is None else f"{', ' if floor else ''}training set {number(own)}"
        floor = f"none, {score.floor_note}; {floor}".rstrip("; ") if score.floor is None and score.floor_note else floor
        rows.append((score.name, value, floor))
        rows += [(name, number(v), "") for name, v in (score.extra or {}).items() if name in SHOWN_EXTRA]
    return rows


def absent_line(absent: list[Absent]) -> str:
    """Return the scores that are not given, each reason once, in brackets: oracles and few-step scores as what they are."""
    by_reason: dict[str, list[str]] = {}
    for item in absent:
        few = "few-step scores" if re.search(r"_\d+nfe$", item.name) else item.name
        by_reason.setdefault(item.reason, []).append("oracles" if item.name.startswith("oracle/") else few)
    return "; ".join(f"{', '.join(dict.fromkeys(names))} ({reason})" for reason, names in by_reason.items())


def short_names(names: list[str]) -> list[str]:
    """Few-step names that differ in their evaluations alone as one: x_{1,2,4}nfe."""
    steps: dict[str, list[str]] = {}
    for name in names:
        stem, _, count = name.removesuffix("nfe").rpartition("_")
        few = name.endswith("nfe") and count.isdigit()
        steps.setdefault(stem if few else name, []).extend([count] if few else [])
    return [
        f"{stem}_{{{','.join(counts)}}}nfe" if len(counts) > 1 else "_".join([stem, *(f"{n}nfe" for n in counts)])
        for stem, counts in steps.items()
    ]


def provenance_lines(scores: list[Score]) -> list[str]:
    """Return one line for each provenance, naming the scores that have it."""
    by_provenance: dict[str, list[str]] = {}
    for score in scores:
        if score.provenance:
            by_provenance.setdefault(score.provenance, []).append(score.name)
    return [f"{', '.join(short_names(names))}: by {provenance}" for provenance, names in by_provenance.items()]


def print_scores(evaluation: Evaluation, nfe: int) -> None:
    """The table of scores with their noise floors, and why some are absent."""
    print(evaluation.heading(nfe))
    print_table(evaluation.scores, evaluation.absent, score_rows(evaluation))
    if isinstance(evaluation, ClassifierEvaluation):
        shares = zip(evaluation.names, evaluation.class_accuracy.tolist(), strict=True)
        print_wrapped("accuracy by class", [f"{name} {share:.1%}" for name, share in shares])


def print_table(scores: list[Score], absent: list[Absent], rows: list[tuple[str, str, str]] | None = None) -> None:
    """The rows (those of the scores unless given), what the scores depend on, and why some are absent."""
    rows = rows_of(scores) if rows is None else rows
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, value, floor in rows:
        print(f"  {name:<{width}}  {value:<22}" + (f"floor {floor}" if floor else ""))
    for line in provenance_lines(scores):
        print(wrapped(line))
    if absent:
        print(wrapped(f"not given: {absent_line(absent)}"))


def wrapped(line: str) -> str:
    """In lines that fit a terminal."""
    return textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def print_wrapped(name: str, words: list[str]) -> None:
    """The words after their name, in lines that fit a terminal."""
    text = textwrap.fill(", ".join(words), 100, initial_indent=f"  {name}: ", subsequent_indent=" " * (len(name) + 4))
    print(text)


def class_table(evaluation: ClassifierEvaluation) -> str:
    """Return a Markdown table: of each class its held-out images, its accuracy, and what it is most often taken for."""
    lines = ["| class | images | accuracy | most often taken for |", "|---|---|---|---|"]
    names = [re.sub(r"([|<&`])", r"\\\1", name) for name in evaluation.names]
    wrong = evaluation.confusion - evaluation.confusion.diag().diag()
    for k, (row, share) in enumerate(zip(wrong, evaluation.class_accuracy.tolist(), strict=True)):
        mistaken = f"{names[int(row.argmax())]} ({int(row.max())} times)" if row.any() else ""
        lines.append(f"| {names[k]} | {int(evaluation.confusion[k].sum())} | {share:.1%} | {mistaken} |")
    return "\n".join(lines)


def draw_picture(path: Path, evaluation: Evaluation, title: str, images: int = 100) -> bool:
    """Return samples beside real data as a PNG: a scatter plot, or an image grid of about so many `images`, by class where
    there are classes. A classifier's confusion matrix, beside it as a table in a .csv. False for data of any other form.
    """
    from evaluation.pictures import confusion_picture, pick_by_class, scatter_picture

    if isinstance(evaluation, ClassifierEvaluation):
        path.parent.mkdir(parents=True, exist_ok=True)
        confusion = evaluation.confusion.numpy()
        confusion_picture(path, confusion, title, evaluation.names)
        np.savetxt(path.with_suffix(".csv"), confusion, fmt="%d", delimiter=",", header="rows: class, columns: taken for")
        return True
    assert isinstance(evaluation, GeneratorEvaluation)
    generation = evaluation.generation
    shape, samples, label = generation.dataset.state_shape, generation.samples, generation.label
    path.parent.mkdir(parents=True, exist_ok=True)
    if shape == (2,):
        reference = evaluation.reference.cpu().numpy()
        scatter_picture(path, samples[:2000].cpu().numpy(), reference, title, score_line(evaluation))
        return True
    if not drawable(shape, generation.decode):
        return False
    shown = slice(images) if label is None else torch.from_numpy(pick_by_class(label.cpu().numpy(), images))
    draw_images(
        path, samples[shown], None if label is None else label[shown], evaluation.reference, evaluation.reference_label,
        generation.decode, generation.dataset.value_range, title,
    )  # fmt: skip
    return True


def draw_neighbours(path: Path, evaluation: Evaluation, name: str, rows: int = 10, k: int = 5) -> bool:
    """Is it copying? The `rows` samples that lie nearest to a training image, nearest first, each with the k training images
    nearest to it, by Euclidean distance of states. False unless it is the last evaluation, of finite data that are images.
    """
    if not isinstance(evaluation, GeneratorEvaluation):
        return False
    generation = evaluation.generation
    dataset, decode = generation.dataset, generation.decode
    samples = generation.samples[:2000]
    samples = samples[samples.flatten(1).isfinite().all(1)]
    if not generation.final or not isinstance(dataset, TensorDataset) or not len(samples):
        return False
    if not drawable(dataset.state_shape, decode) or dataset.train_size < k:
        return False
    from evaluation.pictures import neighbours_picture

    train = dataset.train_states
    order = nearest(samples.flatten(1), train.flatten(1))[0].argsort()[:rows]
    index = squared_distances(samples[order].flatten(1), train.flatten(1)).topk(k, largest=False).indices
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbours_picture(
        path, as_images(samples[order], decode).cpu().numpy(), as_images(train[index].flatten(0, 1), decode).cpu().numpy(),
        (-1.0, 1.0) if decode is not None or dataset.value_range is None else dataset.value_range,
        f"{name}: the samples nearest to training images",
    )  # fmt: skip
    return True


def drawable(state_shape: tuple[int, ...], decode: Decode | None) -> bool:
    """Whether states of this shape are images, or become images."""
    return len(state_shape) == 3 and (decode is not None or state_shape[0] in (1, 3))


def draw_images(
    path: Path,
    samples: Tensor,
    label: Tensor | None,
    reference: Tensor | None,
    reference_label: Tensor | None,
    decode: Decode | None,
    value_range: tuple[float, float] | None,
    title: str,
) -> None:
    """All samples (N, ...) in a grid, each row of one class where there are labels, beside as many real states of the same
    classes. Latents are decoded first; decoded images and data of unknown range are taken to lie in [-1, 1]."""
    from evaluation.pictures import image_grid_picture, matching

    labels = None if label is None or (reference is not None and reference_label is None) else label.cpu().numpy()
    reference_labels = None
    if reference is not None:
        beside = np.arange(min(len(samples), len(reference)))
        if labels is not None and reference_label is not None:
            beside = matching(labels, reference_label.cpu().numpy())
            reference_labels = reference_label.cpu().numpy()[beside]
        reference = as_images(reference[torch.from_numpy(beside)], decode)
    image_grid_picture(
        path, as_images(samples, decode).cpu().numpy(),
        (-1.0, 1.0) if decode is not None or value_range is None else value_range, max(1, round(len(samples) ** 0.5)),
        None if reference is None else reference.cpu().numpy(), title, labels, reference_labels,
    )  # fmt: skip


def score_line(evaluation: Evaluation) -> str:
    """Return the first score with its floor, in words."""
    if not evaluation.scores:
        return ""
    score = evaluation.scores[0]
    floor = "" if score.floor is None else f", noise floor {number(score.floor)} ± {number(score.floor_sd or 0)}"
    return f"{score.name.partition('/')[2].replace('_', ' ')} {number(score.value)}{floor}"
