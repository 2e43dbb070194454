"""Captions to words as COCO's evaluation does it, without its Java.

The published numbers come from Stanford's PTBTokenizer (lower case, Penn Treebank rules) with punctuation taken out
again (coco-caption's ptbtokenizer.py). These rules are written after what that program gives; tests hold recorded
outputs of it, oddities included: "(" becomes the word -lrb- and stays, "!" goes but "!!" stays.
"""

from __future__ import annotations

import re

# Abbreviations that keep their dot in the middle and at the end of a caption.
_ABBREVIATIONS = (
    "mr|mrs|ms|messrs|dr|drs|prof|st|ste|mt|jr|sr|vs|etc|inc|co|corp|ltd|bros|dept|est|gen|gov|sen|rep|sgt|capt|lt|"
    "col|maj|cmdr|adm|rev|hon|pres|ave|blvd|rd|ft|fig|al|ala|ariz|calif|colo|conn|fla|ga|ill|ind|mass|mich|minn|"
    "mo|mont|neb|nev|okla|ore|pa|penn|tenn|tex|vt|va|wash|wis|wyo|jan|feb|mar|apr|aug|sept|sep|oct|nov|dec|ph\\.d"
)
_TOKEN = re.compile(
    rf"""
      (?P<keep> https?://\S*[^\s.,;:!?'"()]                       # addresses
        | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
        | </?[a-z][^<>\s]*>
        | (?:[^\W\d_]\.)+[^\W\d_]\.?(?![\w'-]) | (?<![\w'.])[a-z]\.(?!\w) | c\+\+
        | (?:{_ABBREVIATIONS})\.(?!\w) | \bno\.(?=\s*\d)
        | (?:(?<=\s)|^)[-+]\d+(?:[.,:/]\d+)*\b
        | '\d\ds?\b(?!')
        | [\#@][^\W\d]\w*
        | [?!]{{2,}})
    | (?P<word> \w+(?:[-'’.,:&@/_](?=\w)\w+)* )
    | (?P<bracket> [(){{}}\[\]] )
    | (?P<drop> \.+ | -+ | [–—‘’“”"'`,:;?!…] )
    | (?P<other> \S )
    """,
    re.VERBOSE,
)
# A comma, a colon or a slash within digits belongs to the number; elsewhere it ends a word.
_INNER = re.compile(r"(?<=\D)[,:]|[,:](?=\D)")
_SUFFIX = re.compile(r"(?<=.)(n't|'(?:s|m|d|re|ve|ll|n))$")
_TWO = {
    "cannot": ["can", "not"], "gonna": ["gon", "na"], "gotta": ["got", "ta"], "wanna": ["wan", "na"],
    "lemme": ["lem", "me"], "gimme": ["gim", "me"], "whaddya": ["wha", "dd", "ya"],
}  # fmt: skip
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = re.compile(r"[a-z ]*")


def coco_tokens(text: str) -> list[str]:
    """The words of a caption: "A man's dog." -> ["a", "man", "'s", "dog"]."""
    text = text.lower().rstrip()
    # Most captions hold letters, and at the end a dot.
    bare = text.removesuffix(".")
    if _PLAIN.fullmatch(bare) and not bare[-2:-1].isspace():
        words = bare.split()
        if _TWO.keys().isdisjoint(words):
            return words
    found: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        match match.lastgroup:
            case "keep" | "other":
                found.append(token)
            case "bracket":
                found.append(_BRACKETS[token])
            case "word":
                for part in _INNER.split(token):
                    found += _word(part.replace("’", "'"))
    return found


def whitespace_tokens(text: str) -> list[str]:
    """What stands between blanks, as it is."""
    return text.split()


def _word(word: str) -> list[str]:
    """Contractions in two: "shouldn't've" -> ["should", "n't", "'ve"]."""
    suffixes: list[str] = []
    while (found := _SUFFIX.search(word)) is not None:
        suffixes.insert(0, found[0])
        word = word[: found.start()]
    return [*(_TWO.get(word) or ([word] if word else [])), *suffixes]


# --tokenize
TOKENIZERS = {"coco": coco_tokens, "whitespace": whitespace_tokens}
