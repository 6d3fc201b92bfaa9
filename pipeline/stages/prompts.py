"""prompts: what to draw, as one file of GenEval's metadata.jsonl or of its kind, from one of `pipeline.prompts`."""

import json

from pipeline.prompts import PromptSource
from pipeline.stage import Stage
from pipeline.storage import Storage, fresh_directory


def run(stage: Stage) -> None:
    source: PromptSource = stage.own
    out = fresh_directory(stage.out)
    prompts = source.read(out)
    (out / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    Storage(None).publish(out, "prompts", source, prompts=len(prompts))
