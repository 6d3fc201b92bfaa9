"""Reading follows the order whoever decodes, reads hardly a byte twice, and names what is damaged."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pixelgen.config import CaptionConfig
from pixelgen.data.captions import PREFIXES, prompt
from pixelgen.data.executors import InProcess, processes
from pixelgen.data.feed import PIECE, MixedSource, Plan, lane_batches, read_rows
from pixelgen.data.order import WINDOW
from pixelgen.data.shards import (
    GROUP,
    LocalFile,
    Shard,
    ShardError,
    Split,
    describe_pieces,
    encode_shard,
    open_split,
    read_images,
)
from pixelgen.errors import UserError
from pixelgen.images import adm_crop
from tests.pipeline.folders import encoded, picture

TEXT = CaptionConfig(0.5, 3)
ZEROS = "0" * 64


def test_a_caption_is_drawn_by_weight_and_prefixed_by_chance():
    dice = np.random.default_rng(0).random((4000, 3))
    drawn = Counter(prompt(["a red dog", "one two three four", None], (1.0, 3.0, 9.0), TEXT, die) for die in dice)
    assert set(drawn) == {"a red dog", "one two three four", *(p + "a red dog" for p in PREFIXES)}
    assert len(PREFIXES) == 7
    assert drawn["one two three four"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert drawn["a red dog"] / 4000 == pytest.approx(0.125, abs=0.02)
    assert all(drawn[p + "a red dog"] / 4000 == pytest.approx(0.125 / 7, abs=0.01) for p in PREFIXES)
    never = CaptionConfig(prefix_probability=0.0, short_words=3)
    assert {prompt(["a"], (1.0,), never, die) for die in dice} == {"a"}
    assert prompt([None, "b"], (1.0, 0.0), never, dice[0]) == "b", "the only one it has, whatever its weight"


def shard_file(path, rows, whole=False):
    """A shard in a file; `whole`: as it was written before shards had row groups."""
    data = encode_shard(rows)
    path.write_bytes(data)
    return Shard(LocalFile(path), len(rows), hashlib.sha256(data).hexdigest(), "" if whole else describe_pieces(data))


def row(number, image):
    return {"key": f"k{number}", "image": image, "label": number, "captions": [f"picture {number}"]}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Shards of 5, 150 and 23 rows; the picture, the label and the key of a row tell which row it is."""
    folder, numbers = tmp_path_factory.mktemp("dataset"), itertools.count()
    return Split(tuple(shard_file(folder / f"{rows}.parquet", [row(n, encoded(picture(n, 8, 8))) for n in
                                                               itertools.islice(numbers, rows)], whole=rows == 5)
                       for rows in (5, 150, 23)))


@pytest.fixture(params=["in process", "processes"])
def executor(request):
    if request.param == "in process":
        yield InProcess()
    else:
        with processes(2) as executor:
            yield executor


def plan_of(split, **options):
    """A plan that reads a split, at its own size unless another is asked for."""
    values = {"image_size": 8, "seed": 5, "batch_size": 8, "lanes": 4, "text": None} | options
    return Plan((MixedSource(split, captions=(1.0,)),), **values)


def encode(prompts):
    return torch.tensor([[float(zlib.crc32(p.encode()))] for p in prompts])


def batches(plan, lanes, start, stop, executor=InProcess()):
    encoded = encode if plan.text else torch.tensor
    return list(lane_batches(plan, lanes, start, stop, torch.device("cpu"), encoded, executor))


def test_any_range_of_images_is_read_in_order(split):
    assert split.total == 178 and split.rows == (5, 150, 23)
    ranges = [(0, None), (0, 0), (0, 3), (0, 5), (0, 6), (4, 156), (5, 155), (20, 100), (155, 178), (177, 200),
              (178, None)]
    for (start, stop), count in itertools.product(ranges, (None, 1, 40)):
        parts = list(read_images(split, start, stop, count))
        assert [label for _, labels in parts for label in labels] == [*range(178)][start:stop]
        for images, labels in parts:
            assert len(images) <= (count or 150) and images.dtype == np.uint8 and images.shape == (len(labels), 8, 8, 3)
            assert np.array_equal(images[-1], picture(int(labels[-1]), 8, 8))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_reading_follows_the_order_for_any_split_of_lanes_to_ranks(split, executor, ranks):
    plan, stop, seen = plan_of(split), 40, {}
    for rank in range(ranks):
        lanes = range(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        for step, found in enumerate(batches(plan, lanes, 0, stop, executor)):
            assert [(b.step, b.lane) for b in found] == [(step, lane) for lane in lanes]
            for batch in found:
                labels = batch.condition.tolist()
                assert batch.keys == [f"k{label}" for label in labels]
                assert all(np.array_equal(image.permute(1, 2, 0), picture(label, 8, 8))
                           for image, label in zip(batch.images, labels, strict=True))
                seen[step, batch.lane] = labels
    starts = np.cumsum([0, 5, 150])
    assert seen == {(step, lane): [int(starts[shard] + row) for _, shard, row in
                                   plan.order.window(step // WINDOW, lane)[step % WINDOW]]
                    for step in range(stop) for lane in range(4)}


@pytest.mark.parametrize("text", [None, TEXT])
def test_reading_may_begin_and_end_inside_a_window(split, executor, text):
    plan = plan_of(split, batch_size=5, lanes=1, text=text)  # so that a step lies in two pieces
    assert PIECE % 5
    whole = [vars(step[0]) for step in batches(plan, [0], 0, 64)]
    part = [vars(step[0]) for step in batches(plan, [0], 21, 59, executor)]
    assert [step["step"] for step in part] == [*range(21, 59)]
    for one, other in zip(part, whole[21:59], strict=True):
        assert one["keys"] == other["keys"] and torch.equal(one["images"], other["images"])
        assert torch.equal(one["condition"], other["condition"])


def test_prompts_are_captions_of_their_images(split):
    rows = list(read_rows(plan_of(split, text=TEXT), [2], 16, 48, threads=0))
    prompts = {row.condition for row in rows}
    assert all(row.condition.endswith(f"picture {row.key[1:]}") for row in rows)
    assert any(p.startswith(PREFIXES) for p in prompts) and not all(p.startswith(PREFIXES) for p in prompts)


def test_larger_images_are_resized_as_adm_does(split):
    for step in batches(plan_of(split, image_size=4), [0], 0, 4):
        for key, image in zip(step[0].keys, step[0].images, strict=True):
            assert np.array_equal(image.permute(1, 2, 0), adm_crop(picture(int(key[1:]), 8, 8), 4))


def test_processes_are_kept_busy_and_no_further(split):
    """Four pieces beside the step that is asked for and the one that is made ready."""
    plan, asked = plan_of(split, batch_size=PIECE, lanes=1), []

    class Counting(InProcess):
        ahead = 4

        def submit(self, function, *arguments):
            asked.append(arguments)
            return super().submit(function, *arguments)

    steps = lane_batches(plan, [0], 0, 100, torch.device("cpu"), torch.tensor, Counting())
    next(steps)
    steps.close()  # once the step after it is there
    assert len(asked) == 4 + 1 + 1 + 1


@pytest.mark.parametrize("leave", ["closed", "an error"])
def test_reading_ends_with_whoever_reads(split, leave, tmp_path):
    """Threads and processes, with tasks in hand."""
    before = {*threading.enumerate()}
    broken = damaged(split, tmp_path, "group") if leave == "an error" else split
    with contextlib.suppress(ShardError), processes(2) as executor:
        pids = {executor.submit(os.getpid).result() for _ in range(8)}
        with contextlib.closing(lane_batches(plan_of(broken, lanes=8, batch_size=64), range(8), 0, 400,
                                             torch.device("cpu"), torch.tensor, executor)) as steps:
            for _, step in zip(range(400 if leave == "an error" else 20), steps, strict=False):
                assert len(step) == 8
            assert leave == "closed", "the damage was not met"
    assert not {*threading.enumerate()} - before
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


# ------------------------------------------------------------------------------------------ bytes that are read


@dataclasses.dataclass(frozen=True)
class Counted:
    """A file that counts the bytes read of it."""

    file: LocalFile
    read_bytes: list

    def read(self, start=0, stop=None):
        data = self.file.read(start, stop)
        self.read_bytes.append(len(data))
        return data


def large(folder, sources, rows, shard_rows):
    """Sources of many rows of about 300 bytes each, and the list of what is read of them."""
    read, found = [], []
    for source in range(sources):
        folder.joinpath(f"{source}").mkdir()
        one = shard_file(folder / f"{source}" / "one.parquet", [row(n, bytes(300)) for n in range(shard_rows)])
        counted = dataclasses.replace(one, file=Counted(one.file, read))
        found.append(MixedSource(Split((counted,) * (rows // shard_rows)), 1 + source, (1.0,)))
    return found, read


@pytest.mark.parametrize(("lanes", "lane_size", "sources"), [(2, 32, 1), (32, 8, 1), (192, 8, 1), (512, 8, 1),
                                                             (64, 8, 3), (192, 8, 5)])
def test_hardly_a_byte_is_read_twice(tmp_path, lanes, lane_size, sources):
    """At the lanes of every preset, and more; every 13th of them is read, each as by a rank of its own."""
    found, read = large(tmp_path, sources, rows=600_000, shard_rows=1000)
    plan = Plan(tuple(found), 8, 0, lanes * lane_size, lanes)
    chosen, steps = range(0, lanes, 13), 8 * WINDOW
    used = len([*read_rows(plan, chosen, 0, steps, threads=0)])
    assert used == len(chosen) * steps * lane_size
    of_a_row = len(encode_shard([row(n, bytes(300)) for n in range(1000)])) / 1000
    assert 1 <= sum(read) / (used * of_a_row) < 2


# --------------------------------------------------------------------------------------------------- what fails


def damaged(split, folder, what):
    """The split with a flipped byte in row group 1 or in the footer of its second shard, or without its file."""
    path = folder / "damaged.parquet"
    data = bytearray(split.shards[1].file.read())
    data[-20 if what == "footer" else split.shards[1].pieces[0][1] + 9] ^= 1
    if what != "missing":
        path.write_bytes(data)
    shard = dataclasses.replace(split.shards[1], file=LocalFile(path))
    return Split((split.shards[0], shard, split.shards[2]), "make it anew")


@pytest.mark.parametrize(("what", "told"), [
    ("group", "^row group 1 of {}/damaged.parquet is not what the manifest describes .sha256 differs.: make it anew$"),
    ("footer", "^the footer of {}/damaged.parquet is not what the manifest describes .sha256 differs.: make it anew$"),
    ("missing", "^{}/damaged.parquet is in the manifest but not there: make it anew$")])
def test_what_is_damaged_is_named_whoever_decodes(split, tmp_path, executor, what, told):
    with pytest.raises(ShardError, match=told.format(tmp_path)):
        batches(plan_of(damaged(split, tmp_path, what)), range(4), 0, 40, executor)


def test_other_row_groups_of_a_damaged_shard_can_be_read(split, tmp_path):
    broken = damaged(split, tmp_path, "group")
    footer = broken.footer(1)
    assert [broken.read_group(1, group, footer)["label"].to_pylist() for group in (0, 2)] == [
        [*range(5, 5 + GROUP)], [*range(5 + 2 * GROUP, 155)]]


def described(**change):
    """A manifest with one shard."""
    shard = {"path": "a", "rows": 150, "size": 8, "pieces": f"150:7:{ZEROS} 0:10:{ZEROS}"} | change
    return {"files": [{"path": "a", "size": 10, "sha256": ZEROS}],
            "sources": {"all": {"splits": {"train": {"shards": [shard]}}}}}


@pytest.mark.parametrize("change", [
    {"rows": 151}, *({"pieces": pieces} for pieces in (
        f"150:10:{ZEROS}", f"150:10:{ZEROS} 0:10:{ZEROS}", f"150:7:{ZEROS} 0:11:{ZEROS}", f"150:7:0 0:10:{ZEROS}", "?",
        f"150:7:{ZEROS} 0:10:{ZEROS} and more"))])
def test_a_manifest_that_contradicts_itself_is_refused(change):
    assert open_split(described(), LocalFile, "train").rows == (150,)
    with pytest.raises(ShardError, match="the manifest's pieces of a do not make up the file: make it anew"):
        open_split(described(**change), LocalFile, "train", remedy="make it anew")


def test_a_manifest_cannot_name_shards_that_it_holds_no_checksum_of():
    with pytest.raises(ShardError, match=r"no checksum of \.\./elsewhere\.parquet: make it anew"):
        open_split(described(path="../elsewhere.parquet"), LocalFile, "train", remedy="make it anew")


def fail(kind):
    raise kind("as it was raised")


@pytest.mark.parametrize("kind", [ShardError, ValueError])
def test_what_a_process_raises_is_raised_here(kind):
    with processes(1) as executor:
        with pytest.raises(kind, match="as it was raised"):
            executor.submit(fail, kind).result()
        assert executor.submit(os.getpid).result() != os.getpid(), "and it goes on"


def test_what_a_process_raises_keeps_its_traceback():
    with processes(1) as executor:
        with pytest.raises(ValueError) as raised:
            executor.submit(fail, ValueError).result()
        assert "in fail" in "".join(raised.value.__notes__)


def test_a_signal_to_the_whole_group_leaves_the_processes_to_their_parent():
    with processes(1) as executor:
        pid = executor.submit(os.getpid).result()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        assert executor.submit(os.getpid).result() == pid


def test_a_process_that_is_killed_is_named():
    with processes(1) as executor:
        pid = executor.submit(os.getpid).result()
        with pytest.raises(UserError, match=f"process {pid}, which decodes images, was killed: .*readers"):
            executor.submit(os.kill, pid, signal.SIGKILL).result()


def test_processes_end_with_the_one_that_started_them():
    """Killed, it cannot tell them; its end of their pipes is closed all the same."""
    program = ("import os, sys, time\nfrom pixelgen.data.executors import processes\nwith processes(2) as executor:\n"
               "    print(*(executor.submit(os.getpid).result() for _ in range(8)), flush=True)\n    time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        pids = {int(pid) for pid in process.stdout.readline().split()}
        process.kill()
        assert process.stdout.read() == ""  # they hold no copy of it
    deadline = 100
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        deadline -= 1
        assert deadline
        subprocess.run(["sleep", "0.1"], check=True)
