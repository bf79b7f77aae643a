"""The page of tools.demo in Gradio: its parts, its layout, and what acts on it."""

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from model.errors import InputError
from modules.reranking import SuperGlobalReranker
from report.page import environment
from revisitop.dataset import Dataset
from tools.demo_steps import (
    MOST_CANDIDATES,
    QUERIES_SHOWN,
    Galleries,
    QueryImage,
    QuerySearch,
    find_queries,
    numbers_of,
    preview_uri,
    read_upload,
    thumbnail_uri,
)  # fmt: skip

log = logging.getLogger(__name__)


class Parts:
    """The parts of the page as HTML, from the macros of report/demo.html."""

    def __init__(self) -> None:
        self.macros = environment().get_template("demo.html").make_module({"uri": thumbnail_uri})

    def __call__(self, name: str, *values: Any) -> str:
        text = str(getattr(self.macros, name)(*values))
        return f'<div class="sg">{text}</div>'.encode(errors="replace").decode()  # a file name may not be valid text

    def queries(self, dataset: Dataset, current: int | None, text: str) -> str:
        """Returns the queries whose name contains a text; `current` is the number of the one that is shown."""
        numbers, count = find_queries(dataset, text or "", QUERIES_SHOWN)
        return self("queries", [(n, dataset.query_name(n), dataset.queries[n]) for n in numbers], count, current, text)

    def query(self, image: QueryImage) -> str:
        height, width = image.read().shape[:2]
        return self("query", image, preview_uri(image), width, height)

    def results(self, search: QuerySearch, reranker: SuperGlobalReranker) -> str:
        return self("results", search.rerank(reranker), search, reranker.m)

    def reason(self, search: QuerySearch, place: int, reranker: SuperGlobalReranker, focus: bool = False) -> str:
        return self("reason", search.explain(reranker, place), reranker.m, focus)


def build(galleries: Galleries) -> gr.Blocks:
    """Returns the page. The search of a visitor is kept in the state of that visitor."""
    parts, method = Parts(), galleries.cfg.SupG

    def html(name: str, script: str = "", value: str = "") -> gr.HTML:
        on_load = str(getattr(parts.macros, script)()) if script else None
        return gr.HTML(value, js_on_load=on_load, elem_id=name, apply_default_css=False)

    with gr.Blocks(title="SuperGlobal", analytics_enabled=False, delete_cache=(600, 600), fill_width=True) as page:
        # ---- the layout ----

        state, opened = gr.State(), gr.State()  # the search, and the place in it of the result that is explained
        html("head", value=parts("head", galleries.network))
        message = html("message")
        with gr.Row():
            with gr.Column(scale=1, min_width=280, elem_id="choice"):
                names = list(galleries.datasets)
                name = gr.Dropdown(names, value=names[0], label="Images", visible=len(names) > 1)
                queries = html("queries", "choice_script")
                image = html("query", "box_script")
                kinds = ["image", ".heic", ".heif", ".avif"]
                upload = gr.UploadButton("Upload an image", file_types=kinds, elem_id="upload", size="sm")
                with gr.Accordion("Find a query, type a box", open=False):
                    text = gr.Textbox(label="A part of the name", max_lines=1, elem_id="find")
                    label = "Box: x0, y0, x1, y1 in pixels, or empty for the whole image"
                    box = gr.Textbox(label=label, max_lines=1, elem_id="box")
            with gr.Column(scale=3, min_width=320):
                with gr.Row(elem_id="sliders"):
                    m = gr.Slider(1, MOST_CANDIDATES, value=method.rerank_m, step=1, label="M, candidates", elem_id="m")
                    k = gr.Slider(1, 50, value=min(method.rerank_k, 50), step=1, label="K, neighbours", elem_id="k")
                    beta = gr.Slider(
                        0, max(1.0, method.rerank_beta), value=method.rerank_beta, step=0.01,
                        label="β, their weight", elem_id="beta",
                    )  # fmt: skip
                status = html("status")  # with the bar of an extraction
                comparison = html("results", "choice_script", parts("waiting"))
                gr.Checkbox(label="Scores as numbers", elem_id="numbers", container=False)  # only for the styles
                with gr.Row():
                    with gr.Column(min_width=320):
                        maps = html("maps", "maps_script")
                    with gr.Column(min_width=320):
                        why = html("why", "focus_script")
                with gr.Accordion("Modules of the descriptor", open=False):
                    modules = gr.CheckboxGroup(
                        galleries.modules, value=galleries.default_modules, show_label=False, elem_id="modules",
                        info="A new combination extracts the images again.",
                    )  # fmt: skip
        sliders, settings = [m, k, beta], [name, modules, text, m, k, beta]
        everything = [state, opened, queries, image, comparison, why, maps]

        # ---- what acts on it ----

        def on(event: Callable, act: Callable, inputs: list, outputs: list, **options: Any) -> None:
            """Runs an action at an event. If it fails, the message says why, and everything else stays as it is."""

            @wraps(act)
            def safely(*values: Any, **more: Any) -> Any:
                try:
                    return [*act(*values, **more), ""]
                except InputError as error:
                    text = parts("message", error)
                except Exception:
                    log.exception("an action on the page failed")
                    text = parts("message", "this failed; see the terminal")
                return [*(gr.skip() for _ in outputs), text]

            options = {"show_progress": "hidden", **options}
            event(safely, inputs, [*outputs, message], api_visibility="private", **options)  # for the page alone

        def searched(search: QuerySearch, text: str, *sliders: float) -> list[Any]:
            """Returns the values of `everything` after a search."""
            strip = parts.queries(search.gallery.dataset, search.image.number, text)
            results = parts.results(search, galleries.reranker(search.gallery, *sliders))
            return [search, None, strip, parts.query(search.image), results, "", ""]

        progress = gr.Progress(track_tqdm=True)

        def open_page(search: Any, name: str, titles: list, text: str, m: int, k: int, beta: float, progress=progress):
            gallery = galleries.gallery(name, titles)
            if search is None or (search.gallery.dataset is not gallery.dataset and search.image.number is not None):
                image = gallery.opening_query(galleries.reranker(gallery, m, k, beta))
            else:
                image = search.image
            most = gr.Slider(maximum=gallery.largest_m, value=min(m, gallery.largest_m))
            return [*searched(galleries.search(name, titles, image), text, m, k, beta), most, ""]

        def find(search: Any, name: str, text: str):
            return [parts.queries(galleries.datasets[name], search and search.image.number, text)]

        for event in (page.load, name.change, modules.input):
            outputs = [*everything, m, status]
            on(event, open_page, [state, *settings], outputs, show_progress="full", show_progress_on=status)
        for event in (page.load, name.change):  # the queries are shown while descriptors are extracted
            on(event, find, [state, name, text], [queries])
        latest = {"trigger_mode": "always_last"}  # of many moves, only the last is used
        on(text.change, find, [state, name, text], [queries], **latest)

        def searching(image_of: Callable) -> Callable:
            """Returns an action that searches with the image that the function returns for its event and inputs."""

            def act(event: gr.EventData, *inputs: Any):
                *specific, name, titles, text, m, k, beta = inputs
                return searched(galleries.search(name, titles, image_of(event, *specific)), text, m, k, beta)

            return act

        def pick(event: Any, name: str, titles: list[str]) -> QueryImage:
            return galleries.gallery(name, titles).query(int(event.choice))

        for event, image_of, inputs in (
            (queries.click, pick, [name, modules]),
            (upload.upload, lambda event, path: read_upload(Path(path)), [upload]),
            (image.select, lambda event, search: search.image.with_box(event.box, in_pixels=False), [state]),
            (box.submit, lambda event, search, box: search.image.with_box(numbers_of(box)), [state, box]),
        ):
            on(event, searching(image_of), [*inputs, *settings], everything)

        def rerank(search: Any, place: int | None, *sliders: float):
            if search is None:
                return gr.skip(), gr.skip()
            reranker = galleries.reranker(search.gallery, *sliders)
            return parts.results(search, reranker), "" if place is None else parts.reason(search, place, reranker)

        def explain(event: gr.EventData, search: Any, *sliders: float):
            place, reranker = int(event.choice), galleries.reranker(search.gallery, *sliders)
            return place, parts.reason(search, place, reranker, focus=True)

        def match(event: gr.EventData, search: Any):
            try:
                return [parts("maps", galleries.match(search, int(event.choice)))]
            except InputError as error:
                return [parts("message", error)]  # in the place of the maps

        for slider in sliders:
            on(slider.change, rerank, [state, opened, *sliders], [comparison, why], **latest, concurrency_limit=2)
        on(comparison.click, explain, [state, *sliders], [opened, why])
        on(comparison.click, match, [state], [maps])
    return page
