"""What every network of the project has, whatever it maps."""

from torch import nn


class Network(nn.Module):
    """num_classes: of the labels it is given, or that it predicts; 0 for none. condition_shape: of what a label holds beside
    the class, None for nothing. init_weights() is called once at set-up.
    """

    num_classes: int = 0
    condition_shape: tuple[int, ...] | None = None

    @property
    def named(self) -> nn.Module:
        """Return the module whose class people know the network by."""
        return self

    def init_weights(self) -> None:
        """Start values of the parameters; torch's own unless a model says otherwise."""

    def parameter_count(self) -> int:
        """Return number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)
