"""Pictures of the built site: ``mkdocs build --strict && python -m docs.site_pictures --to FOLDER``, to be looked at.

Needs ``pip install -e '.[dev]'`` and Debian's ``chromium``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from docs.pictures import browser

PAGES = (
    *("index", "quickstart", "how-it-works", "policies", "reference/cluster", "reference/cli", "reference/python"),
    *("tutorials/three-machines", "results"),
)
_PATIENCE_MS = 300_000


def main() -> None:
    """Take a picture of some pages, from the folder that they were built into."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=Path("site"), help="the built site (site)")
    parser.add_argument("--pages", nargs="+", default=PAGES, help="which, without .html")
    parser.add_argument("--dark", action="store_true", help="in the dark scheme")
    parser.add_argument("--to", type=Path, required=True, help="folder of the pictures")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    with browser() as started:
        page = started.new_page(
            viewport={"width": 1280, "height": 1400}, color_scheme="dark" if arguments.dark else "light"
        )
        # A busy machine takes its time.
        page.set_default_timeout(_PATIENCE_MS)
        for name in arguments.pages:
            page.goto((arguments.site / f"{name}.html").resolve().as_uri())
            path = arguments.to / f"{name.replace('/', '-')}{'-dark' if arguments.dark else ''}.png"
            page.screenshot(path=path)
            print(path)


if __name__ == "__main__":
    main()
