"""The calls that may read what could run code, as a list: a new one fails here until somebody has looked at it."""

import ast

import pytest

from tests.security.hostile import ROOT

SOURCES = {p.relative_to(ROOT).as_posix(): p for top in ("pixelgen", "pipeline", "benchmarks")
           for p in sorted((ROOT / top).rglob("*.py"))}
READERS = {"load", "loads", "load_file", "safe_open", "read_array", "memmap", "fromfile", "loadtxt", "genfromtxt",
           "Unpickler", "from_pretrained", "create_model", "YAML"}  # last parts of names of functions
SAFE = {"json.loads", "load", "loads"}  # JSON, and functions of our own that are called by their bare names
READ = {  # file -> its calls of readers
    "pixelgen/tensors.py": {"load_file(path)", "torch.load(path, map_location='cpu', weights_only=True)"},
    "pixelgen/npz.py": {"np.lib.format.read_array(entry, allow_pickle=False)"},
    "pixelgen/metrics/pretrained.py": {"network.from_pretrained(None, …)"},  # weights that have been read already
    "pixelgen/metrics/colors.py": {"CLIPConfig.from_pretrained(path)", "CLIPTokenizer.from_pretrained(path)"},
    "pixelgen/metrics/detector.py": {"Mask2FormerConfig.from_pretrained(path)"},
    "pixelgen/encoders/dino.py": {"timm.create_model(config['architecture'], …)"},  # after a check of both arguments
    "pixelgen/encoders/text.py": {
        "AutoModel.from_pretrained(directory, …)", "AutoTokenizer.from_pretrained(directory, …)"},
    "pixelgen/cli.py": {"PixelGen.from_pretrained(args.model, …)"},
    # between a rank and its own processes, through pipes that nobody else holds
    "pixelgen/data/executors.py": {"pickle.load(process.stdout)", "pickle.load(sys.stdin.buffer)"},
    "pipeline/stages/sample.py": {"PixelGen.from_pretrained(model.local(), …)"},
    "pipeline/parts.py": {"np.load(io.BytesIO(read_sealed(store, name)), allow_pickle=False)"},
    "pipeline/metrics/features.py": {"np.load(self.task.samples.local() / 'labels.npy', allow_pickle=False)"},
    "pipeline/stages/shard.py": {"pickle.loads(row['job'])"},  # the driver hands jobs to Ray tasks of its own
    "pipeline/demo/stand_ins.py": {"Qwen2Tokenizer.from_pretrained(out)",  # what has just been made
                                   "timm.create_model(STAND_IN['architecture'], …)"},
    "benchmarks/gpu.py": {"timm.create_model(name, pretrained=False, num_classes=0, img_size=grid * PATCH)"},
    "benchmarks/stages.py": {"PixelGen.from_pretrained(OUT / 'train' / stage / 'model', …)"},
    "pipeline/older.py": {"YAML()", "yaml.load(text)"},  # tags, which alone could run code, are refused before
    "pixelgen/recipe.py": {"YAML(typ='safe', pure=True)", "YAML(typ='safe', pure=True).load(text)"},
}
BANNED = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "importlib.import_module", "torch.hub.load",
          "torch.jit.load", "shutil.unpack_archive", "tempfile.mktemp"}
ALLOWED = {file: {"importlib.import_module"} for file in (  # of names that are written in the code
    "pipeline/forks.py", "pipeline/stage.py", "pixelgen/config.py")}
MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "xml"}
PICKLES = {"pipeline/stages/shard.py", "pixelgen/data/executors.py"}
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True,
            "use_safetensors": True}


def described(call: ast.Call) -> str:
    """The call as it is written; if that is long, with its first argument only."""
    whole = ast.unparse(call)
    return whole if len(whole) <= 80 else f"{ast.unparse(call.func)}({ast.unparse(call.args[0])}, …)"


@pytest.mark.parametrize("file", SOURCES)
def test_only_known_calls_read_what_could_run_code(file):
    nodes = list(ast.walk(ast.parse(SOURCES[file].read_text())))
    found = [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]
    readers = {described(call) for name, call in found if name.split(".")[-1] in READERS and name not in SAFE}
    assert readers == READ.get(file, set())
    assert {name for name, _ in found} & BANNED == ALLOWED.get(file, set())
    assert not [name for name, _ in found if name.endswith(".extractall")], "archives are never unpacked"
    for name, call in found:
        for word in call.keywords:
            if word.arg in KEYWORDS:
                assert ast.unparse(word.value) == str(KEYWORDS[word.arg]), f"{name}: {word.arg}"
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported & MODULES == ({"pickle"} if file in PICKLES else set())


def test_a_text_encoder_is_told_to_bring_no_code_and_no_pickle():
    calls = {described(node): {word.arg: ast.unparse(word.value) for word in node.keywords}
             for node in ast.walk(ast.parse(SOURCES["pixelgen/encoders/text.py"].read_text()))
             if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained")}
    assert len(calls) == 2
    for words in calls.values():
        assert words["local_files_only"] == "True" and words["trust_remote_code"] == "False"
    assert calls["AutoModel.from_pretrained(directory, …)"]["use_safetensors"] == "True"
