"""What a training shows while it lasts, wherever it runs."""

import contextlib
import csv
import io
import sys
import threading
import time

from tqdm import tqdm

from pixelgen.errors import StorageError
from pixelgen.recorders import CURVE
from pixelgen.saving import NOTES
from pixelgen.store import REMOTE_SECONDS, Store


class Progress:
    """A progress bar, read from the loss curve (which comes with each checkpoint, if the run is kept under a storage
    root), and rank 0's notes."""

    def __init__(self, store: Store, steps: int):
        self.store, self.steps, self.done, self.told = store, steps, threading.Event(), ""
        self.thread = threading.Thread(target=self.follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def follow(self) -> None:
        total, pause = self.steps, REMOTE_SECONDS if self.store.remote else 1
        with tqdm(total=total, desc="train", unit="step", mininterval=1) as bar:
            while not self.done.wait(pause):
                self.show(bar)
            self.show(bar)

    def show(self, bar: tqdm) -> None:
        with contextlib.suppress(FileNotFoundError, StorageError):
            if (notes := self.store.read(NOTES).decode()) != self.told:
                bar.write(notes.removeprefix(self.told), file=sys.stderr, end="")
                self.told = notes
        try:
            rows = [row for row in csv.DictReader(io.StringIO(self.store.read(CURVE).decode()))
                    if row["step"].isdigit() and int(row["step"]) <= self.steps]
        except (FileNotFoundError, StorageError):  # not yet; what is wrong with the storage stops the ranks
            return
        if rows and None not in rows[-1].values() and int(rows[-1]["step"]) > bar.n:
            last = rows[-1]
            if bar.n == 0:
                bar.initial, bar.start_t = int(last["step"]), time.time()
            bar.set_postfix(loss=last["loss"], img_s=last["images_per_second"], refresh=False)
            bar.update(int(last["step"]) - bar.n)
