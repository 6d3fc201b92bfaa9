"""The page for drawing is for this machine alone, whatever the environment asks for; it draws what the library does."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pixelgen import PixelGen
from pixelgen.checkpoint import export
from pixelgen.cli import main
from pixelgen.samplers.adams_bashforth import AdamsBashforth
from tests.pixelgen.conftest import tiny_denoiser

DRAWN = [3, "", 2, 5, "adams_bashforth", 4, 1.5, 2.0]  # class, negative, images, seed, sampler, steps, guidance, shift


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory, denoiser = tmp_path_factory.mktemp("app") / "model", tiny_denoiser()
    export(directory, denoiser.config, denoiser.state_dict(), denoiser.state_dict(), {})
    return directory


@pytest.fixture(scope="module")
def app(model):
    """A started app in an environment that asks for a public one: its process and address."""
    port = free_port()
    public = {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ANALYTICS_ENABLED": "True",
              "GRADIO_TEMP_DIR": str(model.parent)}
    process = subprocess.Popen([Path(sys.executable).parent / "pixelgen", "app", model, "--port", str(port)],
                               env=os.environ | public, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        assert process.poll() is None, process.stdout.read()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_it_listens_on_loopback_alone_and_talks_to_nobody(app):
    process, _ = app
    found = [c for one in (process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True)))
             for c in psutil.Process(one).net_connections("inet")]
    assert [c for c in found if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in found} == {"127.0.0.1"}
    assert {c.raddr.ip for c in found if c.raddr} <= {"127.0.0.1"}


def test_it_asks_for_no_public_link(model, monkeypatch):
    """Where the machine has no way out, an attempt to open one would go unnoticed."""
    import gradio

    asked = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda _, **options: asked.append(options["share"]))
    assert main(["app", str(model), "--port", str(free_port())]) == 0
    assert asked == [False]  # None would leave it to GRADIO_SHARE


def test_it_draws_what_the_library_draws(app, model):
    from gradio_client import Client

    gallery = Client(app[1], verbose=False).predict(*DRAWN, api_name="/draw")
    drawn = np.stack([np.asarray(Image.open(item["image"])) for item in gallery])
    sampler = AdamsBashforth(4, 1.5, timeshift=2.0)
    assert np.array_equal(drawn, PixelGen.from_pretrained(model).generate([3, 3], [5, 6], sampler))


def test_what_it_cannot_draw_is_an_error_with_a_reason(app):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="takes no negative prompt"):
        Client(app[1], verbose=False).predict(DRAWN[0], "blurry", *DRAWN[2:], api_name="/draw")


def test_a_port_that_is_taken_is_named(app, model, capsys):
    port = app[1].rsplit(":", 1)[1]
    assert main(["app", str(model), "--port", port]) == 1
    assert "in use" in capsys.readouterr().err
