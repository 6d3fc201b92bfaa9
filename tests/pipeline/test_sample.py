"""What the sample stage writes."""

import dataclasses

import numpy as np

from pipeline.params import read_params
from pipeline.stages.sample import write_prompts
from pixelgen.prompts import Prompt


def test_a_grid_of_each_tag_and_one_of_prompts_without(tmp_path):
    params = dataclasses.replace(read_params().sample["geneval"], per_prompt=1)
    metadata = [{"tag": "colors"}, {}, {"tag": None}, {"tag": "../x"}, {"tag": "colors"}]
    prompts = [Prompt(str(n), "a dog", described) for n, described in enumerate(metadata)]
    write_prompts(tmp_path, [np.zeros((5, 8, 8, 3), np.uint8)], prompts, params)
    assert {p.name for p in tmp_path.glob("*.png")} == {"grid.png", "grid-colors.png", "grid-other.png"}
