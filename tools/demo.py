"""Try search and reranking on a web page on this machine, with toy, your datasets or your own images.

python -m tools.demo
python -m tools.demo TEST.DATASET_LIST roxford5k TEST.WEIGHTS ./weights
python -m tools.demo --database holiday/ --weights ./weights

Pick a query or upload an image, draw a box, change M, K and beta, and click a result to see why it has its place. The
page needs Gradio (pip install gradio), and is only accessible from this machine unless --host or --share is given.
"""

import logging
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from config import LOADING, NETWORK, CommandLine, Parsed, varied
from model.errors import InputError
from report.command import run_command

log = logging.getLogger(__name__)

UPLOAD_BYTES = 20 << 20
_SHOWN = 48  # number of queries shown
_VISITORS = 200  # number of visitors whose results are kept
_CHOICE = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('[data-choice]');
  if (chosen) trigger('click', {choice: Number(chosen.dataset.choice)});
});
"""
_REASON = """
const opened = new MutationObserver(() => element.querySelector('.reason')?.focus());
opened.observe(element, {childList: true, subtree: true});
"""
_DRAWING = """
let start = null, box = null;
const clip = value => Math.min(Math.max(value, 0), 1);
const at = (event, canvas) => {
  const sides = canvas.getBoundingClientRect();
  return [clip((event.clientX - sides.left) / sides.width), clip((event.clientY - sides.top) / sides.height)];
};
element.addEventListener('pointerdown', event => {
  const canvas = event.target.closest('.canvas');
  if (!canvas) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  canvas.querySelectorAll('.box').forEach(old => old.remove());
  start = at(event, canvas);
  box = canvas.appendChild(Object.assign(document.createElement('div'), {className: 'box'}));
});
element.addEventListener('pointermove', event => {
  if (!start) return;
  const end = at(event, box.parentElement), low = start.map((v, i) => Math.min(v, end[i]));
  const size = start.map((v, i) => Math.abs(v - end[i]));
  [box.style.left, box.style.top] = low.map(v => 100 * v + '%');
  [box.style.width, box.style.height] = size.map(v => 100 * v + '%');
});
const done = event => {
  if (!start) return;
  const end = at(event, box.parentElement), from = start;
  start = null;
  trigger('select', {box: [...from, ...end]});
};
element.addEventListener('pointerup', done);
element.addEventListener('pointercancel', () => { start = null; });
"""


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
    from tools.demo_steps import Library

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
    library = Library(cfg, session.output, session.device, args.database)
    for chatty in ("httpx", "httpcore"):  # Gradio sends requests to itself
        logging.getLogger(chatty).setLevel(logging.WARNING)
    page = build(gradio, library)
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
    )  # the default is too pale
    try:
        page.launch(
            server_name=args.host, server_port=args.port, share=args.share, max_file_size=UPLOAD_BYTES, quiet=True,
            show_error=False, prevent_thread_lock=True, ssr_mode=False, allowed_paths=[], footer_links=[],
            state_session_capacity=_VISITORS, css=styles(), theme=theme,
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"--port {args.port}: {error}") from None
    log.info("the page is at %s; stop it with Ctrl-C", page.share_url or page.local_url)
    page.block_thread()


def parse(argv: list[str]) -> Parsed:
    here = "the page does not use it"
    uses = (
        *NETWORK, *LOADING, "TEST.DATA_DIR", "TEST.DATASET_LIST", "TEST.DEVICE", "TEST.OUT_DIR", "TEST.RESUME",
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


def build(gr: Any, library: Any) -> Any:
    """Returns the page, a gradio.Blocks. The results of a visitor are kept in the state of that visitor.

    Args:
        gr: the module gradio.
        library: the data to search, a tools.demo_steps.Library.
    """
    from modules.reranking import SuperGlobalReranker
    from report.page import environment
    from tools.demo_steps import MOST_CANDIDATES, compare, explained, preview_uri, read_upload, thumbnail_uri

    method = library.cfg.SupG
    pieces = environment().get_template("demo.html").make_module({"uri": thumbnail_uri})

    def piece(name: str, *values: Any) -> str:
        text = str(getattr(pieces, name)(*values))
        return f'<div class="sg">{text}</div>'.encode(errors="replace").decode()  # a file name may not be valid text

    def told(*outputs: Any) -> Callable:
        """Shows errors in the place for messages, and leaves everything else as it is."""

        def wrap(act: Callable) -> Callable:
            @wraps(act)
            def safely(*inputs: Any, **more: Any) -> Any:
                try:
                    return [*act(*inputs, **more), ""]
                except InputError as error:
                    text = piece("message", error)
                except Exception:
                    log.exception("an action on the page failed")
                    text = piece("message", "this failed; see the terminal")
                return [*(gr.skip() for _ in outputs), text]

            return safely

        return wrap

    def reranker_of(found: Any, m: float, k: float, beta: float) -> SuperGlobalReranker:
        m = min(max(int(m), 1), found.collection.most)
        return SuperGlobalReranker(m, min(max(int(k), 1), m), min(max(float(beta), 0.0), 1e6), method.rerank_s2)

    def strip(collection: Any, text: str, chosen: int | None) -> str:
        numbers, count = collection.named(text or "", _SHOWN)
        dataset = collection.dataset
        return piece("queries", [(n, dataset.query_name(n), dataset.queries[n]) for n in numbers], count, chosen)

    def query(found: Any) -> str:
        asked = found.asked
        height, width = asked.whole().shape[:2]
        frame = words = None
        if asked.box:
            x0, y0, x1, y1 = (min(max(each, 0), s) for each, s in zip(asked.box, 2 * (width, height), strict=True))
            sides = ((x0, width), (y0, height), (x1 - x0, width), (y1 - y0, height))
            frame = [round(100 * part / side, 2) for part, side in sides]
            words = ", ".join(f"{each:.0f}" for each in asked.box)
        return piece("query", asked.name, preview_uri(asked), frame, words)

    def results(found: Any, *sliders: float) -> str:
        reranker = reranker_of(found, *sliders)
        compared = compare(found, reranker)
        return piece("results", compared, found, min(reranker.m, len(found.collection.database)))

    def shown(found: Any, text: str, *sliders: float) -> list[Any]:
        return [found, strip(found.collection, text, found.asked.number), query(found), results(found, *sliders), ""]

    with gr.Blocks(title="SuperGlobal", analytics_enabled=False, delete_cache=(600, 600), fill_width=True) as page:
        state = gr.State()
        gr.HTML('<div class="sg"><h1>SuperGlobal: search, and rerank with descriptors alone</h1></div>')
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                name = gr.Dropdown(
                    library.names, value=library.names[0], label="Images", visible=len(library.names) > 1
                )
                text = gr.Textbox(label="Find a query by its name", max_lines=1)
                queries = gr.HTML(js_on_load=_CHOICE, elem_id="queries", apply_default_css=False)
                kinds = ["image", ".heic", ".heif", ".avif"]
                upload = gr.UploadButton("Upload an image", file_types=kinds, elem_id="upload")
                image = gr.HTML(js_on_load=_DRAWING, elem_id="query", apply_default_css=False)
                box = gr.Textbox(
                    label="Box: x0, y0, x1, y1 in pixels, or empty for the whole image", max_lines=1, elem_id="box"
                )
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    m = gr.Slider(1, MOST_CANDIDATES, value=method.rerank_m, step=1, label="M, candidates", elem_id="m")
                    k = gr.Slider(1, 50, value=min(method.rerank_k, 50), step=1, label="K, neighbours", elem_id="k")
                    beta = gr.Slider(
                        0, max(1.0, method.rerank_beta), value=method.rerank_beta, step=0.01,
                        label="β, their weight", elem_id="beta",
                    )  # fmt: skip
                modules = gr.CheckboxGroup(
                    library.modules, value=list(library.chosen), label="Modules of the descriptor", elem_id="modules",
                    info="A new combination extracts the images again.",
                )  # fmt: skip
                message = gr.HTML(elem_id="message", js_on_load=None, apply_default_css=False)
                comparison = gr.HTML(js_on_load=_CHOICE, elem_id="results", apply_default_css=False)
                reason = gr.HTML(elem_id="why", js_on_load=_REASON, apply_default_css=False)
        sliders = [m, k, beta]
        everything = [state, queries, image, comparison, reason]

        progress = gr.Progress(track_tqdm=True)

        @told(*everything, m)
        def opened(name: str, on: list[str], text: str, found: Any, m: int, k: int, beta: float, progress=progress):
            collection = library.collection(name, on)
            if found is None or (found.collection.dataset is not collection.dataset and found.asked.number is not None):
                asked = library.ask(collection, 0)
            else:
                asked = found.asked
            most = gr.Slider(maximum=collection.most, value=min(m, collection.most))
            return [*shown(library.find(name, on, asked), text, m, k, beta), most]

        @told(*everything)
        def picked(event: gr.EventData, name: str, on: list[str], text: str, m: int, k: int, beta: float):
            asked = library.ask(library.collection(name, on), int(event.choice))
            return shown(library.find(name, on, asked), text, m, k, beta)

        @told(*everything)
        def uploaded(path: str, name: str, on: list[str], text: str, m: int, k: int, beta: float):
            asked = read_upload(Path(path), Path(path).name)
            return shown(library.find(name, on, asked), text, m, k, beta)

        @told(*everything)
        def drawn(event: gr.EventData, found: Any, name: str, on: list[str], text: str, m: int, k: int, beta: float):
            asked = found.asked.boxed(found.asked.pixels_of(event.box))
            return shown(library.find(name, on, asked), text, m, k, beta)

        @told(*everything)
        def typed(found: Any, box: str, name: str, on: list[str], text: str, m: int, k: int, beta: float):
            asked = found.asked.boxed(numbers_of(box) if box.strip() else None)
            return shown(library.find(name, on, asked), text, m, k, beta)

        @told(comparison, reason)
        def moved(found: Any, m: int, k: int, beta: float):
            return [gr.skip(), gr.skip()] if found is None else [results(found, m, k, beta), ""]

        @told(reason)
        def asked_why(event: gr.EventData, found: Any, m: int, k: int, beta: float):
            return [piece("reason", explained(found, reranker_of(found, m, k, beta), int(event.choice)))]

        @told(queries)
        def filtered(found: Any, text: str):
            return [gr.skip() if found is None else strip(found.collection, text, found.asked.number)]

        # Only the page itself calls these. Fast actions show no spinner; of many slider moves, only the last is used.
        settings, shows = [name, modules, text], [*everything, message]
        own = {"api_visibility": "private"}
        quick = {**own, "show_progress": "hidden"}
        latest = {**quick, "trigger_mode": "always_last"}
        for begin in (page.load, name.change, modules.input):
            begin(opened, [*settings, state, *sliders], [*everything, m, message], **own)
        for ask, act, inputs in (
            (queries.click, picked, []),
            (upload.upload, uploaded, [upload]),
            (image.select, drawn, [state]),
            (box.submit, typed, [state, box]),
        ):
            ask(act, [*inputs, *settings, *sliders], shows, **quick)
        for slider in sliders:
            slider.change(moved, [state, *sliders], [comparison, reason, message], **latest, concurrency_limit=2)
        comparison.click(asked_why, [state, *sliders], [reason, message], **quick)
        text.change(filtered, [state, text], [queries, message], **latest)
    return page


def numbers_of(text: str) -> list[float]:
    """Parses the numbers of a text such as "1, 2, 3, 4".

    Raises:
        InputError: if it contains anything else.
    """
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError("a box consists of four numbers, x0, y0, x1, y1 in pixels") from None


if __name__ == "__main__":
    run_command(main)
