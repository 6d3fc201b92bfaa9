"""The library needs no part of the workflow, and its package itself nothing heavy."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pixelgen

WORKFLOW = ("ray", "dvc", "boto3", "gradio")

EVERY_MODULE = f"""
import importlib, pkgutil, sys
for name in {WORKFLOW}:
    sys.modules[name] = None  # importing it is an ImportError
import pixelgen
names = [m.name for m in pkgutil.walk_packages(pixelgen.__path__, "pixelgen.")]
assert "pixelgen.train" in names and "pixelgen.metrics.fid" in names
for name in names:
    importlib.import_module(name)
"""

NOTHING_HEAVY = """
import sys
import pixelgen, pixelgen.config, pixelgen.cli
assert pixelgen.__version__
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"torch", "numpy", "ray", "dvc", "boto3", "gradio", "timm", "lpips"}, loaded
try:
    pixelgen.PixelGan
except AttributeError as error:
    assert "PixelGan" in str(error)
else:
    raise AssertionError("an unknown name is an AttributeError")
"""


NO_COMPILER = """
import sys
import pixelgen.cli, pixelgen.standalone, pixelgen.generate, pixelgen.rank, pixelgen.metrics.fid
assert "torch" in sys.modules
loaded = {"torch._dynamo", "torch._inductor", "triton", "transformers", "timm"} & {*sys.modules}
assert not loaded, loaded
"""


def run(code):
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_every_module_imports_without_the_workflow():
    run(EVERY_MODULE)


def test_the_package_itself_imports_nothing_heavy():
    run(NOTHING_HEAVY)


def test_training_and_sampling_import_no_compiler():
    """It takes each process more than a second, and few use it."""
    run(NO_COMPILER)


def test_the_version_needs_no_installed_package(tmp_path):
    """A checkout on a GPU machine without an index runs by its folder alone."""
    (tmp_path / "pixelgen").symlink_to(Path(pixelgen.__file__).parent)
    told = subprocess.check_output([sys.executable, "-I", "-S", "-c", "import sys; sys.path.insert(0, sys.argv[1]); "
                                    "import pixelgen; print(pixelgen.__version__)", tmp_path], text=True).strip()
    assert told == version("pixelgen")
