"""One HTML page with all pictures inside: no other file, no network."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1480px; padding: 0 1em }
img { max-width: 100%; height: auto } figure { margin: 1em 0 } table { border-collapse: collapse }
td, th { padding: .15em .8em; text-align: left; border-bottom: 1px solid #ddd }
h2 { margin-top: 2em; border-top: 1px solid #bbb; padding-top: .6em }
"""


def embedded(image: Image.Image, alternative: str) -> str:
    """An <img> that holds the picture itself."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    """An HTML table of texts."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def page(title: str, introduction: str, sections: Mapping[str, Sequence[str]]) -> str:
    """A whole page; sections are {heading: pieces of HTML}."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(introduction)}</p>",
    ]
    for heading, pieces in sections.items():
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        parts += pieces
    return "\n".join(parts) + "\n</html>\n"
