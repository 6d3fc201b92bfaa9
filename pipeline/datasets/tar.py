"""The plain files in a tar, without trusting it: where each lies, read from headers alone. Nothing is extracted."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from pipeline.datasets import Rejected

LARGEST_HEADER = 2**20  # bytes; of a long name or extended header


@dataclass(frozen=True, slots=True)
class Member:
    """One member, or with an empty name what is wrong with the tar as a whole."""

    name: str
    start: int = 0  # bytes from the beginning of the tar
    size: int = 0  # bytes; of the last member of a cut tar perhaps more than there are
    refused: str | None = None  # why it cannot be used


class Headers:
    """What of a tar the search for its members may read: a header names its own size, which it may claim to be any."""

    name, mode = "", "rb"

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)


def members(file: BinaryIO) -> Iterator[Member]:
    """Everything in a tar but folders, and at the end a nameless one if it is damaged or cut. Rejected if it is no tar.
    `file` may be moved meanwhile: tarfile seeks before it reads."""
    file.seek(0)
    try:
        tar = tarfile.TarFile(fileobj=Headers(file))  # type: ignore[arg-type]
    except Exception as error:  # of a damaged header it may raise anything
        raise Rejected(f"not a tar, or a compressed one: {error}") from None
    place = -1
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all
            if member.size < 0 or member.offset <= place:
                raise tarfile.ReadError("a header that leads back")
            place = member.offset
            refused = refusal(member)
            if refused or not member.isdir():
                yield Member(member.name, member.offset_data, member.size, refused)
        file.seek(tar.offset)
        end = file.read(2**16)  # beyond its padding, where another tar might have been appended
        if not end or any(end):
            raise tarfile.ReadError("no end mark, or something after it")
    except Exception as error:
        yield Member("", refused=f"damaged or cut at byte {tar.offset:,}, what follows is lost: {error}")


def refusal(member: tarfile.TarInfo) -> str | None:
    """Why a member cannot be used, if its header is enough to see that."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        return "a name that leads out of the tar"
    try:
        member.name.encode()
    except UnicodeEncodeError:
        return "a name that is not UTF-8"
    if not member.isdir() and (not member.isreg() or member.issparse()):
        return "no plain file: a link, a device or a sparse file"
    return None
