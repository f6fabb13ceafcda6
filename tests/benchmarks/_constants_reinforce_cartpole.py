# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 100_000,
    "first": 0,
    "peers": {
        "the tutorial's program, mended only to run": {
            "file": "tutorial_reinforce.py",
            "steps": 20_000,
            "equal": "textbook form",
        },
    },
    "flags": "",
    "variants": {
        "as it is by default": "",
        "textbook form": "--episodes-per-update 1 --no-normalize-returns --no-anneal-lr "
        "--learning-rate 1e-3",
    },
    "floors": {"floor": "10000 20000"},
}
