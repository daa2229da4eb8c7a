"""runs/ -> report.html, one self-contained page, and report.md, the same without the charts.

    python -m codexhf.report runs

`manifests` reads and checks; `comparison`, `charts` and `tables` compute. report.jinja is what the
report says, once for both; page.html.jinja and page.md.jinja are how its parts look. What the
comparison and the charts show is listed in comparison.yaml and charts.yaml.
"""
