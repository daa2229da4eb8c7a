"""People in the loop: a page on which they compare answers and write demonstrations.

    python -m codexhf.label runs/prefs                             # the page, on 127.0.0.1
    python -m codexhf.label runs/prefs --export --license cc-by-4.0    # what they said, as data

Reads unlabelled.jsonl of the preferences stage (`label_by: people` or `both`), keeps every click in
runs/labels/labels.sqlite, and exports a data set that recipes/reward_model.py and recipes/sft.py
take as it is. store is the database, agreement the statistics, app the page, show how hostile text
becomes HTML. Needs the extra `label`; docs/labelling.md says how to work with it.
"""
