"""The loss of a training step: the task, and every constraint against every predecessor.

task + sum over constraints of weight x (sum or mean over predecessors k of weight_k C_k). Predecessors take part
through stored embeddings and rows only.

On several ranks a constraint that compares the images of a batch with each other sees the global batch, and every other
constraint a rank's own images, weighted by their number: the mean over the ranks is the loss of the global batch. What
is drawn at random is drawn from one generator and for the global batch, so that every rank draws the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graceful.errors import UsageError
from graceful.training.constraints import build_constraint, takes
from graceful.training.constraints.contract import BY_IMAGE, Reference
from graceful.training.constraints.mixbct import MixedFeatures, typical_images
from graceful.training.distributed import gather_rows, own_rows, share_weight
from graceful.training.generation import ordinal_of
from graceful.training.heads import Head
from graceful.training.job import ConstraintConfig, TrainingConfig
from graceful.training.material import Batch, Material
from graceful.training.predecessors import Predecessors
from graceful.training.sampling import ClassSample, sample_classes, sample_size
from graceful.training.uncertainty import class_margins, focused, trust


@dataclass(frozen=True)
class StandIns:
    """Stored embeddings in the place of some of a batch's own (MixBCT)."""

    is_replaced: Tensor  # (B,) bool
    vectors: Tensor  # (B, d), where is_replaced


@dataclass(frozen=True)
class Draw:
    """What a step draws before the network runs."""

    sample: ClassSample | None = None
    stand_ins: StandIns | None = None

    def mix(self, embeddings: Tensor) -> Tensor:
        """Return what the task sees of embeddings (B, d)."""
        if self.stand_ins is None:
            return embeddings
        vectors = self.stand_ins.vectors.to(embeddings.dtype)
        return torch.where(self.stand_ins.is_replaced[:, None], vectors, embeddings)


@dataclass(frozen=True)
class _Term:
    """One constraint of the recipe."""

    name: str
    entry: ConstraintConfig
    constraint: Callable[..., Tensor]
    reference: Reference
    members: tuple[list[int], ...]  # for each group, the predecessors that it is applied against
    takes_offsets: bool

    @property
    def is_ensemble(self) -> bool:
        return self.entry.against == "ensemble"


class Objective:
    """The constraints of a recipe, ready to be applied to batches."""

    def __init__(self, config: TrainingConfig, material: Material, device: torch.device) -> None:
        self._predecessors = material.predecessors
        self._num_classes = len(material.classes)
        self._every_class = torch.arange(self._num_classes, device=device)
        self._size = sample_size(config.sampled_classes, self._num_classes, config.batch_size)
        self._terms: list[_Term] = []
        self._mixing: tuple[MixedFeatures, tuple[list[int], ...], Tensor] | None = None
        for name, entry in zip(term_names(config.constraints), config.constraints, strict=True):
            members = _members(self._predecessors, entry.against)
            constraint = build_constraint(entry.name, entry.parameters)
            if getattr(constraint, "reference", None) == "logits":
                _check_shared(self._predecessors, members, name)
            if not isinstance(constraint, MixedFeatures):
                self._terms.append(
                    _Term(name, entry, constraint, constraint.reference, members, takes(constraint, "offsets"))
                )
            elif len(self._predecessors):
                typical = self._typical(members, constraint.typical, material.labels)
                self._mixing = constraint, members, typical

    def draw(self, labels: Tensor, batch: Batch, generator: torch.Generator) -> Draw:
        """Draw the classes of the step and what stands in for its images.

        `labels` (B,) are those of a rank's share, on the device. `generator` is in the same state on every rank.
        """
        sample = stand_ins = None
        if self._size:
            everyone = gather_rows(labels, False, batch.total)
            sample = sample_classes(everyone, self._num_classes, self._size, generator)
        if self._mixing is not None:
            mixing, members, typical = self._mixing
            rows = gather_rows(batch.rows.to(labels.device), False, batch.total).cpu()
            chosen = own_rows(mixing.draw(typical[:, rows], generator)).to(labels.device)
            every = _chosen(self._predecessors.of_batch(batch.rows), members)
            stored = torch.cat([values for values in every if len(values)])
            vectors = stored[chosen.clamp(min=0), torch.arange(len(chosen), device=chosen.device)]
            stand_ins = StandIns(chosen >= 0, vectors)
        return Draw(sample, stand_ins)

    def terms(
        self, embeddings: Tensor, labels: Tensor, batch: Batch, generator: torch.Generator, draw: Draw, head: Head
    ) -> dict[str, Tensor]:
        """Return each constraint's weighted loss over all predecessors, by name; empty without predecessors.

        `embeddings` (B, d) not normalised and `labels` (B,) on the device; `batch` holds the same B images, a rank's
        share; `draw` is what `draw` returned; `head` is the one in training. `generator` is in the same state on every
        rank.
        """
        if not len(self._predecessors):
            return {}
        step = _Step(self._predecessors, self._every_class, embeddings, labels, batch, draw.sample, head)
        terms: dict[str, Tensor] = {}
        for term in self._terms:
            losses, count = self._ensemble(term, step) if term.is_ensemble else self._each(term, step, generator)
            share = 1.0 if term.reference == "batch" else share_weight(len(labels), batch.total)
            total = losses * (term.entry.weight * share)
            terms[term.name] = total / count if term.entry.reduction == "mean" else total
        return terms

    def _each(self, term: "_Term", step: "_Step", generator: torch.Generator) -> tuple[Tensor, int]:
        """Return the sum of a constraint's losses over its predecessors, and their number."""
        entry, kind = term.entry, term.reference
        new, new_labels, ref_labels = step.compared(kind)
        references = _chosen(step.references(kind, generator), term.members)
        by_image = step.weights(entry, kind == "batch")
        trusts = [None] * len(references) if by_image is None else _chosen(by_image, term.members)
        offsets = step.offsets if kind not in BY_IMAGE and term.takes_offsets else None
        extra = {} if offsets is None else {"offsets": offsets}
        losses, count = [], 0
        for group, members, reference, weights in zip(
            self._predecessors.groups, term.members, references, trusts, strict=True
        ):
            if members:
                trusted = extra if weights is None else {**extra, "weights": weights}
                found = term.constraint(new, new_labels, reference, ref_labels, **trusted)
                losses.append((found * group.weights[members]).sum())
                count += len(members)
        return torch.stack(losses).sum(), count

    def _ensemble(self, term: "_Term", step: "_Step") -> tuple[Tensor, int]:
        new, new_labels, ref_labels = step.compared("logits")
        return term.constraint(new, new_labels, step.ensemble, ref_labels).sum(), 1

    def _typical(self, members: tuple[list[int], ...], share: float, labels: Tensor) -> Tensor:
        """Return which training images are typical of their class for each of the chosen predecessors, (K, N)."""
        found, first = [], 0
        for group, chosen in zip(self._predecessors.groups, members, strict=True):
            for k in chosen:
                found.append(typical_images(self._predecessors.similarities_to_mean(first + k), labels, share))
            first += len(group.generation_ids)
        return torch.stack(found)


class _Step:
    """What the constraints of one step share: each thing is read, gathered or computed once, and only where needed."""

    def __init__(
        self,
        predecessors: Predecessors,
        every_class: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        batch: Batch,
        sample: ClassSample | None,
        head: Head,
    ) -> None:
        self._predecessors = predecessors
        self._embeddings, self._labels, self._batch = embeddings, labels, batch
        self._sample = sample
        self._head = head
        self.classes = every_class if sample is None else sample.classes
        self.offsets = None if sample is None else sample.offsets

    def compared(self, kind: Reference) -> tuple[Tensor, Tensor, Tensor]:
        """What a constraint is given of the generation in training, its labels, and those of the references."""
        if kind == "logits":
            return self._logits, self._targets, self._targets
        if kind == "batch":
            return *self.everyone, self.everyone[1]
        return self._embeddings, self._labels, self.classes

    @cached_property
    def everyone(self) -> tuple[Tensor, Tensor]:
        """Embeddings and labels of the global batch."""
        total = self._batch.total
        return gather_rows(self._embeddings, True, total), gather_rows(self._labels, False, total)

    def references(self, kind: str, generator: torch.Generator) -> list[Tensor]:
        """What a constraint is compared with, (K, M, d_k) per group."""
        if kind == "rows":
            return [self._of_classes(group.rows) for group in self._predecessors.groups]
        if kind == "means":
            return self._means
        if kind == "logits":
            return self._stored_logits
        if kind == "instances":
            return self._predecessors.draw_instances(generator, None if self._sample is None else self.classes)
        return self._stored

    def weights(self, entry: ConstraintConfig, is_global: bool) -> list[Tensor] | None:
        """Weights of the global batch's or of a rank's own images, (K, B) per group; None where all count alike."""
        if not (entry.uncertainty or entry.focus):
            return None
        found = []
        for margins in self._margins:
            weights = trust(margins) if entry.uncertainty else torch.ones_like(margins)
            weights = weights * focused(margins, entry.focus)
            found.append(weights if is_global else own_rows(weights.t()).t())
        return found

    @cached_property
    def ensemble(self) -> Tensor:
        """The predecessors' mean logits, (1, B, C): of each class over those that know it, by their weights."""
        logits = torch.cat(self._stored_logits)
        weights = torch.cat([group.weights for group in self._predecessors.groups])[:, None, None]
        weights = weights * logits.isfinite()
        total = weights.sum(dim=0, keepdim=True)
        mean = (logits.masked_fill(logits.isinf(), 0.0) * weights).sum(dim=0, keepdim=True) / total
        return mean.masked_fill(total == 0, -torch.inf)

    @cached_property
    def _own_stored(self) -> list[Tensor]:
        return self._predecessors.of_batch(self._batch.rows)

    @cached_property
    def _stored(self) -> list[Tensor]:
        return [_gathered(own, self._batch.total) for own in self._own_stored]

    @cached_property
    def _means(self) -> list[Tensor]:
        return [self._of_classes(group.class_means) for group in self._predecessors.groups]

    @cached_property
    def _targets(self) -> Tensor:
        return torch.searchsorted(self.classes, self._labels)

    @cached_property
    def _margins(self) -> list[Tensor]:
        """Class margins of the global batch's stored embeddings, (K, B) per group."""
        pairs = zip(self._own_stored, self._means, strict=True)
        return [_gathered(class_margins(own, means, self._targets), self._batch.total) for own, means in pairs]

    @cached_property
    def _logits(self) -> Tensor:
        return self._head.logits(self._embeddings, self._sample)

    @cached_property
    def _stored_logits(self) -> list[Tensor]:
        """Logits of a rank's own images by each predecessor's own rows, (K, B, C) per group."""
        scale, found = self._head.config.scale, []
        for own, group in zip(self._own_stored, self._predecessors.groups, strict=True):
            logits = scale * (own @ self._of_classes(group.rows).transpose(1, 2))
            found.append(logits.masked_fill(~self._of_classes(group.is_known)[:, None, :], -torch.inf))
        return found

    def _of_classes(self, values: Tensor) -> Tensor:
        return values if self._sample is None else values.index_select(1, self.classes)


def term_names(constraints: Sequence[ConstraintConfig]) -> list[str]:
    """Return the names under which the constraints are logged: a second one of the same name is `name-2`.

    >>> term_names([ConstraintConfig(name="bct"), ConstraintConfig(name="bct", weight=2.0)])
    ['bct', 'bct-2']
    """
    names: list[str] = []
    for entry in constraints:
        count = 1 + sum(earlier.name == entry.name for earlier in constraints[: len(names)])
        names.append(entry.name if count == 1 else f"{entry.name}-{count}")
    return names


def _check_shared(predecessors: Predecessors, members: Sequence[list[int]], name: str) -> None:
    """Refuse logits that have nothing to be compared with. Raises UsageError."""
    for group, chosen in zip(predecessors.groups, members, strict=True):
        for k in chosen:
            if not bool(group.is_known[k].any()):
                raise UsageError(
                    f"constraint {name}: expected classes that {group.generation_ids[k]} has classifier rows for among "
                    "those of the training images, found none; use l2 with focus, which compares embeddings"
                )


def _members(predecessors: Predecessors, against: str) -> tuple[list[int], ...]:
    """Return for each group which of its predecessors a constraint is applied against."""
    ids = predecessors.generation_ids
    latest = max(ids, key=ordinal_of, default=None)
    return tuple(
        [k for k, name in enumerate(group.generation_ids) if against != "latest" or name == latest]
        for group in predecessors.groups
    )


def _chosen(stacked: Sequence[Tensor], members: Sequence[list[int]]) -> list[Tensor]:
    """Return the chosen predecessors of each group (K, ...), without a copy where they are all."""
    return [
        values if len(chosen) == len(values) else values[chosen]
        for values, chosen in zip(stacked, members, strict=True)
    ]


def _gathered(own: Tensor, total: int) -> Tensor:
    """Return (K, B, ...) of the global batch from a rank's own (K, B_r, ...)."""
    return gather_rows(own.transpose(0, 1), False, total).transpose(0, 1)
