"""What `graceful init --from` writes and says: the looked-at pictures as a commented configuration, and as lines."""

import json
import os

from graceful.flows.settings.inspection import Inspection, Needed
from graceful.flows.settings.template import DEFAULTS


def filled_in(name: str, found: Inspection) -> str:
    """A configuration for these pictures in which nothing has to be edited before the first update."""
    p = found.proposal
    return f"""\
# Configuration of this workspace, written by 'graceful init --from' after looking at the pictures: nothing has to be
# edited before the first 'graceful update'. Relative paths count from this file; $NAME is taken from the environment.
# Every key and its meaning: docs/configuration.md. A key that does not exist is an error.
name = {_toml(name)}

# Images to train on: {p.num_training:,} of {p.num_training_labels:,} labels when this was written.
# An image is held out for the evaluation by its content alone: data may grow, no image ever changes sides, and copies
# stay together. A label with a single image on a side is left out there.
[training_data]
{_images(found, "kept")}
# Images to decide by: {p.num_queries:,} queries of {p.num_identities:,} identities when this was written.
# closed_set: none of these images may be trained on; their labels are. Each query searches the other held-out images.
[evaluation]
protocol = "closed_set"
slices = []

[evaluation.queries]
{_images(found, "held_out")}
# {_network_remark(found)}
[training]
width = 128
epochs = {p.epochs}
batch_size = {p.batch_size}
backbone = {{ name = "small_cnn" }}
# {_channels_remark(found)} mean and std as measured on a sample, on the 0 to 1 scale.
preprocessing = {{ image_size = {p.image_size}, channels = {p.channels}, mean = {list(p.mean)}, std = {list(p.std)} }}
# {_augmentation_remark(found)}
augmentation = {{ kind = {_toml(p.augmentation)} }}

# The limits of a decision, written down before the first update. These are the defaults.
# {_needed_remark(p.needed)}
{DEFAULTS}"""


def inspection_lines(found: Inspection, listing: str) -> list[str]:
    """What was seen and what is proposed, a sentence each; `listing` is the file of unreadable images."""
    p = found.proposal
    return [
        *_seen(found, listing),
        f"Sizes: shorter side {min(found.smallest)} to {min(found.largest):,} px, half of them at least "
        f"{found.median_side:,} -> image_size {p.image_size}. {_channels_remark(found)}",
        f"Evaluation: closed set, {p.share:.0%} by content hash = {_count(p.num_queries, 'query', 'queries')} of "
        f"{_count(p.num_identities, 'identity', 'identities')}; {p.num_training:,} images of {p.num_training_labels:,} "
        f"labels to train on.{_left_out(found)}",
        evidence_line(p.num_queries, p.num_identities, p.needed),
    ]


def evidence_line(num_queries: int, num_identities: int, needed: Needed) -> str:
    """What this evaluation can prove under the limits of the policy, and what it would take."""
    flips = "no reachable number of" if needed.for_flips is None else f"about {needed.for_flips:,}"
    quality = "no reachable number" if needed.for_quality is None else f"{needed.for_quality:,}"
    enough = needed.for_flips is not None and num_queries >= needed.for_flips and num_identities >= needed.identities
    verdict = "enough" if enough else "too few"
    return (
        f"Evidence: {num_queries:,} queries of {num_identities:,} identities are {verdict} to "
        f"show that flips stay below the limit: {flips} queries of at least {needed.identities} identities are needed, "
        f"and {quality} to show that an update which wins nothing loses nothing (far fewer for one that wins)."
        + ("" if enough else " Until then most updates after the first end INCONCLUSIVE.")
    )


def _seen(found: Inspection, listing: str) -> list[str]:
    total = found.num_images + len(found.unreadable)
    kind = {"folder": "an image folder", "csv": "a CSV file of labels", "parquet": "Parquet"}[found.source]
    counts = sorted(found.labels.values())
    lines = [
        f"Read {_count(total, 'image', 'images')} ({kind}): {_count(len(counts), 'label', 'labels')} of {counts[0]:,} "
        f"to {counts[-1]:,} images, half of them at least {counts[len(counts) // 2]:,}."
    ]
    if len(found.paths) > 1:
        names = ", ".join(os.path.basename(path) for path in found.paths)
        lines.append(f"The folders {names} are read as one set; the evaluation is drawn anew.")
    if found.unreadable:
        first, reason = found.unreadable[0]
        lines.append(f"Unreadable: {len(found.unreadable):,}, such as {first} ({reason}). List: {listing}")
    if found.num_copies:
        one, other = found.copies[0]
        lines.append(
            f"Copies: {found.num_copies:,} have the same bytes as another (such as {one} = {other}); they stay on one "
            f"side.{_contradictions(found)}"
        )
    if found.loose:
        lines.append(
            f"Loose: {_count(len(found.loose), 'image lies', 'images lie')} in no folder of a label; not used (such as "
            f"{found.loose[0]})."
        )
    if found.links_left_out:
        lines.append(
            f"Links: {_count(len(found.links_left_out), 'linked folder', 'linked folders')} not followed: images that "
            f"are read already (such as {found.links_left_out[0]})."
        )
    if found.other_files:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.other_files.items()))
        lines.append(f"Other files, not read: {kinds}.")
    return lines


def _images(found: Inspection, part: str) -> str:
    paths = found.paths[0] if len(found.paths) == 1 else list(found.paths)
    columns = f"label_columns = {_toml(list(found.label_columns))}\n" if found.label_columns else ""
    return (
        f"source = {_toml(found.source)}\n"
        f"path = {_toml(paths)}\n"
        f"{columns}"
        f'split = {{ share = {found.proposal.share}, by = "content", part = "{part}" }}\n'
        "min_per_label = 2\n"
        f"max_unreadable_share = {found.proposal.max_unreadable_share}\n"
    )


def _network_remark(found: Inspection) -> str:
    remark = "The small network learns within minutes without a GPU."
    if found.median_side >= 128:
        remark += (
            "\n# These pictures hold more than it sees: with a GPU take backbone = \"resnet50\", image_size = 224 and"
            "\n# cluster.gpus_per_worker = 1."
        )  # fmt: skip
    return remark


def _channels_remark(found: Inspection) -> str:
    if found.proposal.channels == 1:
        return "All are grey: 1 channel."
    grey = f" ({found.num_grey:,} are grey)" if found.num_grey else ""
    return f"Colour{grey}: 3 channels."


def _augmentation_remark(found: Inspection) -> str:
    if found.proposal.augmentation == "affine":
        return "affine turns, shifts and scales; crop_flip also mirrors, which letters and digits do not bear."
    return "crop_flip crops and mirrors; where left and right differ (letters, signs) take affine."


def _needed_remark(needed: Needed) -> str:
    if needed.for_flips is None:
        return "No number of queries can show max_nfr."
    return (
        f"About\n# {needed.for_flips:,} queries of at least {needed.identities} identities are needed to show max_nfr."
    )


def _left_out(found: Inspection) -> str:
    alone = found.num_images - found.proposal.num_training - found.proposal.num_queries
    return f" {_count(alone, 'image is', 'images are')} left out, alone of a label on its side." if alone else ""


def _contradictions(found: Inspection) -> str:
    if not found.num_contradictions:
        return ""
    return f" {found.num_contradictions:,} of them under another label: remove one of the two."


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _toml(value: object) -> str:
    """A TOML literal: JSON's texts and lists are TOML's, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
