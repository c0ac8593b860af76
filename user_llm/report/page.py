"""A report as one page of HTML that needs nothing else: its pictures are in it.

The page is safe to open wherever its text came from. Its policy lets a browser use the one style sheet below and images
within the page, and nothing else: no script, no link to follow, no request. The pictures are those that the caller drew; an
image of any other name is left out, so that no file can be shown by naming it.
"""

import base64
import hashlib
from collections.abc import Mapping

import jinja2
from etils import epath
from markdown_it import MarkdownIt

from user_llm.common.files import whole
from user_llm.report.markdown import Markdown

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; }
h1 + p { font-size: 1.15rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #8884; text-align: left; max-width: 40rem; overflow-wrap: normal; }
tbody tr:hover { background: #8881; }
pre { overflow-x: auto; padding: 0.7rem; background: #8882; }
img { max-width: 100%; background: white; }
"""
POLICY = (
    "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)
PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>{{ style | safe }}</style>
{{ body | safe }}
</html>
""",
    autoescape=True,
)


def write_page(path: epath.Path, markdown: Markdown, pictures: Mapping[str, bytes]) -> None:
    """Write a page of Markdown; `pictures` holds the PNG of each image by its name."""
    parser = (
        MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink", "html_block", "html_inline"])
    )
    tokens = parser.parse(markdown)
    for token in tokens:
        children = [child for child in token.children or () if child.type != "image" or child.attrs["src"] in pictures]
        for child in children:
            if child.type == "image":
                png = base64.b64encode(pictures[str(child.attrs["src"])]).decode()
                child.attrs["src"] = f"data:image/png;base64,{png}"
        if token.children is not None:
            token.children = children
    body = parser.renderer.render(tokens, parser.options, {})
    with whole(path) as target:
        target.write_text(PAGE.render(title="User-LLM report", policy=POLICY, style=STYLE, body=body), encoding="utf-8")
