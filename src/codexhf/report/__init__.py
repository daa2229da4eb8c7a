"""runs/ -> report.html, one self-contained page, and report.md, the same without the charts.

    python -m codexhf.report runs

`manifests` reads and checks; `comparison`, `charts` and `sections` compute one list of sections,
which page.html.jinja and page.md.jinja write down.
"""
