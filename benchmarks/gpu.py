"""Training and sampling at the paper's sizes on one GPU, with random weights of the real classes.

`python -m benchmarks.gpu [--profile DIR] [row ...]` prints one JSON line a row. Processes compile side by side, as many
as memory and cores have room for, then each is timed alone. `PIXELGEN_TINY=1` shrinks everything, to try the script on
a CPU.
"""

import argparse
import dataclasses
import hashlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.profiler import ProfilerActivity, profile

from pixelgen.conditioning import Conditioning, Labels, Prompts
from pixelgen.config import FitConfig, MemoryConfig, OptimizerConfig
from pixelgen.data.executors import processes
from pixelgen.data.feed import MixedSource, Plan, lane_batches
from pixelgen.data.shards import LocalFile, Shard, Split, describe_pieces, encode_shard
from pixelgen.denoisers import Architecture, jit, jit_t2i
from pixelgen.encoders.dino import PATCH, Dino
from pixelgen.encoders.lpips import Lpips
from pixelgen.encoders.text import TextEncoder
from pixelgen.generate import PixelGen
from pixelgen.manifest import MANIFEST
from pixelgen.objective import Objective
from pixelgen.precision import store_in_bf16
from pixelgen.recipe import read_yaml
from pixelgen.recorders import CURVE
from pixelgen.samplers import Sampler
from pixelgen.samplers.adams_bashforth import AdamsBashforth
from pixelgen.samplers.heun import Heun
from pixelgen.speed import compile_blocks
from pixelgen.terms import LpipsConfig, ObjectiveConfig, PDinoConfig
from pixelgen.train import LaneBatch, create_state, train

TINY = os.environ.get("PIXELGEN_TINY") == "1"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LANE, LENGTH, WORDS = 8, 128, 900
LIMIT = 240  # seconds until a row that is not ready is given up
PEAK = 989e3  # GFLOP/s of bf16 matrix products, dense: H100 and H200
HEUN = Heun(steps=50, guidance=2.25, interval=(0.1, 0.9), timeshift=2.0)
ADAMS = AdamsBashforth(steps=25, guidance=4.0, timeshift=3.0, order=2)

# size, image size, batch, gated terms, GFLOP an image (forward and backward, every network), GB while it compiles
TRAINED: dict[str, tuple[str, int, int, tuple[str, ...], float, int]] = {
    "train-L": ("L/16", 256, 32, ("lpips",), 744, 25),
    "train-XL": ("XL/16", 256, 32, ("lpips",), 997, 33),
    "train-XL-both-gated": ("XL/16", 256, 32, ("lpips", "pdino"), 952, 33),
    "train-XL-ungated": ("XL/16", 256, 32, (), 1037, 36),
    "train-XL-fed": ("XL/16", 256, 32, ("lpips",), 997, 33),
    "train-XXL-256": ("XXL/16", 256, 64, ("lpips",), 1721, 75),
    "train-XXL-512": ("XXL/16", 512, 16, ("lpips",), 5600, 75),
    "train-XXL-512-saving": ("XXL/16", 512, 16, ("lpips",), 5600, 55),  # all blocks recomputed, averages on the CPU
}
# size, image size, batch, sampler, GFLOP an image, GB
SAMPLED: dict[str, tuple[str, int, int, Sampler, float, int]] = {
    "sample-XL": ("XL/16", 256, 64, HEUN, 45.5e3, 12),
    "sample-XXL": ("XXL/16", 512, 16, ADAMS, 69.4e3, 25),
}
OTHER = {"lpips": 12, "empty-prompt": 2, "resume": 6}
NEEDS = {name: row[-1] for name, row in (TRAINED | SAMPLED).items()} | OTHER


def networks(image_size: int) -> tuple[Dino, Lpips]:
    """DINOv2-B/14 and LPIPS over VGG-16."""
    import lpips
    import timm

    name, grid = "vit_small_patch14_dinov2" if TINY else "vit_base_patch14_dinov2", image_size // 16
    dino = Dino(timm.create_model(name, pretrained=False, num_classes=0, img_size=grid * PATCH), grid)
    metric = Lpips(lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False))
    for network in (dino, metric):
        store_in_bf16(network.to(DEVICE))
    return dino, metric


def text_encoder(device: torch.device = DEVICE, tiny: bool = TINY) -> TextEncoder:
    """Qwen3 of the 1.7B's size, with a tokenizer of a word a token."""
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1} | {str(n): n + 2 for n in range(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    sizes = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                 num_key_value_heads=8, head_dim=128, vocab_size=151936)
    if tiny:
        sizes |= dict(intermediate_size=128, num_hidden_layers=2, vocab_size=1000)
    torch.manual_seed(0)
    with device:
        network = Qwen3Model(Qwen3Config(**sizes))  # type: ignore[arg-type]
    network = network.to(dtype=torch.float32 if tiny else torch.bfloat16)
    return TextEncoder(tokenizer, network, LENGTH)


def architecture(size: str, image_size: int, dropout: float = 0.0) -> Architecture:
    if size in jit_t2i.SIZES:
        return jit_t2i.JiTTextOptions(size, image_size).resolve()
    return jit.JiTOptions(size, image_size, 1000, dropout).resolve()


def conditioning_of(of: Architecture) -> Conditioning:
    return Prompts(text_encoder()) if isinstance(of, jit_t2i.JiTTextConfig) else Labels(1000, DEVICE)


def prompts(count: int) -> list[str]:
    """Of 64 tokens each, so that half of each is padding."""
    return [" ".join(str((n * 7 + k) % WORDS) for k in range(LENGTH // 2)) for n in range(count)]


def examples(conditioning: Conditioning, count: int) -> list[Any]:
    """Labels or prompts."""
    return prompts(count) if conditioning.classes is None else [n % conditioning.classes for n in range(count)]


def prepared_training(row: str, size: str, image_size: int, batch: int, gated: tuple[str, ...]
                      ) -> tuple[Iterator[Any], dict[str, Any]]:
    d = architecture(size, image_size, 0.1)
    dino, metric = networks(image_size)
    conditioning = conditioning_of(d)
    if conditioning.network:
        compile_blocks(conditioning.network)
    terms = ObjectiveConfig(lpips=LpipsConfig(gated="lpips" in gated), pdino=PDinoConfig(gated="pdino" in gated))
    objective = Objective(terms, 16, conditioning.null()[0], {"dino": dino, "lpips": metric})
    o = OptimizerConfig(lr=1e-4, clip=1.0 if conditioning.network else None)
    lanes = batch // LANE
    config = FitConfig(steps=10**6, batch_size=batch, lanes=lanes, seed=0, ema_decay=0.9999, precision="bf16",
                       compile=True)
    state = create_state(d, objective, o, 0, DEVICE)
    batches = fed(batch, lanes) if row.endswith("fed") else made(image_size, lanes, conditioning)
    described = {"parameters": sum(p.numel() for p in state.model.denoiser.parameters()), "batch": batch}
    memory = MemoryConfig(lanes)
    if row.endswith("saving"):
        memory = MemoryConfig(lanes, recomputed_blocks=d.depth, averages_on_cpu=True)
        state.ema.cpu()
    return train(state, batches, objective, o, config, memory=memory), described


def made(image_size: int, lanes: int, conditioning: Conditioning) -> Iterator[list[LaneBatch]]:
    """Random images that lie on the device; prompts are encoded anew for each step."""
    size = (lanes, LANE, 3, image_size, image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8).to(DEVICE)
    asked = examples(conditioning, lanes * LANE)
    labels = conditioning.encode(asked) if conditioning.classes else None
    for step in itertools.count():
        conditions = (conditioning.encode(asked) if labels is None else labels).split(LANE)
        yield [LaneBatch(step, n, [""] * LANE, images[n], conditions[n]) for n in range(lanes)]


def fed(batch: int, lanes: int) -> Iterator[list[LaneBatch]]:
    """From a shard of JPEG images of 256 pixels, decoded in processes."""
    random, rows = np.random.default_rng(0), []
    for number in range(64 if TINY else 1024):
        coarse = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((256, 256))
        grain = np.asarray(coarse) + random.normal(0, 6, (256, 256, 1))
        file = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95, subsampling=0)
        rows.append({"key": f"{number:06}", "image": file.getvalue(), "label": number % 1000})
    data = encode_shard(rows)
    path = Path(tempfile.mkstemp(suffix=".parquet")[1])
    path.write_bytes(data)
    shard = Shard(LocalFile(path), len(rows), hashlib.sha256(data).hexdigest(), describe_pieces(data))
    plan = Plan((MixedSource(Split((shard,))),), 64 if TINY else 256, 0, batch, lanes)
    with processes(max((os.cpu_count() or 1) - 2, 1)) as executor:
        yield from lane_batches(plan, range(lanes), 0, 10**6, DEVICE, torch.tensor, executor)


def measure_training(row: str, go: Callable[[], None], folder: Path | None) -> dict[str, Any]:
    size, image_size, batch, gated, flops, _ = TRAINED[row]
    steps, described = prepared_training(row, size, image_size if not TINY else 64, batch, gated)
    began = time.perf_counter()
    next(steps)
    described["first_step_s"] = round(time.perf_counter() - began, 1)
    for _ in range(4):  # other numbers of images that pass the gate
        next(steps)
    described["five_steps_s"] = round(time.perf_counter() - began, 1)
    go()
    for _ in range(3):
        next(steps)
    seconds, waited, host, count = [], 0.0, time.thread_time(), 2 if TINY else 8
    for _ in range(3):  # a single pause of the machine is not the step
        synchronize()
        began = time.perf_counter()
        for step in itertools.islice(steps, count):
            waited += step.waited
        synchronize()
        seconds.append((time.perf_counter() - began) / count)
    taken, host = 3 * count, time.thread_time() - host
    rate = batch / statistics.median(seconds)
    return described | {
        "ms": round(1000 * statistics.median(seconds), 1), "images_per_second": round(rate, 1),
        "mfu": round(rate * flops / PEAK, 3), "host_ms": round(1000 * host / taken, 1),
        "waiting": round(waited / sum(seconds) / count, 3), "gpu_busy": busy(steps, folder and folder / f"{row}.txt"),
        "loss": step.metrics["loss"]} | memory()


def measure_sampling(row: str, go: Callable[[], None], folder: Path | None) -> dict[str, Any]:
    size, image_size, batch, sampler, flops, _ = SAMPLED[row]
    image_size = 64 if TINY else image_size
    d = architecture(size, image_size)
    denoiser = store_in_bf16(d.build().to(DEVICE).eval().requires_grad_(False))
    compile_blocks(denoiser)
    model = PixelGen(denoiser, "bf16", conditioning_of(d))
    asked = examples(model.conditioning, batch)
    short = dataclasses.replace(sampler, steps=4)
    began = time.perf_counter()
    model.generate(asked, range(batch), short)
    first = time.perf_counter() - began
    go()
    model.generate(asked, range(batch), short)
    began = time.perf_counter()
    model.generate(asked, range(batch), short if TINY else sampler)
    seconds = time.perf_counter() - began
    return {"first_s": round(first, 1), "batch": batch, "seconds": round(seconds, 2),
            "images_per_second": round(batch / seconds, 2), "mfu": round(batch / seconds * flops / PEAK, 3),
            "gpu_busy": busy((model.generate(asked, range(batch), short) for _ in itertools.count()),
                             folder and folder / f"{row}.txt")} | memory()


def measure_lpips(row: str, go: Callable[[], None], folder: Path | None) -> dict[str, Any]:
    """Milliseconds of LPIPS, forward and backward, by the number of images."""
    plain, compiled = networks(64 if TINY else 256)[1], networks(64 if TINY else 256)[1]
    compiled.to(memory_format=torch.channels_last).compile()  # type: ignore[call-overload]

    def milliseconds(network: Lpips, count: int, times: int) -> float:
        images = torch.rand(2, count, 3, 64 if TINY else 256, 64 if TINY else 256, device=DEVICE)
        prediction, target = images[0].requires_grad_(), images[1]
        synchronize()
        began = time.perf_counter()
        for _ in range(times):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                distance = network(prediction, target).sum()
            distance.backward()
        synchronize()
        return round(1000 * (time.perf_counter() - began) / times, 2)

    counts = (32, 17, 24)
    for count in counts:
        milliseconds(compiled, count, 1)
    go()
    return {f"{name}_{count}": min(milliseconds(network, count, 1 if TINY else 10) for _ in range(3))
            for name, network in (("plain", plain), ("compiled", compiled)) for count in counts}


def measure_empty(row: str, go: Callable[[], None], folder: Path | None) -> dict[str, Any]:
    """Features of the empty prompt and of others, on this device and on the CPU, in float32."""
    here, cpu = text_encoder(tiny=True), text_encoder(torch.device("cpu"), tiny=True)
    cpu.network.load_state_dict(here.network.state_dict())
    go()
    found, wanted = here(["", *prompts(3)]).cpu(), cpu(["", *prompts(3)])
    return {"finite": bool(found.isfinite().all()), "largest": wanted.abs().max().item(),
            "difference_empty": (found[0] - wanted[0]).abs().max().item(),
            "difference_others": (found[1:] - wanted[1:]).abs().max().item()}


def measure_resume(row: str, go: Callable[[], None], folder: Path | None) -> dict[str, Any]:
    """The demo's classes, trained in bf16: once undisturbed, once killed (-9) after half of the steps and started
    again. The losses of both, and what two undisturbed runs differ by."""
    subprocess.run([sys.executable, "-m", "pipeline.params"], check=True)
    for stage, made in (("networks", Path("out/networks")), ("shard digits", Path("out/shard/digits"))):
        if not (made / MANIFEST).exists():
            subprocess.run([sys.executable, "-m", "pipeline", *stage.split()], check=True)
    recipe = read_yaml(Path("params.yaml"))["train"]["c2i"]
    steps = 16 if TINY else 200
    recipe["fit"] |= {"steps": steps, "precision": "bf16"}
    recipe["run"] = {"checkpoint_every": steps // 4, "log_every": 1, "grid_every": None}
    place = Path(tempfile.mkdtemp())
    (place / "recipe.yaml").write_text(json.dumps({k: v for k, v in recipe.items() if k not in ("dataset", "init")}))
    go()

    def started(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pixelgen", "train", str(place / "recipe.yaml"), "out/shard/digits",
                   str(place / name)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def losses(name: str) -> np.ndarray:
        if not (place / name / CURVE).exists():
            return np.zeros(0)
        lines = (place / name / CURVE).read_text().splitlines()
        return np.array([float(line.split(",")[1]) for line in lines[1:] if line.count(",") == lines[0].count(",")])

    for name in ("whole", "again"):
        assert started(name).wait() == 0
    killed = started("killed")
    while len(losses("killed")) < steps // 2:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    at = len(losses("killed"))
    assert started("killed").wait() == 0
    whole, again, resumed = (losses(name) for name in ("whole", "again", "killed"))
    return {"steps": len(whole), "killed_after": at, "last_loss": whole[-1],
            "largest_difference": np.abs(resumed - whole).max(),
            "of_two_undisturbed": np.abs(again - whole).max()}


def busy(steps: Iterator[Any], table: Path | None) -> float | None:
    """Share of the time of some steps in which the GPU works."""
    if not CUDA:
        return None
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        began = time.perf_counter()
        for _ in range(3):
            next(steps)
        synchronize()
        wall = time.perf_counter() - began
    spans = sorted((e.time_range.start, e.time_range.end) for e in seen.events()
                   if str(e.device_type).endswith("CUDA"))
    total, end = 0.0, 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    if table:
        averages = seen.key_averages()
        table.write_text(averages.table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90))
    return round(total / 1e6 / wall, 3)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def memory() -> dict[str, float]:
    return {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2)} if CUDA else {}


def one(row: str, folder: Path | None) -> None:
    """A row in this process: prepare it, say so, and time it when told to."""
    if TINY:
        for table, key in ((jit.SIZES, "XL/16"), (jit.SIZES, "L/16"), (jit_t2i.SIZES, "XXL/16")):
            table[key] |= dict(width=96, depth=10, heads=4)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints

    def go() -> None:
        if CUDA:
            torch.cuda.empty_cache()
        print("ready", file=out, flush=True)
        sys.stdin.readline()

    measure = (measure_training if row in TRAINED else measure_sampling if row in SAMPLED else
               {"lpips": measure_lpips, "empty-prompt": measure_empty, "resume": measure_resume}[row])
    found = measure(row, go, folder)
    print(json.dumps(found), file=out, flush=True)
    os._exit(0)  # threads that read ahead need not end first


def waves(rows: Sequence[str]) -> Iterator[list[str]]:
    """The rows, as many together as fit into memory, each with four cores to compile on."""
    free, most = torch.cuda.mem_get_info()[0] / 1e9 if CUDA else 64, max((os.cpu_count() or 1) // 4, 1)
    wave: list[str] = []
    for row in rows:
        if wave and (len(wave) == most or sum(NEEDS[r] for r in [*wave, row]) > free):
            yield wave
            wave = []
        wave.append(row)
    yield wave


def start(row: str, folder: Path | None) -> subprocess.Popen[str]:
    """A process that prepares a row. One that is not ready after some minutes is given up."""
    options = ["--profile", str(folder)] if folder else []
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", "--one", *options, row], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4"})
    return child


def main(rows: Sequence[str], folder: Path | None) -> None:
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    print(json.dumps({"device": name, "cores": os.cpu_count(), "torch": torch.__version__}), flush=True)
    for wave in waves(rows):
        children = [(row, start(row, folder)) for row in wave]
        limits = [threading.Timer(LIMIT, child.kill) for _, child in children]
        for limit in limits:
            limit.start()
        ready = [child.stdout is not None and child.stdout.readline() == "ready\n" for _, child in children]
        for limit in limits:
            limit.cancel()
        for (row, child), is_ready in zip(children, ready, strict=True):
            answer, _ = child.communicate("go\n" if is_ready else None)
            found = json.loads(answer) if child.returncode == 0 else {"failed": child.returncode}
            print(json.dumps({"row": row} | found), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", choices=[*NEEDS, []], help="all, unless some are named")
    parser.add_argument("--profile", type=Path, help="a folder for tables of kernels")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        one(chosen.rows[0], chosen.profile)
    else:
        main(chosen.rows or [*NEEDS], chosen.profile)
