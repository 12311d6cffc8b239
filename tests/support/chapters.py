"""Which chapters whole runs take: Colab's emulation and the browser need a minute for each."""

import pytest


def often(chapters):
    """Parameters: chapter 00 and those with widgets always, the others where slow tests run (`go.py test --all`)."""
    marked = [(path, path.name.startswith("00") or "classroom.widgets" in path.read_text("utf-8")) for path in chapters]
    return [pytest.param(p, id=p.stem, marks=[] if always else [pytest.mark.slow]) for p, always in marked]
