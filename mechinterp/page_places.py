"""Marked places of a Markdown page, which commands rewrite from tables.

A place is everything between two lines:

    <!-- claim: learns_less -->
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mechinterp.errors import SpecError


def fill_places(path: str | Path, kind: str, texts: Mapping[str, str]) -> str:
    """The page with every place of `kind` ("claim" above) filled from `texts`, by its name.

    Raises SpecError where a place has a name that is not among them.
    """
    page = Path(path).read_text(encoding="utf-8")
    marked = re.compile(
        rf"(?P<begin><!-- {kind}s?: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
    )

    def fill(place: re.Match[str]) -> str:
        name = place["name"]
        if name not in texts:
            known = ", ".join(name for name in texts if name != "all")
            raise SpecError(f"{path}: {kind} {name!r} is not in the spec; it has: {known}")
        return f"{place['begin']}{texts[name]}\n{place['end']}"

    return marked.sub(fill, page)
