"""
A page in the browser on models of your own: fill a mask, write, compare dense and sparse, summarise.

    python training/examples/space/app.py runs/quickstart        # what `make demo ALL=1` has trained
    python training/examples/space/app.py --fill my-encoder --write my-lm
    python training/examples/space/app.py --help

It is a Hugging Face Space as well: README.md says how to publish it. Nothing is downloaded, and nobody but this machine
reaches the page unless --host or --share says so.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from answers import JOBS, MOST_NEW_TOKENS, Models, PageError, fill_mask, find_folders, side_by_side, summarize, write


INTRODUCTION = """# Efficient language models on a CPU
Small models, trained on this page owner's text. [hf_efficient](https://pypi.org/project/hf_efficient) makes them."""
MASKED = "The capital of France is ___ ."
PROMPT = "The history of the city"
# All tabs fit beside each other on a phone.
STYLE = "@media (max-width: 480px) { .tab-container button { padding-left: 0.5rem; padding-right: 0.5rem } }"


def told(message: str) -> str:
    """A message of the page, set apart from answers."""
    return f"⚠️ {message}"


def show_fill(models: Models, text: str) -> str:
    """The likeliest words for each mask, as a table in Markdown."""
    try:
        found = fill_mask(models, text)
    except PageError as error:
        return told(str(error))
    tables = []
    for number, words in enumerate(found, 1):
        rows = [f"| `{word}` | {100 * chance:.1f}% |" for word, chance in words]
        tables.append("\n".join([f"| word {number} | probability |", "| --- | ---: |", *rows]))
    return "\n\n".join(tables)


def show_writing(models: Models, prompt: str, count: int, temperature: float) -> Iterator[tuple[str, str]]:
    """The text as it grows, and what went wrong."""
    try:
        for text in write(models, prompt, count, temperature):
            yield text, ""
    except PageError as error:
        yield "", told(str(error))


def show_pair(models: Models, prompt: str, count: int) -> Iterator[tuple[str, str, str, str, str]]:
    """Both texts as they grow, their speeds, and in the end how they compare, or what went wrong."""
    dense = sparse = None
    try:
        for dense, sparse in side_by_side(models, prompt, count):
            yield dense.text, dense.figures(), sparse.text, sparse.figures(), ""
    except PageError as error:
        yield "", "", "", "", told(str(error))
    if dense is not None and sparse is not None and dense.tokens and sparse.tokens:
        faster = sparse.tokens_a_second / dense.tokens_a_second
        fewer = dense.bytes_a_token / sparse.bytes_a_token
        said = f"Sparse: {faster:.2f} times the tokens a second, {fewer:.1f} times fewer bytes for a token."
        yield dense.text, dense.figures(), sparse.text, sparse.figures(), said


def show_summary(models: Models, document: str, count: int) -> tuple[str, str]:
    """The summary, and what went wrong."""
    try:
        return summarize(models, document, count), ""
    except PageError as error:
        return "", told(str(error))


def length_slider(value: int) -> Any:
    return gr.Slider(1, MOST_NEW_TOKENS, value, step=1, label="Most tokens to write")


def first_message(models: Models, *names: str) -> str:
    """Message of a tab before anything is asked."""
    missing = models.missing(*names)
    return told(missing) if missing else ""


def fill_tab(models: Models) -> None:
    with gr.Tab("Fill", id="fill"):
        text = gr.Textbox(MASKED, label="Text, with ___ or [MASK] where words are missing", lines=2)
        button = gr.Button("Fill", variant="primary")
        answer = gr.Markdown(first_message(models, "fill"), elem_id="fill-answer")
        gr.on([button.click, text.submit], partial(show_fill, models), text, answer, api_name="fill")


def write_tab(models: Models) -> None:
    with gr.Tab("Write", id="write"):
        prompt = gr.Textbox(PROMPT, label="Beginning", lines=2)
        count = length_slider(120)
        temperature = gr.Slider(0, 2, 0.8, step=0.1, label="Temperature: 0 takes the likeliest token each time")
        with gr.Row():
            button = gr.Button("Write", variant="primary")
            stop = gr.Button("Stop")
        message = gr.Markdown(first_message(models, "write"), elem_id="write-message")
        answer = gr.Textbox(label="Text", lines=8, elem_id="write-answer", interactive=False)
        event = button.click(
            partial(show_writing, models), [prompt, count, temperature], [answer, message], api_name="write"
        )
        stop.click(None, cancels=event, queue=False)


def pair_tab(models: Models) -> None:
    with gr.Tab("Compare", id="pair"):
        gr.Markdown("Both get the same time: whichever has used less writes the next token.")
        prompt = gr.Textbox(PROMPT, label="Beginning", lines=2)
        count = length_slider(100)
        button = gr.Button("Write", variant="primary")
        message = gr.Markdown(first_message(models, "dense", "sparse"), elem_id="pair-message")
        shown = []
        with gr.Row():
            for name in ("dense", "sparse"):
                with gr.Column(min_width=280):
                    shown += [
                        gr.Textbox(label=name.capitalize(), lines=8, elem_id=f"{name}-answer", interactive=False),
                        gr.Markdown(elem_id=f"{name}-figures"),
                    ]
        button.click(partial(show_pair, models), [prompt, count], [*shown, message], api_name="side_by_side")


def summary_tab(models: Models) -> None:
    with gr.Tab("Summarise", id="summarize"):
        document = gr.Textbox(label="Document", lines=10, max_lines=20, placeholder="Paste a document of any length.")
        count = length_slider(64)
        button = gr.Button("Summarise", variant="primary")
        message = gr.Markdown(first_message(models, "summarize"), elem_id="summary-message")
        answer = gr.Textbox(label="Summary", lines=4, elem_id="summary-answer", interactive=False)
        button.click(partial(show_summary, models), [document, count], [answer, message], api_name="summarize")


def build_page(models: Models) -> gr.Blocks:
    """Build the page, with a tab for each thing that the models do."""
    with gr.Blocks(title="Efficient language models", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs():
            for tab in (fill_tab, write_tab, pair_tab, summary_tab):
                tab(models)
    return page.queue(default_concurrency_limit=1, max_size=20)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="?", type=Path, default=Path(__file__).parent / "models", metavar="FOLDER",
        help="holds folders fill, write, dense, sparse and summarize, or is what the demo wrote; default: models",
    )  # fmt: skip
    for name, job in JOBS.items():
        parser.add_argument(
            f"--{name}", type=Path, metavar="FOLDER", help=f"a model that {job.auto_class.__name__} loads"
        )
    # A Space names both by Gradio's own variables, which count where nothing is said here.
    parser.add_argument("--host", help="address to listen at (127.0.0.1); 0.0.0.0 for others' machines")
    parser.add_argument("--port", type=int, help="port to listen at (the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="make a public address, through Gradio's servers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        folders = find_folders(args.models, {name: getattr(args, name) for name in JOBS})
    except PageError as error:
        raise SystemExit(str(error)) from None
    # Fonts of the system: those of the default theme would be fetched from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build_page(Models(folders)).launch(
        server_name=args.host, server_port=args.port, share=args.share, theme=theme, css=STYLE, footer_links=[]
    )


if __name__ == "__main__":
    main()
