"""What engine=mlx does not have, said from the configuration alone. Neither torch nor MLX here."""

from collections.abc import Collection, Iterator
from typing import Any

from common.errors import UserError, require_package
from configuration.nodes import lookup

MODELS = {
    "models.flow_matching.mlp.MLP", "models.flow_matching.small_cnn.SmallCNN", "models.unet.unet.UNet", "models.dit.dit.DiT",
    "models.classifier.residual_classifier.ResidualClassifier", "models.classifier.resnet9.ResNet9",
    "models.classifier.lenet.LeNet", "models.classifier.vision_transformer.VisionTransformer",
}  # fmt: skip
LOSSES = {
    "losses.flow_matching_loss.FlowMatchingLoss", "losses.meanflow_loss.MeanFlowLoss",
    "losses.meanflow_loss.ImprovedMeanFlowLoss", "losses.alpha_flow_loss.AlphaFlowLoss", "losses.shortcut_loss.ShortcutLoss",
    "losses.split_meanflow_loss.SplitMeanFlowLoss", "losses.cross_entropy_loss.CrossEntropyLoss",
}  # fmt: skip
OPTIMIZERS = {"torch.optim.AdamW", "torch.optim.Adam", "torch.optim.SGD"}
PREDICTIONS = {None, "losses.predictions.VelocityPrediction"}
WEIGHTINGS = {None, "losses.weightings.UniformWeighting", "losses.weightings.AdaptiveWeighting"}
NOT_THERE = {
    "precision": "fp16", "device": "cuda", "on_nan": "skip", "deterministic": True, "checkpoint_activations": True,
}  # fmt: skip


def check_engine(config: dict[str, Any]) -> None:
    """Raise UserError for what engine=mlx does not have, or where MLX is not installed."""
    if config.get("engine", "torch") == "torch" or config["eval_checkpoint"]:  # which torch scores
        return
    lacking = next(lacks(config), None)
    if lacking:
        raise UserError(f"engine=mlx does not have {lacking}; leave that out, or use engine=torch")
    require_package("mlx", "engine=mlx", "mlx", ", or use engine=torch")


def lacks(config: dict[str, Any]) -> Iterator[str]:
    """Yield each setting of a resolved configuration that engine=mlx does not have, as it is typed."""
    choices = config["choices"]
    known: Collection[str | None]
    for group, known in (("model", MODELS), ("loss", LOSSES), ("optimizer", OPTIMIZERS)):
        if lookup(config, f"{group}._target_") not in known:
            yield f"{group}={choices[group]}"
    for part, known in (("prediction", PREDICTIONS), ("weighting", WEIGHTINGS)):
        if lookup(config, f"loss.{part}._target_") not in known:
            yield f"loss/{part}={choices.get(f'loss/{part}')}"
    if lookup(config, "ema._target_") != "training.ema.ConstantEMA":
        yield f"ema={choices['ema']}"
    if choices["backend"] not in ("local", None):
        yield f"backend={choices['backend']}"
    if config["devices"] > 1:
        yield f"devices={config['devices']}"
    for key in ("loss.teacher", "loss.superloss", "model.dropout", "teacher"):
        if value := lookup(config, key):
            yield f"{key}={value!r}"
    if config["compile_mode"] != "default":
        yield f"compile_mode={config['compile_mode']}"
    for key, word in NOT_THERE.items():
        if config.get(key) == word:
            yield f"{key}={str(word).lower()}"
