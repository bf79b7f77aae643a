"""Try search and reranking on a web page on this machine, with toy, your datasets or your own images.

python -m tools.demo
python -m tools.demo TEST.DATASET_LIST roxford5k TEST.WEIGHTS ./weights
python -m tools.demo --database holiday/ --weights ./weights

Pick a query or upload an image, draw a box, change M, K and beta, and click a result to see why it has its place. The
page needs Gradio (pip install gradio), and is only accessible from this machine unless --host or --share is given.
"""

import ipaddress
import logging
import os
import re
import socket
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from config import DATASET, LOADING, NETWORK, CommandLine, Parsed, varied
from model.errors import InputError
from report.command import run_command

log = logging.getLogger(__name__)

UPLOAD_BYTES = 20 << 20
_VISITORS = 200  # number of visitors whose results are kept


def main(argv: list[str]) -> None:
    args, cfg, given = parse(argv)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # sends no data anywhere
    try:
        import gradio
    except ImportError:
        raise InputError("the page needs Gradio: pip install gradio") from None
    if int(gradio.__version__.split(".")[0]) < 6:
        raise InputError(f"the page needs Gradio 6, this is {gradio.__version__}: pip install --upgrade gradio")

    from assembly import start_session
    from tools.demo_steps import Galleries

    if args.database is None:
        if "TEST.DATASET_LIST" not in given:
            cfg = varied(cfg, {"TEST.DATASET_LIST": ["toy"]})
        if "TEST.SCALE_LIST" not in given and cfg.TEST.DATASET_LIST == ["toy"]:
            cfg = varied(cfg, {"TEST.SCALE_LIST": 1})
    elif not args.database.is_dir():
        raise InputError(f"--database {args.database}: there is no such folder")
    elif "TEST.DATASET_LIST" in given:
        raise InputError("--database and TEST.DATASET_LIST both select what is searched; give only one")

    session = start_session(cfg)
    galleries = Galleries(cfg, session.output, session.device, args.database)
    for chatty in ("httpx", "httpcore"):  # Gradio sends requests to itself
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from starlette.middleware import Middleware  # comes with Gradio

    page, hosts = build(gradio, galleries), host_names(args.host)
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )  # the default is too pale
    try:
        page.launch(
            server_name=args.host, server_port=args.port, share=args.share, max_file_size=UPLOAD_BYTES, quiet=True,
            show_error=False, prevent_thread_lock=True, ssr_mode=False, allowed_paths=[], footer_links=[],
            state_session_capacity=_VISITORS, css=styles(), theme=theme,
            app_kwargs={"middleware": [Middleware(host_check, hosts)]},
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"--port {args.port}: {error}") from None
    if page.share_url:
        hosts.add(urlsplit(page.share_url).hostname)
    log.info("the page is at %s; stop it with Ctrl-C", page.share_url or page.local_url)
    page.block_thread()


def parse(argv: list[str]) -> Parsed:
    here = "the page does not use it"
    uses = (
        *NETWORK, *LOADING, *DATASET, "TEST.DATASET_LIST", "TEST.DEVICE", "TEST.OUT_DIR", "TEST.RESUME",
        "SupG.rerank_m", "SupG.rerank_k", "SupG.rerank_beta", "SupG.rerank_s2",
    )  # fmt: skip
    instead = {"TEST.RERANKER": f"the page shows SuperGlobal; {here}", "TEST.REPORT": here}
    line = CommandLine(__doc__, uses, instead)
    line.add("--database", type=Path, metavar="FOLDER", help="your own images, also in subfolders [toy]")
    line.add_flag(
        "--weights", "TEST.WEIGHTS", metavar="PATH",
        help="the checkpoint, or a folder in which exactly one fits the depth [./weights; random for toy]",
    )  # fmt: skip
    line.add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; 0.0.0.0 for all [127.0.0.1]")
    line.add("--port", type=int, default=7860, metavar="N", help="port [7860]")
    line.add(
        "--share", action="store_true", help="create a public address on Gradio's servers, for everybody who knows it"
    )
    return line.parse(argv)


def styles() -> str:
    folder = Path(__file__).parents[1] / "report"
    return "".join((folder / name).read_text() for name in ("parts.css", "demo.css"))


def host_check(app: Callable, hosts: Collection[str]) -> Callable:
    """Returns the ASGI application behind a check of the Host header: only these hosts are answered.

    Otherwise a web page elsewhere could let its own name point to this machine (DNS rebinding) and read the images.
    Files are never answered: the page has its images in itself.

    Args:
        hosts: names and addresses; "*" for any IP address, which no page elsewhere can have as its name.
    """
    from starlette.responses import PlainTextResponse

    async def checked(scope: Any, receive: Callable, send: Callable) -> None:
        header = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        try:
            name = urlsplit(f"//{header}").hostname or ""
            known = scope["type"] == "lifespan" or name in hosts or ("*" in hosts and bool(ipaddress.ip_address(name)))
        except ValueError:
            known = False
        answer = PlainTextResponse("the page is not open under this name, or gives no files", status_code=403)
        if known and not re.match(r"(/gradio_api)?/file[=/]", scope.get("path", "")):
            answer = app
        await answer(scope, receive, send)

    return checked


def host_names(address: str) -> set[str]:
    """Returns the hosts under which the page can be opened, see host_check."""
    names = {"localhost", "127.0.0.1", "::1", address}
    if address in ("0.0.0.0", "::"):
        names |= {"*", socket.gethostname(), f"{socket.gethostname()}.local", socket.getfqdn()}
    return {name.lower() for name in names}


def build(gr: Any, galleries: Any) -> Any:
    """Returns the page, a gradio.Blocks. The search of a visitor is kept in the state of that visitor.

    Args:
        gr: the module gradio.
        galleries: what can be searched, a tools.demo_steps.Galleries.
    """
    from modules.reranking import SuperGlobalReranker
    from report.page import environment
    from tools.demo_steps import (
        MOST_CANDIDATES,
        QUERIES_SHOWN,
        find_queries,
        preview_uri,
        read_upload,
        thumbnail_uri,
    )  # fmt: skip

    method = galleries.cfg.SupG
    pieces = environment().get_template("demo.html").make_module({"uri": thumbnail_uri})

    def piece(name: str, *values: Any) -> str:
        text = str(getattr(pieces, name)(*values))
        return f'<div class="sg">{text}</div>'.encode(errors="replace").decode()  # a file name may not be valid text

    # ---- what the parts of the page show ----

    def reranker_of(gallery: Any, m: float, k: float, beta: float) -> SuperGlobalReranker:
        m = min(max(int(m), 1), gallery.largest_m)
        return SuperGlobalReranker(m, min(max(int(k), 1), m), min(max(float(beta), 0.0), 1e6), method.rerank_s2)

    def strip(dataset: Any, number: int | None, text: str) -> str:
        numbers, count = find_queries(dataset, text or "", QUERIES_SHOWN)
        shown = [(n, dataset.query_name(n), dataset.queries[n]) for n in numbers]
        return piece("queries", shown, count, number, text)

    def query(image: Any) -> str:
        frame = words = None
        if image.box:
            height, width = image.read().shape[:2]
            x0, y0, x1, y1 = (min(max(each, 0), s) for each, s in zip(image.box, 2 * (width, height), strict=True))
            sides = ((x0, width), (y0, height), (x1 - x0, width), (y1 - y0, height))
            frame = [round(100 * part / side, 2) for part, side in sides]
            words = ", ".join(f"{each:.0f}" for each in image.box)
        return piece("query", image.name, preview_uri(image), frame, words)

    def results(search: Any, *sliders: float) -> str:
        reranker = reranker_of(search.gallery, *sliders)
        return piece("results", search.rerank(reranker), search, reranker.m)

    def reason(search: Any, place: int | None, sliders: Sequence[float], focus: bool = False) -> str:
        if place is None:
            return ""
        reranker = reranker_of(search.gallery, *sliders)
        return piece(
            "reason", *(search.explain(reranker, place) if place < reranker.m else (None, {})), reranker.m, focus
        )

    def searched(search: Any, text: str, *sliders: float) -> list[Any]:
        """Returns the values of `everything` after a search."""
        shown = strip(search.gallery.dataset, search.image.number, text)
        return [search, None, shown, query(search.image), results(search, *sliders), "", ""]

    # ---- its layout ----

    def html(name: str, script: str = "", value: str = "") -> Any:
        on_load = str(getattr(pieces, script)()) if script else None
        return gr.HTML(value, js_on_load=on_load, elem_id=name, apply_default_css=False)

    with gr.Blocks(title="SuperGlobal", analytics_enabled=False, delete_cache=(600, 600), fill_width=True) as page:
        state, opened = gr.State(), gr.State()  # the search, and the place in it of the result that is explained
        html("head", value=piece("head", galleries.network))
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
                comparison = html("results", "choice_script", piece("waiting"))
                with gr.Row():
                    with gr.Column(min_width=320):
                        why = html("why", "focus_script")
                    with gr.Column(min_width=320):
                        maps = html("maps", "maps_script")
                gr.Checkbox(label="Scores as numbers", elem_id="numbers", container=False)  # only for the styles
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
                    text = piece("message", error)
                except Exception:
                    log.exception("an action on the page failed")
                    text = piece("message", "this failed; see the terminal")
                return [*(gr.skip() for _ in outputs), text]

            options = {"show_progress": "hidden", **options}
            event(safely, inputs, [*outputs, message], api_visibility="private", **options)  # for the page alone

        progress = gr.Progress(track_tqdm=True)

        def open_page(search: Any, name: str, titles: list, text: str, m: int, k: int, beta: float, progress=progress):
            gallery = galleries.gallery(name, titles)
            if search is None or (search.gallery.dataset is not gallery.dataset and search.image.number is not None):
                image = gallery.opening_query(reranker_of(gallery, m, k, beta))
            else:
                image = search.image
            most = gr.Slider(maximum=gallery.largest_m, value=min(m, gallery.largest_m))
            return [*searched(galleries.search(name, titles, image), text, m, k, beta), most, ""]

        def searching(image_of: Callable) -> Callable:
            """Returns an action that searches with the image that the function returns for its event and inputs."""

            def act(event: gr.EventData, *inputs: Any):
                *own, name, titles, text, m, k, beta = inputs
                return searched(galleries.search(name, titles, image_of(event, *own)), text, m, k, beta)

            return act

        def pick(event: Any, name: str, titles: list[str]) -> Any:
            return galleries.gallery(name, titles).query(int(event.choice))

        def find(search: Any, name: str, text: str):
            return [strip(galleries.datasets[name], search and search.image.number, text)]

        def rerank(search: Any, place: int | None, *sliders: float):
            return (
                [gr.skip(), gr.skip()]
                if search is None
                else [results(search, *sliders), reason(search, place, sliders)]
            )

        def explain(event: gr.EventData, search: Any, *sliders: float):
            place = int(event.choice)
            return [place, reason(search, place, sliders, focus=True)]

        def match(event: gr.EventData, search: Any):
            try:
                return [piece("maps", galleries.match(search, int(event.choice)))]
            except InputError as error:
                return [piece("message", error)]

        for event in (page.load, name.change, modules.input):
            outputs = [*everything, m, status]
            on(event, open_page, [state, *settings], outputs, show_progress="full", show_progress_on=status)
        for event in (page.load, name.change):  # the queries are shown while descriptors are extracted
            on(event, find, [state, name, text], [queries])
        for event, image_of, inputs in (
            (queries.click, pick, [name, modules]),
            (upload.upload, lambda event, path: read_upload(Path(path), Path(path).name), [upload]),
            (image.select, lambda event, search: search.image.with_box(event.box, in_pixels=False), [state]),
            (box.submit, lambda event, search, box: search.image.with_box(numbers_of(box)), [state, box]),
        ):
            on(event, searching(image_of), [*inputs, *settings], everything)
        latest = {"trigger_mode": "always_last"}  # of many moves, only the last is used
        for slider in sliders:
            on(slider.change, rerank, [state, opened, *sliders], [comparison, why], **latest, concurrency_limit=2)
        on(comparison.click, explain, [state, *sliders], [opened, why])
        on(comparison.click, match, [state], [maps])
        on(text.change, find, [state, name, text], [queries], **latest)
    return page


def numbers_of(text: str) -> list[float] | None:
    """Parses the numbers of a text such as "1, 2, 3, 4"; None if it is empty.

    Raises:
        InputError: if it contains anything else.
    """
    try:
        return [float(word) for word in text.replace(",", " ").split()] or None
    except ValueError:
        raise InputError("a box consists of four numbers, x0, y0, x1, y1 in pixels") from None


if __name__ == "__main__":
    run_command(main)
