"""The one error a person is meant to read."""

import re

SECRET = re.compile(r"(://[^:/@\s]*):[^/\s]*@|([?&]password=)[^&\s]*")  # the password in a URL


class UserError(Exception):
    """A wrong value or state, told in one line: its name, what it was, what was allowed."""


def masked(text: str) -> str:
    """A text for a person or a log, with *** for the passwords of the URLs in it."""
    return SECRET.sub(lambda found: f"{found[1]}:***@" if found[1] else f"{found[2]}***", text)
