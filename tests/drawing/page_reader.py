"""Reads a report as a browser would, to see what it fetches."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Collects what a browser would have to fetch, and tags without a text alternative."""

    def __init__(self):
        super().__init__()
        self.fetched, self.silent, self.tags, self.ids = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        for key in ("src", "href", "xlink:href", "data", "srcset"):
            target = values.get(key) or "#"
            if not target.startswith(("#", "data:image/")):
                self.fetched.append(target)
        if (tag == "img" and not values.get("alt")) or (
            tag == "svg" and not values.get("aria-label")
        ):
            self.silent.append(tag)


def read_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page
