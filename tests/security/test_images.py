"""Images whose headers announce more than they hold, and folders and tars that lead elsewhere or nowhere."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.datasets import Rejected, Source, work
from pipeline.datasets.files import files_below
from pipeline.datasets.tar import LARGEST_HEADER, members
from pipeline.prompts import PromptFile
from pipeline.stage import Stage
from pipeline.stages import prompts as prompts_stage
from pipeline.stages.sample import load_prompts
from pipeline.storage import Storage
from pixelgen import cli
from pixelgen.config import ConfigError
from pixelgen.errors import FileError
from pixelgen.metrics.geneval import LARGEST, PromptedImage, Rules, evaluate_image, list_images
from pixelgen.prompts import read_prompts
from tests.pipeline.folders import (
    encoded,
    folder_params,
    make_run,
    make_tar,
    only,
    pairs,
    params_of,
    picture,
    png_claiming,
    tasks_of,
)
from tests.security.hostile import peak_memory

HUGE = 60_000


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A sound PNG with one more chunk behind its header."""
    whole = encoded(picture(1))
    return whole[:33] + chunk(kind, data) + whole[33:]


def patched(kind: str, *changes: tuple[bytes, bytes]) -> bytes:
    data = encoded(picture(1), kind)
    for old, new in changes:
        assert old in data and len(old) == len(new)
        data = data.replace(old, new, 1)
    return data


W, H = 48, 40  # of `picture`
BOMBS = {  # a size in the header that is no lie in form, and much text of little
    "x.png": png_claiming(HUGE, HUGE), "wide.png": png_claiming(2**31 - 1, 1),
    "below.png": png_claiming(13_000, 13_000),
    "x.jpg": patched("JPEG", (struct.pack(">HH", H, W), struct.pack(">HH", HUGE, HUGE))),
    "x.gif": patched("GIF", (struct.pack("<HH", W, H), struct.pack("<HH", HUGE, HUGE))),
    "x.bmp": patched("BMP", (struct.pack("<ii", W, H), struct.pack("<ii", HUGE, HUGE))),
    "x.tiff": patched("TIFF", (struct.pack("<HHII", 256, 4, 1, W), struct.pack("<HHII", 256, 4, 1, HUGE)),
                      (struct.pack("<HHII", 257, 4, 1, H), struct.pack("<HHII", 257, 4, 1, HUGE))),
    "x.webp": b"RIFF" + struct.pack("<I", 42) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + struct.pack(
        "<I", 16_382)[:3] * 2 + b"VP8L" + struct.pack("<I", 12) + b"\x2f\xfd\xbf\xff\x0f" + bytes(7),
    "text.png": with_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 27))),
    "profile.png": with_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 27))),
    "long.png": with_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(1 << 27))),
}


def test_bombs_are_refused_by_their_headers(tmp_path):
    """Each in a process that has decoded a sound image before, and hardly grows."""
    for name, data in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    picture(1).save(tmp_path / "0.sound.png")
    before = """
import sys
from pathlib import Path
from types import SimpleNamespace
from pipeline.datasets import Rejected
from pipeline.datasets.decoding import decode
from tests.pipeline.folders import folder_params
data = folder_params(Path("x"), max_megapixels=4.0)
paths = sorted(Path(sys.argv[1]).iterdir())
decode(paths.pop(0).open("rb"), data)
"""
    program = """
for path in paths:
    try:
        print(path.name, "decoded", decode(path.open("rb"), data).size)
    except Rejected as reason:
        print(path.name, "refused:", reason)
"""
    said, grown = peak_memory(program, str(tmp_path), before=before)
    outcome = dict(line.split(" ", 1) for line in said.splitlines())
    assert outcome.keys() == BOMBS.keys() and grown < 100
    assert all(text.startswith("refused: ") for text in outcome.values()), outcome


def test_no_file_is_read_that_is_longer_than_its_pixels_could_be(tmp_path):
    """Pillow reads a WebP whole: this one is a hole of a terabyte."""
    (tmp_path / "c").mkdir()
    picture(1).save(tmp_path / "c" / "a.png")
    (tmp_path / "c" / "b.webp").write_bytes(encoded(picture(1), "WEBP"))
    os.truncate(tmp_path / "c" / "b.webp", 2**40)
    data = folder_params(tmp_path)
    (task,) = tasks_of(data)
    loads = dict(only(data).read(data, task))
    assert loads["c/a.png"]().image.size == (W, H)
    with pytest.raises(Rejected, match="too large: an image of 1,099,511,627,776 bytes for 4.0 Mpx"):
        loads["c/b.webp"]()


# ---------------------------------------------------------------------------------------------------- GenEval


PROMPT = '{"tag": "colors", "prompt": "a red cup", "include": [{"class": "cup", "count": 1, "color": "red"}]}'


@pytest.mark.parametrize("data", [png_claiming(HUGE, HUGE), png_claiming(4097, 4096), BOMBS["text.png"]],
                         ids=["huge", "above the limit", "text"])
def test_images_to_judge_are_refused_by_their_headers(tmp_path, capsys, data):
    path = tmp_path / "00000" / "samples" / "0000.png"
    path.parent.mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text(PROMPT)
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"00000/samples/0000\.png: not a readable image: "):
        list_images(tmp_path)
    with pytest.raises(FileError, match=r"0000\.png: not a readable image: "):
        evaluate_image(PromptedImage(path, "x", {}), None, None, Rules())
    assert cli.main(["evaluate", "geneval", str(tmp_path), "--detector", "x", "--clip", "x"]) == 1
    assert "00000/samples/0000.png: not a readable image" in capsys.readouterr().err
    path.write_bytes(encoded(Image.new("1", (4096, LARGEST // 4096))))
    assert len(list_images(tmp_path)) == 1


def test_pipes_among_prompts_and_images_do_not_hang(tmp_path):
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    os.mkfifo(tmp_path / "00000" / "metadata.jsonl")
    with pytest.raises(FileError, match=r"00000/metadata\.jsonl: no such file"):
        list_images(tmp_path)
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ConfigError, match=r"a\.txt: no such file of prompts"):
            read_prompts(path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ConfigError, match=r"a\.txt: no such file of prompts"):
        read_prompts(tmp_path)


def test_a_prompt_cannot_say_where_its_images_go(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "name": "../../x"}\n{"name": "/etc", "prompt": "b", "tag": "c"}')
    monkeypatch.chdir(tmp_path)
    params = SimpleNamespace(prompts={"p": PromptFile("p.jsonl")})
    prompts_stage.run(Stage("prompts", "p", params, None, Storage(None)))
    found = load_prompts(tmp_path / "out/prompts/p/prompts.jsonl")
    assert [(p.name, p.text, p.metadata) for p in found] == [
        ("00000", "a", {"prompt": "a"}), ("00001", "b", {"prompt": "b", "tag": "c"})]
    (tmp_path / "...txt").write_text("its name would be ..")
    with pytest.raises(ConfigError, match=r"with a dot in front are no prompts: remove \.\.\.txt"):
        read_prompts(tmp_path)


# ----------------------------------------------------------------------------------------- folders, containers


def captioned(kind: str, path, image=None):
    options = {"path": str(path), "captions": {"txt": 1.0}} | ({"image": image} if image else {})
    return params_of(Source.of(kind)(**options))


def shards_of(data, run):
    """What the shard stage makes of a source -> keys of its rows, and the reasons of what is rejected."""
    rows, reasons = [], {}
    for number, task in enumerate(tasks_of(data)):
        work.write_job(work.Job(only(data).kind, number, task), data, Storage(None), run)
    for path in sorted((run / "shards").iterdir()):
        rows += pq.read_table(path)["key"].to_pylist()
    for path in sorted((run / "reports").iterdir()):
        reasons |= dict(work.read_report(Storage(None), run, path.stem)["rejected"])
    return [row.split("/", 1)[1] for row in rows], reasons


def test_a_tar_writes_nothing_and_follows_nothing(tmp_path):
    def special(kind, link=""):
        info = tarfile.TarInfo()
        info.type, info.linkname = kind, link
        return info

    secret = tmp_path / "secret.txt"
    secret.write_text("a secret caption")
    image = encoded(picture(1))
    make_tar(tmp_path / "in" / "t.tar", [
        *pairs(1), (str(tmp_path / "made.jpg"), image), ("../made.jpg", image), ("a/../../made.txt", b"x"),
        ("2.jpg", image), ("2.txt", special(tarfile.SYMTYPE, str(secret))), ("3.jpg", image),
        ("3.txt", special(tarfile.LNKTYPE, str(secret))), ("4.jpg", special(tarfile.LNKTYPE, "0001.jpg")),
        ("4.txt", special(tarfile.CHRTYPE)), ("5.txt", special(tarfile.FIFOTYPE)), ("6.txt", special(tarfile.BLKTYPE)),
        ("up", special(tarfile.SYMTYPE, "..")), ("up/7.jpg", image), ("up/7.txt", b"x")])
    before = set(tmp_path.rglob("*"))
    rows, reasons = shards_of(captioned("webdataset", tmp_path / "in", "jpg"), make_run(tmp_path / "run"))
    assert sorted(rows) == ["t.tar/0001", "t.tar/up/7"]
    assert len(reasons) == 12  # 10 members, and 2 images without their captions
    new = set(tmp_path.rglob("*")) - before
    assert all(p.is_relative_to(tmp_path / "run") for p in new) and secret.read_text() == "a secret caption"
    assert not any(b"secret" in p.read_bytes() for p in (tmp_path / "run/shards").iterdir())


def test_a_tar_ends_where_its_file_ends(tmp_path):
    whole = bytearray(make_tar(tmp_path / "in" / "t.tar", pairs(1, 2)).read_bytes())
    start = whole.index(b"0002.jpg")
    whole[start + 124:start + 136] = b"\x80" + (2**60).to_bytes(11)
    whole[start + 148:start + 156] = b" " * 8
    whole[start + 148:start + 156] = b"%06o\0 " % sum(whole[start:start + 512])
    (tmp_path / "in" / "t.tar").write_bytes(whole)
    rows, reasons = shards_of(captioned("webdataset", tmp_path / "in", "jpg"), make_run(tmp_path / "run"))
    assert rows == ["t.tar/0001"] and "what follows is lost" in reasons["webdataset/t.tar"]
    assert "no caption" in reasons["webdataset/t.tar/0002"] or "too large" in reasons["webdataset/t.tar/0002"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_is_not_read_whatever_its_size(tmp_path, kind):
    class Watched(io.FileIO):
        largest = 0

        def read(self, size=-1):
            self.largest = max(self.largest, 2**60 if size < 0 else size)
            return super().read(size)

    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 2**40
    (tmp_path / "t.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "t.tar", 2**41)
    with Watched(tmp_path / "t.tar") as file, pytest.raises(Rejected, match="a header of 1,099,511,627,776 bytes"):
        list(members(file))
    assert file.largest <= LARGEST_HEADER


def test_a_folder_with_pipes_and_ways_out_is_read_to_its_end(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for name, data in {"a.png": encoded(picture(1)), "a.txt": b"a", "b.png": encoded(picture(2)), "d.txt": b"d",
                       "e.png": encoded(picture(3))}.items():
        (root / name).write_bytes(data)
    (tmp_path / "secret.txt").write_text("secret")
    picture(4).save(tmp_path / "secret.png")
    os.mkfifo(root / "b.txt")
    os.mkfifo(root / "c.png")
    (root / "c.txt").write_text("c")
    (root / "d.png").symlink_to(tmp_path / "secret.png")
    (root / "e.txt").symlink_to("../secret.txt")
    (root / "out").symlink_to(tmp_path)
    rows, reasons = shards_of(captioned("text_folder", root), make_run(tmp_path / "run"))
    assert rows == ["a.png"]
    assert {key: reason[:12] for key, reason in reasons.items()} == {
        "text_folder/b.png": "no file: a b", "text_folder/c.png": "no file: a b", "text_folder/d.png": "a link that ",
        "text_folder/e.png": "a link that "}


def test_folders_may_be_deeper_than_python_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "e"):
        (tmp_path / name).touch()
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("x").touch()
    os.chdir(tmp_path)
    try:
        assert [entry.name for entry in files_below(".")] == ["b", "x", "e"]
    finally:  # whoever tidies up would recurse, too
        os.chdir("/".join("d" * 1200))
        os.unlink("x")
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")


def test_a_parquet_file_has_no_more_rows_than_bytes(tmp_path):
    """Each row of a damaged group becomes a line of the quarantine."""
    columns = {"image": pa.nulls(10**7, pa.binary()), "txt": pa.nulls(10**7, pa.string())}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "p.parquet")
    size = (tmp_path / "in" / "p.parquet").stat().st_size
    rows, reasons = shards_of(captioned("parquet", tmp_path / "in", "image"), make_run(tmp_path / "run"))
    assert rows == [] and reasons == {
        "parquet/p.parquet": f"no Parquet file: claims 10,000,000 rows in {size:,} bytes"}
