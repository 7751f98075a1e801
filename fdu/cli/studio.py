"""``fdu studio``: a page on this machine that draws a prompt before and after an erasure."""

from __future__ import annotations

import dataclasses
import html
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import OmitArgPrefixes, Positional, arg

from fdu.cli.options import LoadOptions, described
from fdu.config import Count, check_number
from fdu.storage.loading import Dtype, MissingPackage, check_resolution, choose_device
from fdu.subjects.registry import subject_of

if TYPE_CHECKING:
    from fdu.cli.side_by_side import SideBySide, Suggestions, Tried

HOST = "127.0.0.1"
"""The page is for this machine only."""
LAST_PORT = 65535
LISTED = 12
"""Pairs of target and anchor that the heading names; the rest is counted."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "frame-ancestors 'none'"
)
"""What a browser may load for the page: Gradio's own files from this server, nothing from elsewhere."""
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
STYLE = """
.gradio-container { width: 100% !important; max-width: 1080px !important; margin: 0 auto !important; }
.gradio-container .main { padding: 8px 16px !important; }
.pictures { flex-wrap: nowrap !important; }
.pictures > * { flex: 1 1 0 !important; min-width: 0 !important; }
.pictures .image-container, .pictures .empty { aspect-ratio: 1; height: auto !important; min-height: 0 !important; }
.pictures .image-frame, .pictures .image-frame img { width: 100%; height: 100%; object-fit: contain; }
"""
"""Pictures stay side by side on a phone too, and fill their places even where the model draws 64 pixels."""


@dataclasses.dataclass
class Studio:
    """Try erasures in the browser: type a prompt, see it before and after with the same seed.

    Serves a page on this machine only (127.0.0.1). The model is loaded once. Needs Gradio: pip install 'fdu[studio]'.
    Images are drawn without the safety checker, as by `fdu evaluate`.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "fdu studio emoji demo-out/erased",
        "fdu studio org/model erased erased-longer other.safetensors --device cuda",
    )

    base: Positional[str]
    """The pipeline before: a folder, a .safetensors file, a hub id (org/name), "emoji" or "digits"."""
    erased: Positional[tuple[str, ...]]
    """Folders written by `fdu erase` or ErasureResult.save, or weights from another program, to switch between."""
    port: int = 7860
    """Port of the page, 0 to 65535. 0: any free one."""
    resolution: int | None = None
    """Height and width of the images in pixels, >= 1. Default: the pipeline's own."""
    dtype: Dtype = "auto"
    """Dtype of the pipeline's weights. auto: float32."""
    device: str = "auto"
    """Device to run on: cpu, cuda, mps, or auto for the first accelerator found."""
    loading: Annotated[OmitArgPrefixes[LoadOptions], arg(name="")] = dataclasses.field(
        default_factory=described(LoadOptions)
    )

    def prepare(self, command: str) -> Callable[[], None]:
        """Check the arguments and return the work."""
        subject = subject_of(self.loading.location(self.base), "BASE")
        self.loading.check()
        if not self.erased:
            raise ValueError("ERASED is missing; give one or more folders that `fdu erase` wrote")
        if not 0 <= self.port <= LAST_PORT:
            raise ValueError(f"port must be in [0, {LAST_PORT}], got {self.port}; 0 takes a free one")
        if self.resolution is not None:
            check_number("resolution", self.resolution, Count)
        check_resolution(subject.folder, self.resolution)
        from fdu.cli.side_by_side import SideBySide, Tried, suggestions

        tried = [Tried.of(path) for path in self.erased]
        device = choose_device(self.device)
        check_gradio()

        def work() -> None:
            with bound(self.port) as listener, tempfile.TemporaryDirectory() as folder:
                os.environ["GRADIO_TEMP_DIR"] = folder  # the images, which go with the page
                dtype = "float32" if self.dtype == "auto" else self.dtype
                pipeline = subject.load(dtype, device, *self.loading.arguments)
                size = {"height": self.resolution, "width": self.resolution} if self.resolution else None
                drawer = SideBySide(pipeline, tried, subject.sampling, size)
                blocks = page(drawer, [suggestions(subject, one) for one in tried])
                print(f"\nstudio   http://{HOST}:{listener.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
                serve(blocks, listener)

        return work


def check_gradio() -> None:
    """Import Gradio, without its analytics and its history of prompts.

    Raises:
        MissingPackage: it is not installed.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingPackage(f"fdu studio needs gradio ({error}); pip install 'fdu[studio]'") from error


def bound(port: int) -> socket.socket:
    """A socket on a port of this machine's loopback, which nobody can connect to before the page is there.

    Raises:
        OSError: the port is taken.
    """
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise OSError(f"port {port} cannot be used ({error.strerror}); choose another with --port, or 0") from error
    return listener


def page(drawer: SideBySide, prompts: Sequence[Suggestions]) -> Any:
    """The page, a ``gradio.Blocks``.

    Args:
        drawer: the pipeline with its erasures.
        prompts: suggestions for each of them.
    """
    import gradio as gr

    from fdu.cli.side_by_side import STRONGEST
    from fdu.evaluation.drawing import JUDGED_SEED

    names = [one.name for one in drawer.erasures]
    choices = [(name, place) for place, name in enumerate(names)]

    def samples(place: int) -> list[list[list[str]]]:
        return [[[text] for text in kind] for kind in (prompts[place].asked, prompts[place].kept)]

    def draw(
        text: str, place: int, strength: float, seed: int | None, steps: int | None, guidance: float | None
    ) -> list[Any]:
        try:
            pictures = drawer.draw(text, place, strength, JUDGED_SEED if seed is None else seed, steps, guidance)
        except Exception as error:
            raise gr.Error(html.escape(in_words(error)), None, title="Not drawn", print_exception=False) from error
        return [pictures[0], gr.Image(pictures[1], label="After" if strength == 1 else f"After at {strength:g}")]

    def draw_again(text: str, *settings: Any) -> Any:
        return draw(text, *settings) if text.strip() else [gr.skip(), gr.skip()]

    def switch(place: int) -> list[Any]:
        return [about(drawer.erasures[place]), *(gr.Dataset(samples=some) for some in samples(place))]

    with gr.Blocks(title="fdu studio", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        told = gr.Markdown(about(drawer.erasures[0]))
        with gr.Row(elem_classes="pictures", equal_height=True):
            shared: dict[str, Any] = {"format": "png", "interactive": False, "min_width": 120}
            shared["buttons"] = ["fullscreen", "download"]  # the third would upload the image to a hub
            before = gr.Image(label="Before", **shared)
            after = gr.Image(label="After", **shared)
        with gr.Row(equal_height=True):
            first = next(iter(prompts[0].asked), "")
            prompt = gr.Textbox(first, label="Prompt", placeholder="What to draw", lines=1, scale=5, autofocus=True)
            button = gr.Button("Draw", variant="primary", scale=1, min_width=110)
        erasure = gr.Radio(choices, value=0, label="Erasure", visible=len(names) > 1)
        with gr.Row():
            strength = gr.Slider(0, STRONGEST, 1, step=0.05, label="Strength", scale=3, min_width=180)
            seed = gr.Number(JUDGED_SEED, label="Seed", precision=0, minimum=0, scale=1, min_width=110)
        with gr.Accordion("Steps and guidance", open=False), gr.Row():
            steps = gr.Number(drawer.sampling.num_inference_steps, label="Steps", precision=0, minimum=1)
            guidance = gr.Number(drawer.sampling.guidance_scale, label="Guidance", minimum=0)
        asked, kept = (
            gr.Dataset(label=label, components=["textbox"], samples=some, samples_per_page=20)
            for label, some in zip(("To try: what was erased", "To try: what should stay"), samples(0), strict=True)
        )
        inputs = [prompt, erasure, strength, seed, steps, guidance]
        shown: dict[str, Any] = {"outputs": [before, after], "concurrency_id": "draw", "concurrency_limit": 1}
        hidden: dict[str, Any] = {"api_visibility": "private"}
        button.click(draw, inputs, **shown, api_name="draw")
        prompt.submit(draw, inputs, **shown, **hidden)
        strength.release(draw_again, inputs, **shown, **hidden)
        erasure.input(switch, erasure, [told, asked, kept], **hidden).then(draw_again, inputs, **shown, **hidden)
        for some in (asked, kept):
            some.click(lambda row: row[0], some, prompt, **hidden).then(draw, inputs, **shown, **hidden)
    return blocks


def serve(blocks: Any, listener: socket.socket, started: Callable[[Any], None] | None = None) -> None:
    """Serve the page until Ctrl-C.

    Args:
        blocks: the page.
        listener: as :func:`bound` returns.
        started: gets the ``uvicorn.Server`` before it runs; its ``should_exit`` ends it.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    port = listener.getsockname()[1]
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="zinc", font=FONTS, font_mono=("monospace",))
    alone: dict[str, Any] = {"ssr_mode": False, "mcp_server": False, "pwa": False, "enable_monitoring": False}
    looks: dict[str, Any] = {"theme": theme, "css": STYLE, "footer_links": []}
    app = gr.mount_gradio_app(FastAPI(openapi_url=None), blocks, "/", HOST, port, **alone, **looks)
    guarded = OwnPageOnly(app, [f"{host}:{port}" for host in (HOST, "localhost")])
    settings: dict[str, Any] = {"log_level": "warning", "proxy_headers": False, "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(guarded, **settings))
    if started is not None:
        started(server)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:  # how it ends
        print("\nstudio   ended")


class OwnPageOnly:
    """An ASGI application that answers only browsers that show its own page, by an address of this machine, and that
    tells them to load nothing from elsewhere. So no other page can draw with the model or read what was drawn.

    Args:
        app: the application within.
        addresses: the addresses by which it is reached, as HOST:PORT.
    """

    def __init__(self, app: Any, addresses: Sequence[str]) -> None:
        self.app = app
        self.hosts = {address.encode() for address in addresses}
        self.origins = {f"http://{address}".encode() for address in addresses}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        headers = dict(scope.get("headers", ()))
        known = headers.get(b"host") in self.hosts and headers.get(b"origin") in (None, *self.origins)
        if scope["type"] == "http" and not known:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This page answers only its own address."})
        elif scope["type"] in ("http", "lifespan"):
            await self.app(scope, receive, with_policy)


def about(erasure: Tried) -> str:
    """What was erased, as the page's heading in Markdown."""
    pairs = [(html.escape(target), html.escape(anchor or "nothing")) for target, anchor in erasure.pairs]
    if not pairs:
        return f"## {html.escape(erasure.name)}\nWeights without a record of what they erase."
    if len(pairs) == 1:
        return f"## {pairs[0][0]}, erased towards {pairs[0][1]}"
    more = f", and {len(pairs) - LISTED} more" if len(pairs) > LISTED else ""
    return f"## {len(pairs)} concepts erased\n{', '.join(f'{one} → {other}' for one, other in pairs[:LISTED])}{more}"


def in_words(error: Exception) -> str:
    """An error for the page; one that the user did not cause leaves its traceback in the terminal."""
    if not isinstance(error, (ValueError, TypeError)):
        traceback.print_exception(error, file=sys.stderr)
    return str(error) or type(error).__name__
