"""The one error a person is meant to read."""

import re

# The password in a URL; of a web server's all before the host, since a token may stand there.
SECRET = re.compile(
    r"""(https?://)[^\s'"]*@|(://[^:/@\s]*:)[^/\s]*@|([?&]\w*(?:password|token|key)=)[^&\s'"]*"""
)


class UserError(Exception):
    """A wrong value or state, told in one line: its name, what it was, what was allowed."""


def masked(text: str) -> str:
    """A text for a person or a log, with *** for the passwords of the URLs in it."""
    return SECRET.sub(
        lambda found: f"{found[3]}***" if found[3] else f"{found[1] or found[2]}***@", text
    )
