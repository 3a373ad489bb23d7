"""The page, in Gradio."""

import html
import logging
import os
from functools import wraps
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

import numpy as np

from .pictures import draw_detections, draw_grids, draw_heat, zoom
from .session import Detection, Explorer
from .summary import HEADERS, head_rows
from .uploads import MEGABYTES, SUFFIXES, Uploads, read_upload

WAITING = 16  # requests that may wait for the detector; further ones are refused as busy
SESSIONS = 50  # whose images are kept
KEPT_FOR = 3600  # seconds, of a visitor's image in memory
SHOWN_FOR = 600  # seconds, of a picture's file: the browser takes it at once

INTRODUCTION = """\
# Where does attention look?
Give an image or take an example. Click a pixel of it, or type its x and y, and choose a layer: the page \
shows, for each head, where the layer looks from that pixel, and which term makes it look there.
"""
CAPTION = """\
Above, the window that the layer sees (cyan) and, the brighter the more, the weights in it. Below, the \
same window as a grid, with the query's own cell outlined in green: the logits of **content** (query · key) \
and of **learned relative position** (query · offset), each less its mean over the window, red for \
more; and the **weights**, the softmax of their sum.
"""
CSS = """
#message p {padding: 0.6em 1em; border-left: 0.4em solid #c2410c; background: #fff7ed; color: #7c2d12}
#picture img, #heat img, #grids img {width: 100%; height: auto}
#picture img {cursor: crosshair}
"""


class Opened(NamedTuple):
    """The state of one visitor.

    Attributes:
        image: (H, W, 3) BGR, uint8.
        detections: The objects found in it.
    """

    image: np.ndarray
    detections: List[Detection]


def build_page(explorer: Explorer, examples: List[Path], name: str):
    """Build the page's layout and its events.

    Args:
        explorer: The explorer that answers requests.
        examples: Example image files.
        name: The detector's name on the page.

    Returns:
        Gradio's Blocks, for :func:`serve`.

    Raises:
        ImportError: Gradio is missing.
    """
    gr = require_gradio()
    titles = [(layer.title, layer.name) for layer in explorer.layers]
    # A layer from the middle: the first sees little of an image, the last mostly its borders.
    start = explorer.layers[len(explorer.layers) // 2].name
    with gr.Blocks(
        title='sasa_det: attention explorer',
        analytics_enabled=False,
        delete_cache=(60, SHOWN_FOR),
        fill_width=True,
    ) as page:
        opened = gr.State(time_to_live=KEPT_FOR)
        gr.Markdown(INTRODUCTION)
        message = gr.HTML(elem_id='message')
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                upload = gr.File(
                    label=f'Image, at most {MEGABYTES} MB',
                    file_types=list(SUFFIXES),
                    height=120,
                    elem_id='upload',
                )
                page.uploads = Uploads(Path(upload.GRADIO_CACHE) / 'uploads')
                gallery = gr.Gallery(
                    [(path, f'example {place}') for place, path in enumerate(examples, 1)],
                    label='Examples',
                    columns=3,
                    height=170,
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id='examples',
                )
                gr.Markdown('## Detections')
                picture = gr.Image(
                    label='Detections: click a pixel',
                    show_label=False,
                    alt_text='The image with the detected objects and the chosen pixel.',
                    format='png',
                    interactive=False,
                    buttons=[],
                    elem_id='picture',
                )
                with gr.Row():
                    x = gr.Number(
                        0, label='x, from the left', precision=0, elem_id='x', min_width=80
                    )
                    y = gr.Number(
                        0, label='y, from the top', precision=0, elem_id='y', min_width=80
                    )
                gr.Markdown(f'Detector: {html.escape(name)}', elem_id='detector')
            with gr.Column(scale=3, min_width=480):
                with gr.Row():
                    layer = gr.Dropdown(
                        titles,
                        value=start,
                        filterable=False,
                        label='Layer',
                        elem_id='layer',
                        scale=3,
                    )
                    level = gr.Radio(
                        [], label='Pyramid level', visible=False, elem_id='level', scale=2
                    )
                where = gr.Markdown(elem_id='where')
                gr.Markdown('## Where each head looks')
                heat = gr.Image(
                    label='Where each head looks',
                    alt_text='Heat maps of the weights on the image, one a head.',
                    **_drawn('heat'),
                )
                gr.Markdown('## Content, position and weights of each head')
                grids = gr.Image(
                    label='Content, position and weights of each head',
                    alt_text='Grids of the logits by term and of the weights; numbers are below.',
                    **_drawn('grids'),
                )
                gr.Markdown(CAPTION)
                table = gr.Dataframe(
                    headers=list(HEADERS),
                    label="The same in numbers (places in cells of the layer's map)",
                    interactive=False,
                    elem_id='table',
                )

        shown = [picture, level, where, heat, grids, table]

        @_sentences(message)
        def begin(name: str, chosen_level: str):
            return open_image(read_upload(examples[0]), name, chosen_level)

        @_sentences(message)
        def take_example(name: str, chosen_level: str, chosen: gr.SelectData):
            number = chosen.index
            if not isinstance(number, int) or not 0 <= number < len(examples):
                raise ValueError(f'There is no such example; there are {len(examples)}.')
            return open_image(read_upload(examples[number]), name, chosen_level)

        @_sentences(message)
        def take_upload(file: Optional[dict], name: str, chosen_level: str):
            if file is None:
                raise ValueError('No image was given.')
            return open_image(page.uploads.read(file['path']), name, chosen_level)

        def open_image(image: np.ndarray, name: str, chosen_level: Optional[str]):
            new = Opened(image, explorer.detect(image))
            row, col = (edge // 2 for edge in image.shape[:2])
            return {opened: new, x: col, y: row, **show(new, row, col, name, chosen_level)}

        @_sentences(message)
        def take_click(now: Opened, name: str, chosen_level: str, clicked: gr.SelectData):
            _require(now)
            try:
                col, row = (int(place) // zoom(now.image) for place in clicked.index)
            except (TypeError, ValueError):
                raise ValueError('A click is a pair of whole numbers, x and y.') from None
            return {x: col, y: row, **show(now, row, col, name, chosen_level)}

        @_sentences(message)
        def take_numbers(now: Opened, col: float, row: float, name: str, chosen_level: str):
            _require(now)
            if col is None or row is None:
                raise ValueError('Give both x and y.')
            return show(now, int(row), int(col), name, chosen_level)

        def show(now: Opened, row: int, col: int, name: str, chosen_level: Optional[str]):
            levels = explorer.layer(name).levels
            if chosen_level not in levels:
                chosen_level = levels[0] if levels else None
            found = explorer.look(now.image, name, chosen_level, (row, col))
            scale = now.image.shape[0] / found.image.shape[0]
            window = tuple(edge * scale for edge in found.window(0))
            height, width = found.map_size
            size = found.weights.shape[-1]
            return {
                picture: draw_detections(now.image, now.detections, (row, col), window),
                level: gr.Radio(list(levels), value=chosen_level, visible=bool(levels)),
                where: f'{explorer.layer(name).title}: a map of {height} x {width} cells, each '
                f"{found.stride} x {found.stride} pixels of the detector's input; a window of "
                f'{size} x {size} cells; `{name}`',
                heat: draw_heat(found),
                grids: draw_grids(found),
                table: head_rows(found),
            }

        one_at_a_time = dict(concurrency_id='detector', concurrency_limit=1)
        choice = [layer, level]
        everything = [message, opened, x, y, *shown]
        page.load(begin, choice, everything, api_name='begin', **one_at_a_time)
        upload.upload(
            take_upload, [upload, *choice], everything,
            # Gradio would open the file once more, and leave a second one.
            api_name='detect', preprocess=False, **one_at_a_time,
        )  # fmt: skip
        gallery.select(take_example, choice, everything, api_name='example', **one_at_a_time)
        picture.select(
            take_click, [opened, *choice], [message, x, y, *shown],
            api_name='click', **one_at_a_time,
        )  # fmt: skip
        # Arrow keys send numbers faster than answers come; intermediate ones are dropped.
        gr.on(
            [x.input, y.input, layer.input, level.input],
            take_numbers, [opened, x, y, *choice], [message, *shown],
            api_name='look', trigger_mode='always_last', **one_at_a_time,
        )  # fmt: skip
    page.queue(max_size=WAITING, api_open=False)
    return page


def serve(
    page, host: str, port: Optional[int], block: bool = True, names: Sequence[str] = ()
) -> str:
    """Serve the page.

    Args:
        page: The page from :func:`build_page`.
        host: The address to listen at; 127.0.0.1 allows this machine alone.
        port: The port to listen at; by default the first free one from 7860.
        block: Whether to block until interrupted.
        names: Other names by which visitors reach it, such as a proxy's, with a port or without.

    Returns:
        The page's address.

    Raises:
        OSError: The port is taken.
        ValueError: One of the names is none.
    """
    from starlette.middleware import Middleware

    from .gate import Gate, parse_names

    gate = Middleware(Gate, host=host, names=parse_names(names), uploads=page.uploads)
    _, url, _ = page.launch(
        server_name=f'[{host}]' if ':' in host and host[0] != '[' else host,
        server_port=port,
        app_kwargs=dict(middleware=[gate]),
        max_file_size=MEGABYTES * 2**20,
        show_error=True,
        state_session_capacity=SESSIONS,
        share=False,
        quiet=True,
        ssr_mode=False,
        prevent_thread_lock=True,
        footer_links=[],
        css=CSS,
    )
    if block:
        print(f'{url}  (Ctrl-C ends it)', flush=True)
        page.block_thread()
    return url


def require_gradio():
    """Import Gradio with its statistics switched off.

    Raises:
        ImportError: It is missing; says how to install it.
    """
    # Gradio reads this at its import.
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"the explorer needs {error.name}: pip install 'sasa_det[demo]'"
        ) from error
    return gradio


def _drawn(name: str) -> dict:
    return dict(
        show_label=False, format='png', interactive=False, buttons=['fullscreen'], elem_id=name
    )


def _require(now: Optional[Opened]) -> None:
    if not isinstance(now, Opened):
        raise ValueError('There is no image yet, or it was kept too long: give one.')


def _sentences(message):
    """Show a function's errors in the page's message, and clear it if there is none."""

    def decorate(function):
        @wraps(function)
        def answer(*args):
            try:
                return {message: '', **function(*args)}
            except ValueError as error:
                text = str(error)
            except Exception:
                logging.getLogger(__name__).exception('%s failed', function.__name__)
                text = 'This went wrong in the server; its terminal says how.'
            return {message: f'<p role="alert">{html.escape(text)}</p>'}

        return answer

    return decorate
