"""The stages that take seconds are killed while they write; damaged inputs are refused by the stage that reads them."""

from tests.faults.table import fault
from tests.faults.workspace import flip


@fault("kill -9 of the stage", "networks, reference, evaluate", "started again, it begins anew")
def test_kill(workspace, identical):
    files = 0
    for stage in ("networks", "reference", "evaluate"):
        workspace.forget(stage)
        with workspace.started(workspace.call(stage)) as process:
            process.until(workspace.out(stage).exists)
            process.kill()
        assert not (workspace.out(stage) / "manifest.json").exists(), "killed too late to show anything"
        workspace.finish(stage)
        files += workspace.same(stage)
    identical(f"{files} files")


DAMAGED = [  # made by, name, read by
    ("shard", "digits-train-32-00003-0000.parquet", "reference"),
    ("shard", "manifest.json", "reference"),
    ("networks", "digits/model.safetensors", "evaluate"),
    ("sample", "samples.npz", "evaluate"),
    ("train", "model/ema.safetensors", "sample"),
]


@fault("a flipped bit in a shard, a manifest, a file of weights, the exported model, the samples",
       "reference, sample, evaluate", "one line names the file and says how to get it anew; nothing is written")
def test_damage(workspace, identical):
    files = 0
    for made_by, name, read_by in DAMAGED:
        workspace.forget(read_by)
        damaged = workspace.out(made_by) / name
        flip(damaged)
        line = workspace.refused(read_by)
        assert str(damaged.relative_to(workspace.path)) in line and "run `dvc repro`" in line
        assert not (workspace.out(read_by) / "manifest.json").exists()
        flip(damaged)
        workspace.restore(read_by)
    for stage in ("reference", "evaluate"):
        workspace.forget(stage)
        workspace.finish(stage)
        files += workspace.same(stage)
    identical(f"{files} files")
