"""runs/ -> report.html, one self-contained page, and report.md, the same tables.

    python -m codexhf.report runs

`manifests` reads and checks, `comparison`, `curves` and `sections` turn manifests into `blocks`
(paragraphs, tables, figures, samples), `page` renders blocks as HTML and Markdown. Text from a
model or a manifest only ever becomes text.
"""
