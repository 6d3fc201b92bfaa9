"""Folders of images for tests: small, made on the spot, some of them hostile."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.datasets import DatasetParams, Item, Sample, Source, Task
from pipeline.datasets.image_folder import ImageFolder
from pipeline.storage import Storage

SIZE = 32  # of the shards


def params_of(source: Source, **changes) -> DatasetParams:
    """A dataset of one source, named as its kind."""
    values = {"sources": {source.kind: source}, "image_sizes": (SIZE,), "crop": "adm", "encoding": "png",
              "rows_per_shard": 4, "heldout": 0.0, "max_quarantined": 0.0, "max_megapixels": 4.0, "seed": 0}
    return DatasetParams(**values | changes)


def folder_params(path: Path, **changes) -> DatasetParams:
    return params_of(ImageFolder(str(path)), **changes)


def only(data: DatasetParams) -> Source:
    """The one source of a dataset."""
    (source,) = data.sources.values()
    return source


def listing(data: DatasetParams) -> tuple[list[str] | None, list[Item]]:
    return only(data).listing(data)


def load_item(data: DatasetParams, item: Item) -> Sample:
    return only(data).load(data, item)


def tasks_of(data: DatasetParams) -> list[Task]:
    return only(data).tasks(data)[1]


def make_run(path: Path) -> Path:
    """An empty run directory of the shard stage."""
    for name in ("shards", "reports"):
        (path / name).mkdir(parents=True)
    return path


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth RGB picture, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_plain(root: Path, classes: int = 2, each: int = 6) -> Path:
    """Nothing wrong with it: `classes` folders of `each` PNG files."""
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for n in range(each):
            picture(100 * label + n).save(root / f"class{label}" / f"{n:03}.png")
    return root


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header announces width×height pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def make_good(folder: Path) -> list[str]:
    """Images of every kind that must be accepted -> their paths in `folder`."""
    folder.mkdir(parents=True)
    (folder / "deep" / "x.jpg").mkdir(parents=True)  # a folder, whatever its name says
    base = picture(1)
    base.save(folder / "plain.jpg")
    base.convert("L").save(folder / "grey.jpg")
    base.convert("1").save(folder / "bits.png")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.save(folder / "deep" / "x.jpg" / "nested.webp")
    base.save(folder / "png named.JPEG", "PNG")
    base.save(folder / "naïve ☃\n\t'\".bmp")
    base.resize((20, 9)).save(folder / "small.tiff")
    base.resize((SIZE, SIZE)).save(folder / "exact.png")
    clear = base.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(base.size))
    clear.save(folder / "rgba.png")
    base.quantize(8).save(folder / "palette.png", transparency=0)
    Image.fromarray(np.linspace(0, 65535, 48 * 40).astype(np.uint16).reshape(40, 48)).save(folder / "sixteen.png")
    red, blue = (Image.new("RGB", (48, 40), colour) for colour in ("red", "blue"))
    red.save(folder / "animated.gif", save_all=True, append_images=[blue])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    base.save(folder / "rotated.jpg", exif=exif)
    (folder / "link.jpg").symlink_to("plain.jpg")
    return sorted(os.path.relpath(path, folder) for path in folder.rglob("*") if path.is_file())


def make_bad(folder: Path, outside: Path) -> dict[str, str]:
    """Files that must be rejected -> what the reason must match, by path in `folder`. `outside` gets a file."""
    folder.mkdir(parents=True)
    outside.mkdir(parents=True)
    base = picture(2, 120, 90)
    for name in ("cut.jpg", "cut.png", "cut.gif", "cut.webp", "cut.bmp", "cut.tiff"):
        base.save(folder / name)
        os.truncate(folder / name, (folder / name).stat().st_size * 2 // 3)
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("this is no image\n")
    (folder / ".DS_Store").write_bytes(bytes(100))
    (folder / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n%%EndComments\nshowpage\n")
    base.resize((1, 1)).save(folder / "dot.png")
    base.resize((SIZE // 4 - 1, 100)).save(folder / "narrow.png")
    (folder / "bomb.png").write_bytes(png_claiming(60_000, 60_000))
    (folder / "large.png").write_bytes(png_claiming(2001, 2000))
    (folder / "huge when enlarged.png").write_bytes(png_claiming(SIZE // 4, 40_000))
    Image.fromarray(np.zeros((40, 48), np.float32)).save(folder / "float.tiff")
    base.save(outside / "secret.png")
    (folder / "out.png").symlink_to(outside / "secret.png")
    (folder / "broken.png").symlink_to("nowhere.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "aside").mkdir()
    (folder / "aside.png").symlink_to("aside")
    base.save(os.fsencode(folder) + b"/latin\xe9.png")
    os.mkfifo(folder / "pipe.png")
    cut, none, unknown = "truncated|decoder", "no file", "not an image"
    return {**{f"cut.{ending}": cut for ending in ("jpg", "png", "gif", "webp", "bmp", "tiff")},
            "empty.jpg": unknown, "text.jpg": unknown, ".DS_Store": unknown, "page.eps": unknown,
            "dot.png": "too small: 1×1", "narrow.png": "too small: 7×100", "bomb.png": "DecompressionBomb",
            "large.png": "too large: 2001×2000", "huge when enlarged.png": "too large: 8×40000", "float.tiff": "mode F",
            "out.png": "leaves the folder", "broken.png": none, "circle.png": f"{none}|loop", "aside.png": none,
            "latin\udce9.png": "UnicodeEncodeError", "pipe.png": none}


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def make_tar(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]]) -> Path:
    """A tar of files with these names and contents, or of members made elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def pairs(*numbers: int) -> list[tuple[str, bytes]]:
    """Members of good samples: 0007.jpg, 0007.txt, …"""
    return [member for n in numbers
            for member in ((f"{n:04}.jpg", encoded(picture(n), "JPEG")), (f"{n:04}.txt", f"picture {n}".encode()))]


def split_of(directory, *which, **of):
    """A split of the dataset that lies in `directory`."""
    return Storage(None).open(directory, "dataset").split(*which, **of)
