"""Images that an update chooses by: set aside from the training set, or given; neither trained on nor reported.

What is chosen is a share of interpolation, a number of epochs: numbers of which the best of several is taken. Taken on
the evaluation set they would flatter the candidate there.
"""

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from graceful.errors import UsageError
from graceful.flows.store.evalsets import part_of
from graceful.training.datasets import DatasetConfig, assert_disjoint, is_held_out, load_images
from graceful.training.known import KnownImages
from graceful.training.manifest import LabelledImages


class DevConfig(BaseModel):
    """Images that choices are made on, apart from those that are trained on and those that are reported."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the training data to set aside, by hash: of its identities (open_set) or of its images "
        "(closed_set). What is in it stays in it as the data grows.",
    )
    images: DatasetConfig | None = Field(
        default=None,
        description="Or images of their own, such as the dev part of a set that 'graceful evalset create' made: "
        '{ source = "csv", path = "{root}/evalsets/<name>/queries.csv", label_columns = ["identity"], where = '
        '{ part = ["dev"] } }.',
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> "DevConfig":
        if (self.share is None) == (self.images is None):
            raise UsageError("evaluation.dev: expected either share or images, found both or none; write share = 0.1")
        return self


def set_aside(
    config: DevConfig,
    protocol: Literal["open_set", "closed_set"],
    images: LabelledImages,
    known: KnownImages | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """Part the training images; returns those to train on and those of the dev part, each content once.

    Of images of their own, `known` ones are not read.

    Raises: OverlapError where given images share identities (open set) or content (closed set) with the training set;
    UsageError where the share leaves nothing on a side.
    """
    if config.images is not None:
        dev = load_images(config.images, known)
        assert_disjoint(images, dev, by="identity" if protocol == "open_set" else "image")
        return images, _each_once(dev)
    share = config.share or 0.0
    if protocol == "open_set":
        chosen = {name for name in set(images.labels.tolist()) if part_of(name, share) == "dev"}
        aside = np.array([label in chosen for label in images.labels.tolist()], bool)
    else:
        aside = np.array([is_held_out(content, share) for content in images.content_sha256], bool)
    if aside.all() or not aside.any():
        unit = "identities" if protocol == "open_set" else "images"
        raise UsageError(
            f"setting a dev part aside: expected some of the {unit} on each side, found {int(aside.sum())} of "
            f"{len(images)} training images in it (evaluation.dev.share = {share}); change the share, or give "
            "evaluation.dev.images"
        )
    return images.take(~aside), _each_once(images.take(aside))


def _each_once(images: LabelledImages) -> LabelledImages:
    first = np.unique(np.array(images.content_sha256), return_index=True)[1]
    return images.take(np.sort(first))
