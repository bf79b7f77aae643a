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
from collections.abc import Callable, Collection
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

    if args.database is None and "TEST.SCALE_LIST" not in given and cfg.TEST.DATASET_LIST == ["toy"]:
        cfg = varied(cfg, {"TEST.SCALE_LIST": 1})
    if args.database is not None and not args.database.is_dir():
        raise InputError(f"--database {args.database}: there is no such folder")
    if args.database is not None and "TEST.DATASET_LIST" in given:
        raise InputError("--database and TEST.DATASET_LIST both select what is searched; give only one")

    session = start_session(cfg)
    galleries = Galleries(cfg, session.output, session.device, args.database)
    for chatty in ("httpx", "httpcore"):  # Gradio sends requests to itself
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from starlette.middleware import Middleware  # comes with Gradio

    from tools.demo_page import build  # imports Gradio

    page, hosts = build(galleries), host_names(args.host)
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    # The default is too pale.
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
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
    line.add_weights("./weights; random for toy")
    line.add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; 0.0.0.0 for all [127.0.0.1]")
    line.add("--port", type=int, default=7860, metavar="N", help="port [7860]")
    line.add(
        "--share", action="store_true", help="create a public address on Gradio's servers, for everybody who knows it"
    )
    return line.parse(argv, lambda args: {"TEST.DATASET_LIST": "toy"})


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


if __name__ == "__main__":
    run_command(main)
