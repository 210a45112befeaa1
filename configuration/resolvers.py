"""What configs/ works out as ${name:argument}: shapes and classes that parts take from the data, and from its files."""

import json
from functools import cache
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from common.errors import UserError
from configuration.build import build, found_class
from dataloaders.array_header import array_classes, array_condition, array_shape
from dataloaders.picture_files import (
    attribute_classes,
    folder_classes,
    idx_root,
    imagenet_classes,
    latent_classes,
    latent_shape,
)

AUGMENT_PARAMETERS = 9  # of dataloaders.augmentation.parameters


def vector_shape(shape: Any) -> Any:
    """Return the state shape, for models of vectors. UserError for images."""
    return shape_of(shape, 1, "vectors", "choose an image model (model=cnn) or a set of points (dataloaders=kmeans)")


def image_shape(shape: Any) -> Any:
    """Return the state shape, for models of images. UserError for vectors."""
    kind = "images (channels, height, width)"
    return shape_of(shape, 3, kind, "choose model=mlp or an image set (dataloaders=digits)")


def shape_of(shape: Any, dimensions: int, kind: str, remedy: str) -> Any:
    """Return the state shape. UserError where it has another number of dimensions than the kind of states a model takes."""
    if len(shape) != dimensions:
        raise UserError(f"this model takes {kind}, but the data has states of shape {list(shape)}; {remedy}")
    return shape


def conditional_classes(conditional: bool, num_classes: int, *, _root_: DictConfig) -> int:
    """Return how many classes the network is given. UserError for conditional=true on data without labels or conditions."""
    if conditional and not num_classes and not OmegaConf.select(_root_, "dataloaders.condition_shape"):
        raise UserError("conditional=true needs labels, and this data has none; use conditional=false")
    return num_classes if conditional else 0


def mixture_shape(means: Any) -> Any:
    """Return the shape of the points that are the means of a mixture; (2,) where they are numbers."""
    first = means[0] if means else None
    return OmegaConf.create([len(first) if isinstance(first, ListConfig) and first else 2])


def mixture_classes(means: Any, classes: Any) -> int:
    """Return how many labels a mixture's components have; their own constructor says what of these is wrong."""
    return len(means or ()) if not classes else 1 + max(classes)


def augment_dim(probability: float) -> int:
    """Return how many numbers describe to the network what the augmentation did to a picture."""
    return AUGMENT_PARAMETERS if probability else 0


def torch_fact(name: str, dataset: Any, keys: Any) -> Any:
    """Return what `name` says of the data set that a node names: it is made, and some of its rows are read."""
    node, fields = (json.dumps(OmegaConf.to_container(part, resolve=True), sort_keys=True) for part in (dataset, keys))
    found = torch_facts(node, fields)[name]
    return as_node(found)


def as_node(found: Any) -> Any:
    """Return what a function of a configuration gives, a sequence as configurations hold it."""
    return OmegaConf.create(list(found)) if isinstance(found, tuple | list) else found


@cache
def torch_facts(node: str, keys: str) -> dict[str, Any]:
    """Return the settings that a torch data set itself has. UserError where it cannot be made, or served."""
    found_class("dataloaders.dataset", str(json.loads(node)["_target_"]))
    from dataloaders.torch_dataset import described  # needs torch

    return described(build(json.loads(node)), json.loads(keys))


def grey_shape(condition: str | None, state_shape: Any) -> Any:
    """Return the shape of the brightness of pictures, None where it is no condition."""
    return OmegaConf.create([1, *state_shape[1:]]) if condition else None


def label_classes(num_classes: int) -> int:
    """Return how many classes a classifier tells apart. UserError for data without labels."""
    if not num_classes:
        use = "dataloaders=digits, or loss=mse with a velocity model"
        raise UserError(f"a classifier needs labels, and this data has none; choose labelled images, as {use}")
    return num_classes


def register_resolvers() -> None:
    """The functions that configs/ calls as ${name:argument}."""
    for function in (
        vector_shape, image_shape, conditional_classes, label_classes, array_classes, augment_dim, folder_classes,
        imagenet_classes, attribute_classes, latent_classes, mixture_shape, mixture_classes, torch_fact, idx_root,
        grey_shape,
    ):  # fmt: skip
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
    for shape in (array_shape, array_condition, latent_shape):  # whose results are lists as configurations hold them
        OmegaConf.register_new_resolver(shape.__name__, lambda path, shape=shape: as_node(shape(path)), replace=True)
