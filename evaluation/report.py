"""What an evaluation shows: a table of scores with their noise floors, and a picture of the samples beside real data."""

from pathlib import Path

from evaluation.evaluator import Evaluation
from evaluation.metrics.base_metric import Absent

SHOWN_EXTRA = ("oracle/flow_map_error_median", "oracle/flow_map_error_exact_field", "oracle/log_prob_error_exact_field")


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2g}"


def score_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(name, value +- standard error, noise floor) of each score."""
    rows = [("eval/loss", number(evaluation.values["eval/loss"]), "")]
    for score in evaluation.scores:
        value = number(score.value) + (f" +- {number(score.spread)}" if score.spread is not None else "")
        floor = "" if score.floor is None else number(score.floor)
        floor += "" if score.floor_sd is None else f" +- {number(score.floor_sd)}"
        rows.append((score.name, value, floor))
        rows += [(name, number(v), "") for name, v in (score.extra or {}).items() if name in SHOWN_EXTRA]
    return rows


def absent_lines(absent: list[Absent]) -> list[str]:
    """One line per reason, naming the scores it rules out."""
    by_reason: dict[str, list[str]] = {}
    for item in absent:
        by_reason.setdefault(item.reason, []).append(item.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def print_scores(evaluation: Evaluation, nfe: int) -> None:
    """The table of scores with their noise floors, and why some are absent."""
    if evaluation.scores:
        count = f"{len(evaluation.generation.samples):,} samples, {nfe} evaluations each"
        print(f"scores of {count} (noise floor: real against real)")
    else:
        print("held-out loss alone: this evaluation has no scores")
    rows = score_rows(evaluation)
    width = max(len(name) for name, _, _ in rows)
    for name, value, floor in rows:
        print(f"  {name:<{width}}  {value:<22}" + (f"floor {floor}" if floor else ""))
    for line in absent_lines(evaluation.absent):
        print(f"  not given: {line}")


def draw_picture(path: Path, evaluation: Evaluation, title: str, images: int = 100) -> bool:
    """Samples beside real data as a PNG: a scatter plot or an image grid. False for data of any other form."""
    from visualizers.pictures import image_grid_picture, scatter_picture

    dataset = evaluation.generation.dataset
    samples, reference = evaluation.generation.samples.cpu().numpy(), evaluation.reference.cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    if dataset.state_shape == (2,):
        scatter_picture(path, samples[:2000], reference, title, score_line(evaluation))
        return True
    if len(dataset.state_shape) == 3:
        columns = max(1, round(images**0.5))
        image_grid_picture(path, samples[:images], dataset.value_range or (-1.0, 1.0), columns, reference[:images], title)
        return True
    return False


def score_line(evaluation: Evaluation) -> str:
    """The first score with its floor, in words."""
    if not evaluation.scores:
        return ""
    score = evaluation.scores[0]
    floor = "" if score.floor is None else f", noise floor {score.floor:.4f} ± {score.floor_sd or 0:.4f}"
    return f"{score.name.partition('/')[2].replace('_', ' ')} {score.value:.4f}{floor}"
