"""A response as an endpoint gives it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One response to a prompt, whichever API it came by."""

    text: str
    num_tokens: int
    truncated: bool
    num_prompt_tokens: int = 0
    """Tokens of the prompt as the endpoint counts them; 0 where it does not say."""
