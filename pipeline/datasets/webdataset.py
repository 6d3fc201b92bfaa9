"""A folder of tar files as webdataset writes them: 0001.jpg, 0001.txt, 0002.jpg, …, at any depth.

A member's name up to the first dot of its last part is the key of a sample, the rest says what the member is: a caption
if it is a column of `captions`, the image if it is `image`, if need be followed by the ending of an image format; `jpg`
stands for any such ending. Other members are passed over. Members of a sample need not stand together.

A tar is read twice: its headers, for where each sample lies, then sample by sample. What makes no plain file (links,
devices), has no usable name or comes twice is refused; where a tar is cut or damaged, what lies before is kept, and
the tar itself is listed in the quarantine beside the member that was cut.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import BinaryIO

from pipeline.datasets import DatasetError, DatasetParams, FolderSource, Load, Rejected, Sample, Task, refuse
from pipeline.datasets.captions import LARGEST_TEXT, clean_captions
from pipeline.datasets.decoding import IMAGE_ENDINGS, check_length, decode, rejecting
from pipeline.datasets.files import containers, open_item, split_of
from pipeline.datasets.tar import members

IMAGE = "/image"  # the name of the image among the parts of a sample: no member has it
Parts = dict[str, tuple[int, int]]  # of a sample: where each part begins in the tar, and its length


@dataclass(frozen=True)
class WebDataset(FolderSource):
    """Tar files of images and captions."""

    path: str  # folder of the tar files
    captions: dict[str, float]  # {kind of member: share, …}: how often, relatively, each is drawn in training
    image: str  # kind of member that holds the image

    def tasks(self, data: DatasetParams) -> tuple[None, list[Task]]:
        """A tar is a task. DatasetError if the first whole one that is not empty lacks the image or a column."""
        found = containers(self.path, ".tar")
        for task in found:
            with contextlib.suppress(Rejected), rejecting(), open_item(self.path, task.items[0]) as file:
                samples, refused, kinds = self.index(file)
                if not kinds or any(name == "" for name, _ in refused):
                    continue
                present = {part for parts in samples.values() for part in parts}
                missing = [self.image if part == IMAGE else part for part in (IMAGE, *self.captions)
                           if part not in present]
                if missing:
                    raise DatasetError(f"{self.path}/{task.items[0].key} has no member of kind {', '.join(missing)}; "
                                       f"there are: {', '.join(sorted(kinds)[:20])}; correct image and captions")
                break
        return None, found

    def read(self, data: DatasetParams, task: Task) -> Iterator[tuple[str, Load]]:
        (tar,) = task.items
        with contextlib.ExitStack() as stack:
            try:
                with rejecting():
                    file = stack.enter_context(open_item(self.path, tar))
                    samples, refused, _ = self.index(file)
            except Rejected as reason:
                yield tar.key, refuse(str(reason))
                return
            for name, why in refused:
                yield f"{tar.key}/{name}" if name else tar.key, refuse(why)
            for stem, parts in samples.items():
                key = f"{tar.key}/{stem}"
                yield key, partial(self.load, file, parts, split_of(key, data.heldout), data)

    def load(self, file: BinaryIO, parts: Parts, split: str, data: DatasetParams) -> Sample:
        with rejecting():
            if IMAGE not in parts:
                raise Rejected("no image")
            check_length(parts[IMAGE][1], data)
            image = read_part(file, parts[IMAGE])
            captions, cut = clean_captions([read_part(file, parts[column], LARGEST_TEXT + 1) if column in parts
                                            else None for column in self.captions])
            return Sample(decode(io.BytesIO(image), data), split, None, captions, cut)

    def index(self, file: BinaryIO) -> tuple[dict[str, Parts], list[tuple[str, str]], set[str]]:
        """The samples of a tar by key, in its order; refused members (no name: the tar itself) with reasons; and the
        kinds of the others. Rejected if it is no tar."""
        samples: dict[str, Parts] = {}
        refused: list[tuple[str, str]] = []
        kinds: set[str] = set()
        for member in members(file):
            if member.refused:
                refused.append((member.name, member.refused))
                continue
            name = PurePosixPath(member.name)
            stem, _, kind = name.name.partition(".")
            kinds.add(kind)
            if part := self.part_of(kind):
                parts = samples.setdefault(str(name.parent / stem), {})
                if part in parts:
                    refused.append((member.name, "duplicate key"))
                else:
                    parts[part] = member.start, member.size
        return samples, refused, kinds

    def part_of(self, kind: str) -> str | None:
        """Which part of a sample a member of this kind is: IMAGE, a column of captions, or None."""
        if kind in self.captions:
            return kind
        name, _, ending = kind.rpartition(".")
        if kind == self.image or (ending.lower() in IMAGE_ENDINGS and (name or "jpg") == self.image):
            return IMAGE
        return None


def read_part(file: BinaryIO, part: tuple[int, int], limit: int | None = None) -> bytes:
    """A part of a sample, or its first `limit` bytes. Rejected if the tar ends before it does."""
    start, size = part
    file.seek(start)
    length = size if limit is None else min(size, limit)
    data = file.read(length)
    if len(data) < length:
        raise Rejected("cut: the tar ends inside it")
    return data
