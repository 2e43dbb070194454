"""Whether a text is a chat model's refusal instead of an answer.

English only, and by the set phrases that chat models use: a flag that says which rows to look at, not a judgement.
Found are refusals that begin the text; not found are those in other languages, in words of the model's own ("Let's
talk about something else"), or behind an answer that was begun. "I cannot see any text in the picture" counts as a
refusal, though it may be true: nothing was answered there. Not meant for transcripts of speech: people say "I can't
see the road" themselves.
"""

from __future__ import annotations

import re

_NOT = r"(?:do not|don't)"
_UNABLE = r"(?:unable to|not able to|not (?:programmed|designed|permitted|equipped) to)"
_CANNOT = rf"(?:can ?not|can't|could not|couldn't|{_NOT} have the (?:ability|capability|capacity) to)"
_WONT = r"(?:won't|will not)"
# I cannot, I'm unable to
_I_CANNOT = rf"i(?: {_CANNOT}|(?: am|'m) (?:currently )?{_UNABLE})"
_MODEL = r"(?:an? )?(?:\w+ )?(?:ai|artificial intelligence|(?:large |visual |multimodal )*language model|chatbot)\b"
_SORRY = r"(?:(?:i'm|i am|we're|we are)?(?: \w+)? ?sorry|i(?: \w+)? apologi[sz]e|(?:my )?apologies|unfortunately)\b"
# What a model says that it cannot do: words of its own kind, and everyday words (see, tell) with a fitting object.
_OWN = r"(?:assist|comply|engage|discuss|fulfil+|help (?:you|with))\b"
_DO = (
    rf"(?:\w+ly )?(?:{_OWN}|(?:answer|provide|access|analy[sz]e|identify|recogni[sz]e|describe|determine|process|"
    r"interpret|respond|view|perform)\b|(?:see|hear|watch|open|read|tell|say|confirm|give|make|generate|create|do|"
    r"share) (?:the|this|that|any|an?|your|if|what|who|whether|images?|pictures?|videos?|audio|assumptions)\b)"
)

# Each is matched at the beginning of the text, in lower case and with plain apostrophes.
_PATTERNS = (
    # As an AI language model, I ...   I'm just an AI and cannot ...
    rf"as {_MODEL}[^.]{{0,60}}\b(?:i|my)\b",
    rf"(?:i'm|i am) (?:only |just )?{_MODEL}.{{0,80}}\b{_CANNOT}\b",
    # I cannot assist with that.   I'm unable to view images.   I won't help with that.
    rf"{_I_CANNOT} {_DO}",
    rf"i {_WONT} {_OWN}",
    rf"i(?:(?: am|'m) not| {_NOT} feel) comfortable (?:answering|describing|discussing|identifying|sharing)\b",
    # I'm sorry, but I can't ...   Unfortunately, it is not possible to ...
    rf"{_SORRY}.{{0,80}}?\b(?:{_I_CANNOT}|we {_CANNOT}|i {_WONT})\b",
    rf"{_SORRY}.{{0,60}}?\b(?:not possible|impossible|against)\b",
    # Unable to process the image.   It is not possible to determine ...
    rf"(?:{_UNABLE}|(?:it is|it's) (?:not possible|impossible) to) {_DO}",
    # That request goes against ...
    r"(?:this|that|your) (?:request|question|content)\b.{0,40}\b(?:violates?|goes against|is against)\b",
)
_REFUSAL = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS), re.DOTALL)


def is_refusal(text: str) -> bool:
    """Whether `text` is a refusal; see the module for what is found and what is not."""
    plain = " ".join(text.lower().replace("’", "'").split()).lstrip("\"'*`> ")
    return _REFUSAL.match(plain) is not None
