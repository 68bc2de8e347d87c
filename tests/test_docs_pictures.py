"""The pictures of the documentation: on light pages and on dark ones, and as large as a page bears."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = sorted(
    {
        (page.parent / path).resolve()
        for page in PAGES
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    }
)


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_a_picture_has_a_background_of_its_own(path):
    """GitHub and the site show pages light or dark: what is drawn on nothing would be lost on one of the two."""
    with Image.open(path) as picture:
        width, height = picture.size
        dots = np.asarray(picture.convert("RGBA"))
    assert dots[..., 3].min() == 255, "some of it is transparent"
    assert 600 <= width <= 2100 and height <= 1700 and path.stat().st_size < 300_000


def test_all_pictures_are_shown():
    kept = {path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".svg", ".jpg")}
    assert kept == set(SHOWN) and len(SHOWN) > 5
