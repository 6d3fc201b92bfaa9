"""Sources of captioned images: what they list, what they refuse, and what becomes of every kind of sample."""

import dataclasses
import gzip
import io
import os
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.datasets import DatasetError, DatasetParams, Rejected, Sample, Skipped, Source, Task, captions, work
from pipeline.datasets.parquet import Parquet
from pipeline.datasets.tar import members
from pipeline.datasets.text_folder import TextFolder
from pipeline.datasets.webdataset import WebDataset
from pipeline.stages import shard
from pipeline.storage import Storage
from pixelgen.data.shards import SCHEMA, decode
from tests.pipeline.folders import (
    encoded,
    make_run,
    make_tar,
    only,
    pairs,
    params_of,
    picture,
    png_claiming,
    split_of,
    tasks_of,
)


def of(kind: str, path: Path, captions=("txt",), image=None, **changes) -> DatasetParams:
    options = {"path": str(path), "captions": {c: 1.0 for c in captions}} | ({"image": image} if image else {})
    return params_of(Source.of(kind)(**options), **changes)


def outcome(data: DatasetParams) -> tuple[dict[str, list[str | None]], dict[str, list[str]], int]:
    """Captions of each sample that is read, by key; the keys that are rejected, with reasons; how many are skipped."""
    read, rejected, skipped = {}, {}, 0
    for task in tasks_of(data):
        for key, load in only(data).read(data, task):
            try:
                sample = load()
            except Rejected as reason:
                rejected.setdefault(key, []).append(str(reason))
            except Skipped:
                skipped += 1
            else:
                assert key not in read and sample.image.mode == "RGB" and sample.label is None
                read[key] = sample.captions
    return read, rejected, skipped


# ---------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(("raw", "text"), [
    (b"a cat", "a cat"), (b"  a \t\r\n cat \x0b", "a cat"), (b"", None), (b" \n\x00", None),
    (b"a\x00 c\x07at\x7f", "a cat"),
    ("a\u2028cat\u2029\u3000on\x85a\x1cmat".encode(), "a cat on a mat"), ("\u200d".encode(), None),
    ("\ufeffa\u200b c\u202eat\u00ad".encode(), "a cat"), ("👩\u200d🎨 naïve ☃".encode(), "👩\u200d🎨 naïve ☃"),
    ("می\u200cخواهم".encode(), "می\u200cخواهم")])
def test_captions_become_plain_text(raw, text):
    assert captions.clean_caption(raw) == (text, False)


def test_long_captions_are_cut_at_a_word():
    assert captions.clean_caption(b"word " * 800 + b"w" * 999) == (("word " * 800).strip(), True)
    assert captions.clean_caption(b"x" * 4000) == ("x" * 4000, False)
    assert captions.clean_caption(b"x" * 4001) == ("x" * 4000, True)
    assert captions.clean_caption(b"x" * 4000 + b" y") == ("x" * 4000, True)


def test_bytes_that_are_no_caption_are_rejected():
    for raw in (b"caf\xe9", "a".encode("utf-16"), b"\xed\xa0\x80", b"\xc0\x80"):
        with pytest.raises(Rejected, match="^caption is not UTF-8$"):
            captions.clean_caption(raw)
    with pytest.raises(Rejected, match="more than 1,000,000 bytes"):
        captions.clean_caption(b"x" * 1_000_001)
    with pytest.raises(Rejected, match="^no caption$"):
        captions.clean_captions([None, b" ", b""])
    assert captions.clean_captions([None, b" ", b"a", b"x" * 5000]) == ([None, None, "a", "x" * 4000], 1)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
                 st.text("a \n\u2029\x00", min_size=3990, max_size=4030).map(str.encode)))
def test_any_bytes_are_a_clean_caption_or_rejected(raw):
    try:
        text, _ = captions.clean_caption(raw)
    except Rejected:
        return
    if text is not None:
        assert 0 < len(text) <= 4000 and text == " ".join(text.split())
        assert not any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)
        assert captions.clean_caption(text.encode()) == (text, False)


# -------------------------------------------------------------------------------------------------- webdataset


def special(kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, link
    return info


def test_a_hostile_tar_costs_only_what_is_bad(tmp_path):
    rgba = picture(1).convert("RGBA")
    sixteen = Image.fromarray(np.linspace(0, 65535, 48 * 40).astype(np.uint16).reshape(40, 48))
    good = {"0001": "picture 1", "deep/er/0002": "two", "dot": "after ./", "rgba": "x", "cmyk": "x", "gif": "x",
            "grey": "x", "apart": "its text stands elsewhere", "long": "x" * 4000}
    text = b"x"
    make_tar(tmp_path / "a" / "t.tar", [
        *pairs(1), ("deep", special(tarfile.DIRTYPE)), ("deep/er/0002.png", encoded(picture(2))),
        ("deep/er/0002.txt", b"two\n"), ("./dot.webp", encoded(picture(3), "WEBP")), ("./dot.txt", b"after ./"),
        ("rgba.png", encoded(rgba)), ("rgba.txt", text), ("cmyk.JPG", encoded(picture(4).convert("CMYK"), "JPEG")),
        ("cmyk.txt", text), ("gif.jpg", encoded(picture(5).quantize(8), "GIF")), ("gif.txt", text),
        ("grey.jpg", encoded(sixteen)), ("grey.txt", text), ("apart.jpg", encoded(picture(6), "JPEG")),
        ("long.jpg", encoded(picture(8))), ("long.txt", b"x" * 9000), ("README.md", b"hello"), ("0001.json", b"{}"),
        ("._0001.jpg", b"rubbish"),
        # from here on all is lost, and said to be
        ("0001.png", encoded(picture(9))), ("0001.txt", b"again"), ("/abs.jpg", b"?"), ("../up.jpg", b"?"),
        ("a/../../up.txt", b"?"), ("soft.jpg", special(tarfile.SYMTYPE, "/etc/passwd")),
        ("hard.jpg", special(tarfile.LNKTYPE, "0001.jpg")), ("device.jpg", special(tarfile.CHRTYPE)),
        ("pipe.jpg", special(tarfile.FIFOTYPE)), ("sparse.jpg", special(tarfile.GNUTYPE_SPARSE)),
        ("latin\udce9.jpg", b"?"),
        ("dot1.jpg", encoded(picture(1, 1, 1))), ("dot1.txt", text), ("narrow.jpg", encoded(picture(1, 31, 90))),
        ("narrow.txt", text), ("bomb.png", png_claiming(60_000, 60_000)), ("bomb.txt", text),
        ("large.png", png_claiming(2001, 2000)), ("large.txt", text),
        ("broken.jpg", encoded(picture(1), "JPEG")[:400]), ("broken.txt", text),
        ("rubbish.jpg", b"no image"), ("rubbish.txt", text),
        ("empty.jpg", b""), ("empty.txt", text), ("heavy.jpg", bytes(int(4e6 * 8) + 2**20 + 1)), ("heavy.txt", text),
        ("alone.jpg", encoded(picture(1))),
        ("blank.jpg", encoded(picture(1))), ("blank.txt", b" \n\x00"), ("orphan.txt", b"no image here"),
        ("latin.jpg", encoded(picture(1))), ("latin.txt", b"caf\xe9"), ("huge.jpg", encoded(picture(1))),
        ("huge.txt", b"x" * 1_000_001), ("apart.txt", b"its text stands elsewhere")])
    read, rejected, skipped = outcome(of("webdataset", tmp_path, image="jpg"))
    assert read == {f"a/t.tar/{key}": [text] for key, text in good.items()} and skipped == 2
    reasons = {"0001.png": "duplicate key", "0001.txt": "duplicate key", "latin\udce9.jpg": "a name that is not UTF-8",
               "blank": "no caption", "alone": "no caption", "orphan": "no image", "latin": "caption is not UTF-8",
               "huge": "caption of more than 1,000,000 bytes", "bomb": "DecompressionBomb", "large": "too large: 2001",
               "heavy": "too large: an image of 33,048,577 bytes", "broken": "OSError|truncated",
               "rubbish": "not an image", "empty": "not an image"}
    reasons |= dict.fromkeys(("/abs.jpg", "../up.jpg", "a/../../up.txt"), "a name that leads out")
    reasons |= dict.fromkeys(("soft.jpg", "hard.jpg", "device.jpg", "pipe.jpg", "sparse.jpg"), "no plain file")
    assert rejected.keys() == {f"a/t.tar/{name}" for name in reasons}
    for name, reason in reasons.items():
        (found,) = rejected[f"a/t.tar/{name}"]
        assert any(part in found for part in reason.split("|")), (name, found)


@pytest.mark.parametrize(("image", "names"), [
    ("jpg", ["1.jpg", "1.jpeg", "1.PNG", "1.webp"]), ("output_image", ["1.output_image", "1.output_image.jpg"]),
    ("png", ["1.png"])])
def test_an_image_has_its_name_with_or_without_an_ending(tmp_path, image, names):
    for name in names:
        make_tar(tmp_path / name / "t.tar", [(name, encoded(picture(1))), ("1.input_prompt", b"say"),
                                             ("1.other.jpg", b"another"), ("1.note", b"passed over")])
        read, rejected, _ = outcome(of("webdataset", tmp_path / name, ("input_prompt",), image))
        assert read == {"t.tar/1": ["say"]} and not rejected


def test_captions_stand_in_the_order_of_the_parameters_with_null_for_none(tmp_path):
    make_tar(tmp_path / "t.tar", [*pairs(1, 2), ("0002.long.txt", b"longer"), ("0002.short", b" ")])
    read, _, _ = outcome(of("webdataset", tmp_path, ("short", "txt", "long.txt"), "jpg"))
    assert read == {"t.tar/0001": [None, "picture 1", None], "t.tar/0002": [None, "picture 2", "longer"]}


def test_what_lies_before_a_cut_is_kept(tmp_path):
    whole = make_tar(tmp_path / "whole" / "t.tar", pairs(1, 2, 3)).read_bytes()
    with tarfile.open(tmp_path / "whole" / "t.tar") as tar:
        ends = [m.offset_data + m.size for m in tar.getmembers()]
        starts = [m.offset for m in tar.getmembers()]
    cut = tmp_path / "cut" / "t.tar"
    cut.parent.mkdir()
    for length in (*range(600, ends[-1], 512), *ends, *(e - 1 for e in ends), *starts[1:]):
        cut.write_bytes(whole[:length])
        present = [e <= length for e in ends]
        read, rejected, _ = outcome(of("webdataset", cut.parent, image="jpg"))
        begun = sum(s + 512 <= length for s in starts)  # members of which there is a header
        assert len(read) == sum(a and b for a, b in zip(present[::2], present[1::2], strict=True))
        assert len(read) + len(rejected) - 1 == -(-begun // 2)
        assert ["what follows is lost" in rejected["t.tar"][0]] == [True] and "cut at byte" in rejected["t.tar"][0]
        if begun and not present[begun - 1]:
            assert rejected[f"t.tar/{(begun + 1) // 2:04}"] == ["cut: the tar ends inside it"]
    cut.write_bytes(whole[:starts[2]] + b"\xff" * 512 + whole[starts[3]:])  # a header that is none
    assert outcome(of("webdataset", cut.parent, image="jpg"))[0].keys() == {"t.tar/0001"}
    cut.write_bytes(whole + whole)  # two in one: the second would be passed over in silence
    assert "end mark" in outcome(of("webdataset", cut.parent, image="jpg"))[1]["t.tar"][0]


def test_what_is_no_tar_is_one_line_of_quarantine(tmp_path):
    whole = make_tar(tmp_path / "z.tar", pairs(1)).read_bytes()
    for name, content in {"a": b"", "b": b"no tar at all" * 99, "c": gzip.compress(whole), "d": whole[:100]}.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    (tmp_path / "e.tar").symlink_to("/etc/passwd")
    (tmp_path / "f.tar").write_bytes(bytes(10240))  # a tar without members
    read, rejected, _ = outcome(of("webdataset", tmp_path, image="jpg"))
    assert read.keys() == {"z.tar/0001"}
    assert {key: reason[0][:9] for key, reason in rejected.items()} == {
        "a.tar": "not a tar", "b.tar": "not a tar", "c.tar": "not a tar", "d.tar": "not a tar", "e.tar": "a link th"}


def test_a_folder_that_cannot_be_what_is_meant_is_refused_up_front(tmp_path):
    with pytest.raises(DatasetError, match=f"{tmp_path}/no: No such file or directory; path must be a readable folder"):
        tasks_of(of("webdataset", tmp_path / "no", image="jpg"))
    (tmp_path / "x.tgz").touch()
    with pytest.raises(DatasetError, match=f"{tmp_path} has no .tar files at any depth: correct path"):
        tasks_of(of("webdataset", tmp_path, image="jpg"))
    make_tar(tmp_path / "deep" / "a.tar", pairs(1))
    with pytest.raises(DatasetError, match=r"deep/a.tar has no member of kind output_image; there are: jpg, txt;"):
        tasks_of(of("webdataset", tmp_path, image="output_image"))
    with pytest.raises(DatasetError, match=r"deep/a.tar has no member of kind caption; there are: jpg, txt; correct"):
        tasks_of(of("webdataset", tmp_path, ("txt", "caption"), "jpg"))


def test_headers_made_to_lead_astray_end_the_tar(tmp_path):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as out:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.txt")
            info.pax_headers = {"size": "-1536"} if n == 1 else {}  # back to its own header, for ever
            out.addfile(info, io.BytesIO())
    found = list(members(tar))
    assert [m.name for m in found] == ["0.txt", ""] and "leads back" in found[-1].refused
    deep = make_tar(tmp_path / "t.tar", [("0.txt", b""), *[("x", special(tarfile.XHDTYPE))] * 3000, ("1.txt", b"")])
    with deep.open("rb") as file:  # each header is read inside the one before it
        found = list(members(file))
    assert [m.name for m in found] == ["0.txt", ""] and "recursion" in found[-1].refused


WHOLE: list[bytes] = []


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_tars_are_read_or_rejected_and_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged" / "t.tar"
    if not WHOLE:
        WHOLE.append(make_tar(path, [("a" * 150 + ".jpg", encoded(picture(1, 32, 32))), ("a" * 150 + ".txt", b"long"),
                                     *((f"{n}.{k}", encoded(picture(n, 32, 32)) if k == "jpg" else b"t")
                                       for n in range(3) for k in ("jpg", "txt"))]).read_bytes())
    raw = bytearray(WHOLE[0])
    for _ in range(data.draw(st.integers(0, 6))):
        block = 512 * data.draw(st.integers(0, len(raw) // 512 - 1))
        raw[block + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):  # repair the checksum, or hardly any damage would be seen as a header
            raw[block + 148:block + 156] = b" " * 8
            raw[block + 148:block + 156] = b"%06o\0 " % sum(raw[block:block + 512])
    path.write_bytes(raw[:data.draw(st.integers(0, len(raw)))])
    try:
        read, rejected, skipped = outcome(of("webdataset", path.parent, image="jpg"))
    except DatasetError as error:
        assert "has no member of kind" in str(error)
    else:
        assert len(read) <= 4 and all(all(reasons) for reasons in rejected.values()) and skipped <= 4


# ----------------------------------------------------------------------------------------------------- parquet


def write(path: Path, columns: dict, types: dict | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: values if isinstance(values, pa.Array) else pa.array(values, (types or {}).get(name))
              for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path, **options)
    return path


@pytest.mark.parametrize("kind", ["bytes", "struct", "large"])
def test_rows_with_an_image_and_a_caption_are_read(tmp_path, kind):
    images = [encoded(picture(n)) for n in range(3)] + [None, b"", b"no image", encoded(picture(1, 9, 99))]
    column = {"bytes": images, "large": pa.array(images, pa.large_binary()),
              "struct": [{"bytes": i, "path": "x"} for i in images[:6]] + [{"bytes": images[6], "path": None}]}[kind]
    text = pa.large_string() if kind == "large" else pa.string()
    write(tmp_path / "deep" / "p.parquet", {"id": list(range(7)), "long": ["a", None, None, "b", "c", "d", "e"],
                                           "image": column, "short": ["x", "y ", " ", "", "", "", ""]},
          {"long": text, "short": text}, row_group_size=2)
    read, rejected, skipped = outcome(of("parquet", tmp_path, ("short", "long"), "image"))
    assert read == {"deep/p.parquet/0": ["x", "a"], "deep/p.parquet/1": ["y", None]} and skipped == 1
    assert {key[-1]: reason[0][:12] for key, reason in rejected.items()} == {
        "2": "no caption", "3": "no image", "4": "not an image", "5": "not an image"}


def test_a_struct_that_is_null_is_a_missing_image(tmp_path):
    write(tmp_path / "p.parquet", {"image": [{"bytes": encoded(picture(1)), "path": None}, None], "txt": ["a", "b"]})
    read, rejected, _ = outcome(of("parquet", tmp_path, image="image"))
    assert read == {"p.parquet/0": ["a"]} and rejected == {"p.parquet/1": ["no image"]}


def test_strings_that_are_not_utf8_cost_only_their_row(tmp_path):
    texts = pa.array([b"caf\xe9", b"ok"], pa.binary()).view(pa.string())
    write(tmp_path / "p.parquet", {"image": [encoded(picture(1))] * 2, "txt": texts})
    read, rejected, _ = outcome(of("parquet", tmp_path, image="image"))
    assert read == {"p.parquet/1": ["ok"]} and rejected == {"p.parquet/0": ["caption is not UTF-8"]}


@pytest.mark.parametrize(("columns", "says"), [
    ({"img": [b""], "txt": ["a"]}, "p.parquet has 0 columns 'image'; there are: img, txt; correct image and captions"),
    ({"image": [b""], "text": ["a"]}, "p.parquet has 0 columns 'txt'; there are: image, text; correct"),
    ({"image": ["a.jpg"], "txt": ["a"]}, "column 'image' must hold bytes, or a struct with bytes, not string"),
    ({"image": [{"path": "x"}], "txt": ["a"]}, "column 'image' must hold bytes, .*, not struct"),
    ({"image": [{"bytes": [1]}], "txt": ["a"]}, "column 'image' must hold bytes, .*, not list"),
    ({"image": [b""], "txt": [["a"]]}, "column 'txt' must hold strings, not list"),
    ({"image": [b""], "txt": [7]}, "column 'txt' must hold strings, not int64")])
def test_columns_are_checked_up_front(tmp_path, columns, says):
    write(tmp_path / "a.parquet", {"image": [b""], "txt": ["a"]})
    write(tmp_path / "p.parquet", columns)
    with pytest.raises(DatasetError, match=says):
        tasks_of(of("parquet", tmp_path, image="image"))


def test_a_folder_without_a_row_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"has no \.parquet files at any depth"):
        tasks_of(of("parquet", tmp_path, image="image"))
    write(tmp_path / "p.parquet", {"image": [], "txt": []}, {"image": pa.binary(), "txt": pa.string()})
    with pytest.raises(DatasetError, match=r"none of its \.parquet files has a row"):
        tasks_of(of("parquet", tmp_path, image="image"))


def test_damaged_parquet_costs_its_rows_and_each_is_counted(tmp_path):
    columns = {"image": [encoded(picture(n)) for n in range(40)], "txt": [f"t{n}" for n in range(40)]}
    path = write(tmp_path / "p.parquet", columns, row_group_size=10, compression="zstd", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw[place:place + 300] = b"\xff" * 300
    path.write_bytes(raw)
    (tmp_path / "q.parquet").write_bytes(raw[:1000])
    data = of("parquet", tmp_path, image="image")
    assert [task.samples for task in tasks_of(data)] == [40, 1]
    read, rejected, _ = outcome(data)
    assert read.keys() == {f"p.parquet/{n}" for n in range(40) if not 10 <= n < 20}
    assert rejected.keys() == {f"p.parquet/{n}" for n in range(10, 20)} | {"q.parquet"}
    assert "damaged row group" in rejected["p.parquet/10"][0] and "no Parquet file" in rejected["q.parquet"][0]


# ------------------------------------------------------------------------------------------------- text_folder


def test_a_folder_of_pairs_and_what_is_no_pair(tmp_path):
    root = tmp_path / "data"
    (root / "deep" / "er").mkdir(parents=True)
    files = {"a.jpg": encoded(picture(1), "JPEG"), "a.txt": b"a", "a.png": encoded(picture(1)), "deep/er/v1.2 b.PNG":
             encoded(picture(2)), "deep/er/v1.2 b.txt": b"b", "deep/er/v1.2 b.long.txt": b"bb", "alone.webp": b"?",
             "orphan.txt": b"?", "blank.gif": b"?", "blank.txt": b" ", "latin.jpg": b"?", "latin.txt": b"\xe9",
             "small.jpg": encoded(picture(1, 9, 9)), "small.txt": b"s", "rubbish.jpg": b"?", "rubbish.txt": b"r",
             "README.md": b"passed over", "huge.jpg": encoded(picture(1)), "huge.txt": b"x" * 1_000_001}
    for name, content in files.items():
        (root / name).write_bytes(content)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.jpg").symlink_to("a.jpg")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    read, rejected, skipped = outcome(of("text_folder", root, ("txt", "long.txt")))
    assert read == {"a.jpg": ["a", None], "deep/er/v1.2 b.PNG": ["b", "bb"]} and skipped == 1
    assert {key: reason[0][:20] for key, reason in rejected.items()} == {
        "a.png": "duplicate key", "alone.webp": "no caption", "orphan.txt": "no image", "blank.gif": "no caption",
        "latin.jpg": "caption is not UTF-8", "rubbish.jpg": "not an image, or non", "link.jpg": "a link that leaves t",
        "huge.jpg": "caption of more than"}


def test_a_run_goes_on_only_while_the_caption_files_are_the_same(shard_stage, tmp_path):
    for n in range(6):
        picture(n).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"file {n}")
    data = of("text_folder", tmp_path, rows_per_shard=2)
    with pytest.raises(KeyboardInterrupt):
        shard_stage(data, stop=2)
    (tmp_path / "3.txt").write_text("another caption")
    shard_stage(data)
    assert len(shard_stage.written) == 3
    texts = [row for path in paths(split_of(Path("out/shard/name"), "train")) for row in
             pq.read_table(path)["captions"].to_pylist()]
    assert ["another caption"] in texts and len(texts) == 6


def test_a_folder_without_a_pair_is_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.caption").touch()
    with pytest.raises(DatasetError, match=r"has no image with a text beside it \(\.txt\): correct path or captions"):
        tasks_of(of("text_folder", tmp_path))
    with pytest.raises(DatasetError, match="no: No such file or directory; path must be a readable folder"):
        tasks_of(of("text_folder", tmp_path / "no"))


# ------------------------------------------------------------------------------------------------ the whole way


def sized(n: int) -> Image.Image:
    """Too small, for the smaller of the sizes, for the larger, in turn."""
    side = (20, 40, 80)[n % 3]
    return picture(n, side, side + 7)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A dataset of three sources, each of 60 samples, 20 of them too small and some broken."""
    root = tmp_path_factory.mktemp("mixed")
    for number in range(3):
        make_tar(root / "tars" / f"{number}.tar", [member for n in range(20 * number, 20 * number + 20) for member in (
            (f"{n:03}.jpg", encoded(sized(n)) if n != 7 else b"?"), (f"{n:03}.txt", f"tar {n}".encode()))])
    (root / "tars" / "3.tar").write_bytes(b"no tar")
    write(root / "rows" / "p.parquet", {"image": [encoded(sized(n)) for n in range(60)],
                                        "long": [f"row {n} " * (900 if n == 4 else 1) for n in range(60)]})
    (root / "files").mkdir()
    for n in range(60):
        sized(n).save(root / "files" / f"{n}.png")
        (root / "files" / f"{n}.txt").write_text(f"file {n}" if n != 10 else "")
    sources = {"tars": WebDataset(str(root / "tars"), {"txt": 1.0}, "jpg"),
               "rows": Parquet(str(root / "rows"), {"long": 2.0}, "image"),
               "files": TextFolder(str(root / "files"), {"txt": 0.5})}
    return DatasetParams(sources, (32, 64), "plain", "png", 6, 0.2, 0.1, 4.0, 0)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_sources_of_captions_meet_in_one_dataset_and_nothing_is_lost_in_silence(shard_stage, mixed):
    manifest = shard_stage(mixed)
    out, keys = Path("out/shard/name"), set()
    assert manifest["classes"] is None and manifest["image_sizes"] == [32, 64]
    assert manifest["skipped"] == 60 and manifest["quarantined"] == 3
    assert list(manifest["sources"]) == ["tars", "rows", "files"]
    for name, lost in (("tars", 2), ("rows", 0), ("files", 1)):
        source = manifest["sources"][name]
        assert source["captions"] == mixed.sources[name].captions
        assert source["skipped"] == 20 and source["quarantined"] == lost and source["enlarged"] == 0
        assert source["captions_cut"] == (name == "rows")
        assert source["splits"]["train"]["rows"] + source["splits"]["heldout"]["rows"] + lost - (name == "tars") == 40
        for split in ("train", "heldout"):
            assert source["splits"][split]["per_class"] is None
            for part in source["splits"][split]["shards"]:
                assert part["path"].startswith(f"{name}-{split}-{part['size']}-") and part["rows"] <= 6
                table = pq.read_table(out / part["path"])
                assert table.schema.equals(SCHEMA) and len(table) == part["rows"]
                for row in table.to_pylist():
                    assert row["key"].startswith(f"{name}/") and row["key"] not in keys and row["label"] is None
                    keys.add(row["key"])
                    number = int(row["captions"][0].split()[1])
                    assert number % 3 == (1 if part["size"] == 32 else 2)
                    assert decode(row["image"]).shape == (part["size"], part["size"], 3)
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 3


def paths(split):
    return [str(shard.file) for shard in split.shards]


def test_a_split_may_be_of_one_source_and_of_large_images_only(shard_stage, mixed):
    shard_stage(mixed)
    out = Path("out/shard/name")
    every = split_of(out, "train")
    parts = [split_of(out, "train", source) for source in mixed.sources]
    assert paths(every) == [path for part in parts for path in paths(part)]
    assert every.total == sum(part.total for part in parts)
    large = split_of(out, "train", size=64)
    assert 0 < large.total < every.total and paths(large) == [p for p in paths(every) if "-64-" in p]
    assert split_of(out, "train", size=32) == every and split_of(out, "train", size=65).total == 0
    assert {*paths(split_of(out, "heldout", "rows", 64))} <= {*paths(split_of(out, "heldout", "rows"))}
    with pytest.raises(KeyError):
        split_of(out, "train", "nowhere")


def test_rows_of_a_container_are_in_random_order_always_the_same(shard_stage, mixed):
    shard_stage(mixed)
    out = Path("out/shard/name")
    orders = [[int(key.split("/")[-1]) for key in pq.read_table(path)["key"].to_pylist()]
              for path in paths(split_of(out, "train", "rows"))]
    assert any(order != sorted(order) for order in orders)
    first = content(out)
    shard_stage(mixed)
    assert content(out) == first


def test_an_interrupted_run_on_containers_goes_on_and_gives_the_same_bytes(shard_stage, mixed):
    shard_stage(mixed)
    whole, jobs = content(Path("out/shard/name")), list(shard_stage.written)
    with pytest.raises(KeyboardInterrupt):
        shard_stage(mixed, stop=2)
    (run,) = Path("runs/shard").glob("*/shards")
    cut = next(run.glob("tars-train-32-00001-*.parquet"))
    cut.write_bytes(cut.read_bytes()[:100])
    (run / "tars-train-32-00002-0000.parquet").write_bytes(b"of a task that was killed")
    shard_stage(mixed)
    assert shard_stage.written == [job for job in jobs if job != "tars-00000"]
    assert content(Path("out/shard/name")) == whole


def test_another_order_of_captions_is_another_run(shard_stage, tmp_path):
    """What is finished of the one has its columns in the other order."""
    write(tmp_path / "rows/p.parquet", {"image": [encoded(sized(n)) for n in range(9)], "a": ["x"] * 9, "b": ["y"] * 9})
    for columns in {"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}:
        source = Parquet(str(tmp_path / "rows"), columns, "image")
        with pytest.raises(KeyboardInterrupt):
            shard_stage(DatasetParams({"rows": source}, (32,)), stop=0)
    assert len([*Path("runs/shard").iterdir()]) == 2


def test_many_bad_samples_stop_the_stage_before_all_containers_are_read(shard_stage, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "UNCOUNTED", 10)
    for n in range(4):
        make_tar(tmp_path / f"{n}.tar", [*pairs(1), *((f"9{i}.{k}", b"x") for i in range(3) for k in ("jpg", "txt"))])
    with pytest.raises(DatasetError, match="6 of 8 images read cannot be used, more than max_quarantined 0.5 of 10"):
        shard_stage(of("webdataset", tmp_path, image="jpg", max_quarantined=0.5))
    assert shard_stage.written == ["webdataset-00000", "webdataset-00001"]
    with pytest.raises(DatasetError, match="9 of 12 images read cannot be used, more than max_quarantined 0.7 of 12"):
        shard_stage(of("webdataset", tmp_path, image="jpg", max_quarantined=0.7))
    assert shard_stage(of("webdataset", tmp_path, image="jpg", max_quarantined=0.75))["quarantined"] == 12


def test_a_container_is_written_while_it_is_read(tmp_path):
    run = make_run(tmp_path)

    class Endless(WebDataset):
        def read(self, data, task):
            for n in range(22):
                assert len(list((run / "shards").iterdir())) == n // 4  # no more than one shard is held
                yield str(n), lambda: Sample(picture(1), "train", None, ["x"])

    data = dataclasses.replace(of("webdataset", tmp_path, image="jpg"),
                               sources={"webdataset": Endless(str(tmp_path), {"txt": 1.0}, "jpg")})
    work.write_job(work.Job("webdataset", 0, Task([], 0, shuffle=True)), data, Storage(None), run)
    rows = [s["rows"] for s in work.read_report(Storage(None), run, "webdataset-00000")["shards"]]
    assert rows == [4, 4, 4, 4, 4, 2]


def test_a_source_with_nothing_to_train_on_stops_the_stage(shard_stage, tmp_path):
    make_tar(tmp_path / "t.tar", [(name, encoded(picture(1, 9, 9)) if name.endswith("jpg") else b"x")
                                  for name in ("1.jpg", "1.txt")])
    with pytest.raises(DatasetError, match="no training image is left of source webdataset: 0 cannot be used, 1 are"):
        shard_stage(of("webdataset", tmp_path, image="jpg"))


def test_containers_count_by_what_is_found_in_them(shard_stage, tmp_path):
    make_tar(tmp_path / "a.tar", [*pairs(1, 2, 3), ("4.jpg", b"?"), ("4.txt", b"x")])
    with pytest.raises(DatasetError, match=r"(?s)1 of 4 images .* max_quarantined 0.2 of 4; .*a.tar/4"):
        shard_stage(of("webdataset", tmp_path, image="jpg", max_quarantined=0.2))
    assert shard_stage(of("webdataset", tmp_path, image="jpg", max_quarantined=0.25))["quarantined"] == 1
    assert os.listdir("runs/shard") == []
