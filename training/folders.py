"""What lies in a folder of images: images with the label that their sub-folder gives them, and everything else by name.

A symlinked folder is read once at most: one that leads back into the folder, or to a place that another link led to
already, would only bring the same images again under another label. It is listed instead. Hidden files and folders (a
name that starts with a dot) are passed over: they hold thumbnails and resource forks. In an object store there are no
links.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

import pyarrow.fs as pafs

from graceful.files import is_remote, resolve

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass
class Folder:
    """Files below a folder, each list sorted by path. `labels` are aligned with `images`; "" beside the sub-folders."""

    images: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    links_left_out: list[str] = field(default_factory=list)

    @property
    def loose(self) -> list[str]:
        """Images that lie in no sub-folder and so have no label."""
        return [image for image, label in zip(self.images, self.labels, strict=True) if not label]


def list_folder(place: str) -> Folder:
    """List a local folder or one in an object store, at any depth."""
    file_system, root = resolve(place)
    found = Folder()
    files: list[str] = []
    if is_remote(place):
        selector = pafs.FileSelector(root, recursive=True)
        files = [info.path for info in file_system.get_file_info(selector) if info.type == pafs.FileType.File]
    else:
        _walk(root, {os.path.realpath(root)}, os.path.realpath(root), files, found.links_left_out)
    prefix = place[: len(place) - len(root)] if "://" in place and place.endswith(root) else ""
    for path in sorted(files):
        if path.lower().endswith(IMAGE_SUFFIXES):
            found.images.append(f"{prefix}{path}")
            found.labels.append(path[len(root) :].strip("/").rpartition("/")[0])
        else:
            found.others.append(f"{prefix}{path}")
    found.links_left_out.sort()
    return found


def find_source(place: str) -> tuple[Literal["parquet", "folder", "csv"], str]:
    """What kind of data set lies at a place, and the path that `DatasetConfig` is to get.

    A file by its name; a folder is Parquet when it holds such files and no image, CSV when no image lies in a
    sub-folder and exactly one CSV file lies beside them; otherwise an image folder.
    """
    file_system, path = resolve(place)
    if place.endswith(".parquet"):
        return "parquet", place
    if place.endswith(".csv"):
        return "csv", place
    if file_system.get_file_info(path).type != pafs.FileType.Directory:
        return "folder", place
    listed = list_folder(place)
    if not listed.images and any(other.endswith(".parquet") for other in listed.others):
        return "parquet", place
    tables = [other for other in listed.others if other.endswith(".csv") and os.path.dirname(other) == path]
    if listed.images and len(listed.loose) == len(listed.images) and len(tables) == 1:
        return "csv", tables[0]
    return "folder", place


def _walk(folder: str, seen: set[str], root: str, files: list[str], left_out: list[str]) -> None:
    """Collect files below a folder; `seen` are the real places of the root and of followed links."""
    for entry in sorted(os.scandir(folder), key=lambda item: item.name):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            if entry.is_file():  # neither a socket nor a link to nothing
                files.append(entry.path)
            continue
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            if any(_inside(real, place) or _inside(place, real) for place in seen | {root}):
                left_out.append(entry.path)
                continue
            seen.add(real)
        _walk(entry.path, seen, root, files, left_out)


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
