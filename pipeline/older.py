"""What earlier versions have left: parameters to rewrite, outputs and runs to keep."""

import copy
import dataclasses
import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from pipeline.storage import run_name, write_json
from pipeline.store import open_store
from pixelgen.config import Variant, defaults_of, load, require
from pixelgen.errors import StorageError
from pixelgen.manifest import IDENTITY, MANIFEST, identity, read_manifest
from pixelgen.recipe import RunConfig, check_yaml
from pixelgen.samplers import Sampler
from pixelgen.store import write_atomic

OUT = Path("out")
PUBLISHED = {"dino": "dinov2_b14", "lpips": "lpips_vgg16", "text": "qwen3_1.7b", "inception": "inception_v3",
             "mask2former": "mask2former_swin_s", "clip": "clip_vit_l14"}  # the kinds of networks by what they are for
TERM_OPTIONS = ("repa_weight", "repa_block", "repa_hidden", "lpips_weight", "pdino_weight", "pdino_block")
MOVED = [field.name for field in dataclasses.fields(RunConfig)]  # from fit, or from beside it, to run


def check_form(data: Any, path: Path) -> None:
    """ConfigError, with the remedy, for a params.yaml of an earlier form."""
    today = copy.deepcopy(data)
    rewrite(today)
    require(data == today, f"{path} has the form of an earlier version: `python -m pipeline params migrate {path} "
            "--write` rewrites it")


def mapping(value: Any) -> Any:
    """What should be a mapping, if it is one; else an empty one. What is wrong is said later, where it is read."""
    return value if isinstance(value, Mapping) else {}


def instances(data: Any, section: str) -> list[Any]:
    """The mappings in a section, as far as there are any."""
    return [value for value in mapping(mapping(data).get(section)).values() if isinstance(value, Mapping)]


def rewrite(data: Any) -> None:
    """Bring parameters into today's form, whatever else is wrong with them."""
    rewrite_networks(data)
    for dataset in instances(data, "datasets"):
        if dataset.get("heldout", 0) is None:
            del dataset["heldout"]
        name_kinds(dataset.get("sources"), "format")
    name_kinds(mapping(data).get("prompts"), "source")
    for recipe in instances(data, "train"):
        rewrite_run(recipe)
        rewrite_objective(mapping(recipe.get("objective")))
        rewrite_denoiser(recipe)
    for sampling in instances(data, "sample"):
        rewrite_sampler(sampling.get("sampler"), "heun")
    for evaluate in instances(data, "evaluate"):
        rewrite_metric(evaluate)


def nest(options: Any, kind: str) -> None:
    """{option: value, other: null} -> {kind: {option: value}}, comments included."""
    inner = CommentedMap((option, value) for option, value in options.items() if value is not None)
    if isinstance(options, CommentedMap):
        inner.ca.items.update((option, said) for option, said in options.ca.items.items() if option in inner)
        options.ca.items.clear()
    options.clear()
    options[kind] = inner


def move(source: Any, old: str, target: Any, new: str) -> None:
    """Give a key another place and name, with the comment behind it."""
    target[new] = source.pop(old)
    if isinstance(source, CommentedMap) and old in source.ca.items:
        target.ca.items[new] = source.ca.items.pop(old)


def name_kinds(section: Any, option: str) -> None:
    """Sources of images or prompts named their kind in an option."""
    for options in mapping(section).values():
        if isinstance(mapping(options).get(option), str):
            nest(options, options.pop(option))


def rewrite_run(recipe: Any) -> None:
    """What changes no weight stood in `fit`, or beside it."""
    run = recipe.get("run", CommentedMap())
    for place in (recipe, mapping(recipe.get("fit"))) if isinstance(run, Mapping) else ():
        for name in [name for name in MOVED if name in place]:
            move(place, name, run, name)
            recipe["run"] = run
    grids = mapping(mapping(run).get("grid_sampler"))
    if grids.get("name", "euler") != "euler":  # whose defaults held for every kind
        for name, value in (("steps", 25), ("guidance", 2.25), ("interval", [0.1, 0.9])):
            grids.setdefault(name, value)
    rewrite_sampler(grids, "euler")


def rewrite_sampler(sampler: Any, usual: str) -> None:
    """The kind of a sampler was its `name`, by default `usual`."""
    old = mapping(sampler)
    if {"name", "order", *(field.name for field in dataclasses.fields(Sampler))} & {*old}:
        nest(old, old.pop("name", usual))


def rewrite_objective(objective: Any) -> None:
    """Options of a term were TERM_OPTION; `gated` listed the terms that are."""
    for name in TERM_OPTIONS:
        term, option = name.split("_")
        if name in objective:
            move(objective, name, objective.setdefault(term, CommentedMap()), option)
    gated = objective.get("gated")
    if isinstance(gated, list):
        for term in ("lpips", "pdino"):
            objective.setdefault(term, CommentedMap())["gated"] = term in gated
        del objective["gated"]


def rewrite_denoiser(recipe: Any) -> None:
    """Without classes, a denoiser was one for prompts; `text` said how captions become these."""
    old = mapping(recipe.get("denoiser"))
    if "size" not in old:
        return
    kind = "jit" if old.get("num_classes") is not None else "jit_t2i"
    if kind == "jit_t2i":
        old.pop("dropout", None)
        if recipe.get("text") is not None:
            move(recipe, "text", old, "captions")
    recipe.pop("text", None)
    nest(old, kind)


def rewrite_networks(data: Any) -> None:
    """The networks stood in `weights`, as a list of what they are for, all published or all the demo's."""
    if "weights" not in mapping(data):
        return
    old = {} if data["weights"] is None else mapping(data["weights"])
    if {*old} - {"source", "networks", "directory", "seed"} or (not old and data["weights"]):
        return  # it was never like this
    if not old:
        del data["weights"]
        return
    demo, roles = old.get("source") == "demo", old.get("networks", ["dino", "lpips", "inception"])
    networks = CommentedMap()
    for role in roles if isinstance(roles, list) else ():
        options = {"seed": old.get("seed", 0)} if demo else {}
        if not demo and old.get("directory"):
            options["directory"] = f"{old['directory']}/{role}"
        kind = f"demo_{role}" if demo else PUBLISHED.get(role, role)
        networks[role] = flow(kind, options)
    keys = list(data)
    rest = [(key, data.pop(key)) for key in keys[keys.index("weights"):]]
    for key, value in rest:
        data["networks" if key == "weights" else key] = networks if key == "weights" else value


def rewrite_metric(evaluate: Any) -> None:
    """An evaluation had the options of all metrics, with null for those of others."""
    metric = evaluate.get("metric")
    if metric in ("fid", "geneval"):
        taken = {name: evaluate.pop(name) for name in ("detector", "batch_size", "baselines") if name in evaluate}
        demo = taken.pop("detector", None) == "geometric"
        if metric == "geneval" and not demo:
            taken.pop("baselines", None)
        kind = "adm" if metric == "fid" else "demo_geneval" if demo else metric
        evaluate["metric"] = flow(kind, taken)


def flow(kind: Any, options: dict[str, Any]) -> CommentedMap:
    """{kind: {option: value}} on one line."""
    made = CommentedMap({kind: CommentedMap(options)})
    made.fa.set_flow_style()
    return made


def migrated(path: Path, cls: type) -> str:
    """The text of a file of parameters, which `cls` reads, in today's form: what equals a default is gone, comments
    stay with what does not. ConfigError, or YAMLError, if it is no such file."""
    text = path.read_text("utf-8")
    check_yaml(text)
    yaml = YAML()
    yaml.width = 120
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    data = yaml.load(text)
    require(isinstance(data, Mapping), f"{path}: expected a mapping of sections")
    rewrite(data)
    reduce(data, load(cls, data))
    new = io.StringIO()
    yaml.dump(data, new)
    return new.getvalue()


def reduce(written: Any, value: Any, default: Any = dataclasses.MISSING) -> None:
    """Delete from a mapping what the loaded `value` has without it: as in `default`, or by its class."""
    if isinstance(value, dict):
        for key, inner in value.items():
            reduce(written[key], inner)
    elif dataclasses.is_dataclass(value):
        if isinstance(value, Variant):
            written = written[value.kind]
            default = default if type(default) is type(value) else dataclasses.MISSING
        for name, usual in defaults_of(type(value), default).items():
            if name in written and getattr(value, name) == usual:
                del written[name]
            elif name in written:
                reduce(written[name], getattr(value, name),
                       usual if dataclasses.is_dataclass(usual) else dataclasses.MISSING)


def outputs() -> Iterator[Path]:
    """Folders of finished outputs, without a look into them: they may hold millions of files."""
    for depth in ("*", "*/*", "*/*/*"):
        yield from (path.parent for path in sorted(OUT.glob(f"{depth}/{MANIFEST}")))


def finished_stages(stages: Collection[str]) -> Iterator[str]:
    """Which of the stages, as DVC calls their instances, have all outputs there."""
    for folder in outputs():
        stage, *key = folder.relative_to(OUT).parts
        beside = [OUT / "train" / key[0] / name for name in ("curve.csv", "grids")] if stage == "train" else []
        if stage in stages and all(path.exists() for path in beside):
            yield "@".join([stage, *key[:1]])


def older_outputs() -> Iterator[Path]:
    """Folders of finished outputs without an identity."""
    return (folder for folder in outputs() if not (folder / IDENTITY).exists())


def refuse_older_outputs() -> None:
    """StorageError, with the remedy, before DVC deletes what an earlier version has made."""
    if found := next(older_outputs(), None):
        raise StorageError(f"{found} was made by an earlier version: `python -m pipeline adopt` keeps all that "
                           f"lies in {OUT}; delete that folder to make it anew")


def adopt() -> Iterator[str]:
    """Give the outputs of an earlier version their identity -> a line for each."""
    weights, networks = OUT / "weights", OUT / "networks"  # what the stage and its output were called, and are
    if (weights / MANIFEST).exists() and not networks.exists():
        manifest = read_manifest(weights, "weights") | {"kind": "networks"}
        weights.rename(networks)
        write_json(networks / MANIFEST, manifest)
        (networks / IDENTITY).unlink(missing_ok=True)
    for folder in [*older_outputs()]:
        told = identity(read_manifest(folder, None))
        write_atomic(folder / IDENTITY, f"{told}\n".encode())
        yield f"{folder}: {told}"


def refuse_older_runs(key: str, new: Path, root: str | None) -> None:
    """StorageError, with the remedy, where a training would begin in `new`, anew, beside what an earlier version has of
    it, here or under a storage root."""
    if new.exists():
        return
    if root:  # all of it lies there, and here at most a part
        old = [f"{root}/{name.partition('/checkpoints/')[0]}"
               for name in open_store(root).sizes(f"runs/train@{key}/") if "/checkpoints/" in name]
    else:
        old = [str(path.parent) for path in (new.parents[1] / f"train@{key}").glob("*/checkpoints")]
    if old:
        new.parent.mkdir(parents=True, exist_ok=True)
        to = f"{root}/{run_name(new)}" if root else new
        raise StorageError(f"{old[0]} holds a training of an earlier version: if its parameters and data are those of "
                           f"now, move it to {to}, which goes on with it; if not, delete it")
