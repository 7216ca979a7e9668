"""Bytes to text, in the order of the HTML standard's encoding sniffing.

Byte order mark, then the header, then `<meta charset>`, then UTF-8, and windows-1252 for what is not valid UTF-8
(HTML standard, 'determining the character encoding'; label meanings from the WHATWG encoding standard).
"""

from __future__ import annotations

import codecs
import re

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_META = re.compile(rb"""<meta[^>]{0,512}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{1,40})""", re.IGNORECASE)
_META_WITHIN = 1024
"""The standard looks for the declaration in the first 1024 bytes."""

# Only charsets that pages are written in: Python also knows 'idna', 'punycode' or 'utf-7' by that name, some of them
# slow on purpose-built input and none of them a web page's.
_PAGE_CHARSETS = ("utf-8", "utf-16", "iso8859", "cp", "koi8", "gb", "big5", "shift_jis", "euc", "iso2022", "mac")
_READ_AS = {"ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}


def decode_text(body: bytes, header_charset: str | None, *, html: bool) -> str:
    """The text of a body; what does not decode becomes U+FFFD. Looks for `<meta charset>` where `html`."""
    for mark, name in _BOMS:
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    declared = _known(header_charset)
    if declared is None and html and (found := _META.search(body[:_META_WITHIN])):
        declared = _known(found[1].decode("ascii"))
        if declared is not None and declared.startswith("utf-16"):
            # A declaration that could be read byte by byte can't be in UTF-16.
            declared = "utf-8"
    if declared is not None:
        return body.decode(declared, "replace")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body.decode("cp1252", "replace")


def _known(label: str | None) -> str | None:
    if not label:
        return None
    try:
        name = codecs.lookup(label.strip().strip("\"'")).name
    except (LookupError, ValueError):
        return None
    name = _READ_AS.get(name, name)
    return name if name.startswith(_PAGE_CHARSETS) else None
