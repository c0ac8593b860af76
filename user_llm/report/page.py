"""A report as one page of HTML that needs nothing else: its images are in it."""

import base64

import jinja2
from etils import epath
from markdown_it import MarkdownIt

from user_llm.common.files import whole

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #8884; text-align: left; white-space: nowrap; }
pre { overflow-x: auto; padding: 0.7rem; background: #8882; }
img { max-width: 100%; background: white; }
</style>
{{ body | safe }}
</html>
""",
    autoescape=True,
)


def write_page(markdown: epath.Path) -> epath.Path:
    """Write `<name>.html` beside a Markdown file and return its path; images are read from the same folder."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown.read_text())
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                image = (markdown.parent / str(child.attrs["src"])).read_bytes()
                child.attrs["src"] = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    body = parser.renderer.render(tokens, parser.options, {})
    path = markdown.with_suffix(".html")
    with whole(path) as target:
        target.write_text(PAGE.render(title=markdown.stem, body=body))
    return path
