"""A page to draw with a trained model in the browser, for this machine alone.

It listens on the loopback address only; from elsewhere, forward the port (`ssh -L 7860:127.0.0.1:7860 host`). It opens
no public link and reports nothing, whatever Gradio's environment variables say.
"""

import socket
from typing import Any

from PIL import Image

from pixelgen.config import ConfigError
from pixelgen.errors import UserError
from pixelgen.generate import PixelGen
from pixelgen.samplers import Sampler

HOST = "127.0.0.1"
MOST_IMAGES, MOST_STEPS = 16, 250


def build(model: PixelGen, name: str) -> Any:
    """The page, as a `gradio.Blocks`; its one function is `draw` of the API."""
    import gradio as gr

    classes = model.conditioning.classes

    def draw(asked: str | float, negative: str, count: float, seed: float, sampler: str, steps: float, guidance: float,
             timeshift: float, progress: gr.Progress = gr.Progress()) -> list[Image.Image]:  # type: ignore
        def step(i: int, *_: object) -> None:
            progress((i, int(steps)), unit="steps")

        each, first = str(asked) if classes is None else int(asked), int(seed)
        try:
            chosen = Sampler.of(sampler, "sampler")(int(steps), guidance, timeshift=timeshift)
            images = model.generate([each] * int(count), range(first, first + int(count)), chosen,  # type: ignore
                                    negative=negative, callback=step)
        except UserError as error:
            raise gr.Error(str(error)) from None
        return [Image.fromarray(image) for image in images]

    with gr.Blocks(title=f"PixelGen: {name}", analytics_enabled=False) as page:
        gr.Markdown(f"## {name}\nImage *i* has the seed *seed + i*: the same seeds give the same images.")
        with gr.Row():
            with gr.Column():
                asked = gr.Textbox(label="Prompt", value="a photo of a red circle") if classes is None else gr.Slider(
                    0, classes - 1, value=0, step=1, label="Class")
                negative = gr.Textbox(label="Negative prompt", visible=classes is None)
                count = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                sampler = gr.Dropdown([*Sampler.kinds], value="heun", label="Sampler")
                steps = gr.Slider(1, MOST_STEPS, value=25, step=1, label="Steps")
                guidance = gr.Slider(1, 10, value=1 if classes is None else 2.5, step=0.1, label="Guidance")
                timeshift = gr.Slider(0.5, 6, value=1, step=0.1, label="Timeshift")
                button = gr.Button("Draw", variant="primary")
            gallery = gr.Gallery(label="Images", format="png", columns=4)
        button.click(draw, [asked, negative, count, seed, sampler, steps, guidance, timeshift], gallery,
                     api_name="draw", concurrency_limit=1)
    return page


def serve(model: PixelGen, name: str, port: int) -> None:
    """Serve the page until the process is interrupted. ConfigError if the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {port} of {HOST} cannot be used ({error}): choose another") from None
    print(f"http://{HOST}:{port} draws with {name}, until Ctrl-C", flush=True)
    build(model, name).launch(server_name=HOST, server_port=port, share=False, enable_monitoring=False, quiet=True,
                              inbrowser=False, show_error=True)
