"""Every relative link of the repository's Markdown pages leads somewhere, and docs/README.md lists every page of docs/."""

import pathlib
import re
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def pages():
    folders = [ROOT, ROOT / "docs", ROOT / "deploy", ROOT / "tests", ROOT / "tools"]
    return [ROOT / "README.md"] + sorted(p for f in folders[1:] for p in f.rglob("*.md"))


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def broken_links(page, text):
    broken = []
    for link in LINK.findall(without_code(text)):
        if link.startswith(("http://", "https://", "mailto:", "#")):
            continue
        if not (page.parent / link.split("#")[0]).exists():
            broken.append(f"{page}: {link}")
    return broken


class DocsLinksTest(unittest.TestCase):
    def test_links_resolve(self):
        broken = [b for page in pages() for b in broken_links(page, page.read_text(encoding="utf-8"))]
        self.assertFalse(broken, "\n" + "\n".join(broken))

    def test_index_lists_every_page(self):
        links = set(LINK.findall((ROOT / "docs/README.md").read_text(encoding="utf-8")))
        missing = [p.name for p in (ROOT / "docs").glob("*.md") if p.name not in links | {"README.md"}]
        self.assertFalse(missing, "docs/README.md does not list " + ", ".join(missing))

    def test_a_broken_link_is_found(self):
        page = ROOT / "docs/README.md"
        self.assertEqual(len(broken_links(page, "[a](no-such-page.md) [b](../README.md) [c](https://x.y)")), 1)


if __name__ == "__main__":
    sys.exit(unittest.main())
