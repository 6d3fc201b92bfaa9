"""Ray's workers as forks of a process that has imported everything.

A worker that starts from nothing spends its first seconds importing torch and pandas, and a training needs a dozen
workers. `python forks.py serve SOCKET` imports them once. Ray is told to start its workers with this file too
(`pipeline.session`): then a fork of the server, which $PIXELGEN_FORKS names, takes the caller's place, with its
arguments, environment, working directory and output. Where no server answers, the caller goes on by itself. Nothing of
this project is imported before a fork: code that is edited meanwhile is the code that runs. This file is run by itself,
and imports nothing else of the project.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys

LARGEST = 1 << 20  # bytes read at once
PRELOADED = (
    "boto3", "click", "colorful", "fsspec", "google.protobuf.descriptor_pb2", "jsonschema", "lpips", "msgpack",
    "pandas", "PIL.Image", "psutil", "pyarrow.fs", "pyarrow.parquet", "pydantic.fields", "requests",
    "safetensors.torch", "scipy", "timm", "torch", "torch._dynamo", "torchvision.models", "tqdm",
    "transformers.models.auto", "transformers.models.qwen3.modeling_qwen3",
)


def serve(address: str) -> None:
    """Import everything, then fork for every caller, until standard input, which the starter holds, is closed."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)  # callers wait here while the imports last
    import_what_workers_need()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that have ended leave no trace
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        caller, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            take_the_place_of(caller)
            return
        caller.close()


def import_what_workers_need() -> None:
    """What the stages and Ray's own libraries import, as far as it is installed; not Ray itself, which reads the
    environment when it is imported."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # a worker that needs it will name it
            importlib.import_module(name)
    if sys.modules["torch"].cuda.is_initialized():
        sys.exit("an import has initialised CUDA, which no fork can use")
    gc.collect()
    gc.freeze()  # or every fork's collector would go through all that, and copy its pages


def take_the_place_of(caller: socket.socket) -> None:
    """In a fork: run what the caller was called with, as if the caller did."""
    data, descriptors, _, _ = socket.recv_fds(caller, LARGEST, 3)
    while not data.endswith(b"\n"):
        data += caller.recv(LARGEST)
    called = json.loads(data)
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    caller.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    atexit._clear()  # of the server's libraries; Ray registers its own
    # Called last: to take apart what was imported would cost each fork half a second. Nobody sees its exit status.
    atexit.register(os._exit, 0)
    os.environ.clear()
    os.environ.update(called["environment"])
    os.chdir(called["directory"])
    sys.argv = called["arguments"]
    sys.path[:] = [os.path.dirname(sys.argv[0]), *os.environ["PYTHONPATH"].split(os.pathsep), *sys.path]
    runpy.run_path(sys.argv[0], run_name="__main__")


def become(arguments: list[str]) -> None:
    """Let a fork run `arguments`, a script and its own, in the place of this process, which Ray has started with two
    more: the language, and what the worker's runtime environment comes to."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--language")
    parser.add_argument("--serialized-runtime-env-context", type=json.loads, default={})
    ours, arguments = parser.parse_known_args(arguments)
    environment = os.environ | ours.serialized_runtime_env_context.get("env_vars", {})
    called = {"arguments": arguments, "environment": environment, "directory": os.getcwd()}
    data = json.dumps(called).encode() + b"\n"
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(os.environ["PIXELGEN_FORKS"])
    except OSError as error:  # killed, most likely; Ray would wait for its workers forever
        print(f"no server of forks ({error}): this worker imports everything itself", file=sys.stderr)
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    server.sendall(data[socket.send_fds(server, [data], [0, 1, 2]):])
    server.recv(1)  # until the fork has read it


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        become(sys.argv[1:])
