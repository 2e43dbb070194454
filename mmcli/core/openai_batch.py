"""How a request of an OpenAI batch and its answer find one another: by `custom_id`."""

from __future__ import annotations

from hashlib import blake2b

# Where the requests of a batch go.
URL = "/v1/chat/completions"


def request_digest(body: bytes) -> str:
    """32 hex digits of a request's body: the same question about the same medium, asked in the same way."""
    return blake2b(body, digest_size=16).hexdigest()


def custom_id(row: int, question: int, body: bytes) -> str:
    """Unique within a batch, though inputs may be alike; at most 64 characters, the least that services allow.

    row, question  of the output, from 0
    """
    return f"{row}-{question}-{request_digest(body)}"


def digest_of(name: str) -> str:
    """The request's digest in a `custom_id`: found again wherever the row is by then."""
    return name.rpartition("-")[2]
