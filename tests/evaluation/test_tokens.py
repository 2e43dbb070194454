"""COCO's tokenizer: what Stanford's PTBTokenizer with pycocoevalcap 1.2 gives, recorded."""

from __future__ import annotations

import pytest

from mmcli.evaluation.tokens import coco_tokens

RECORDED = {
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    "Don't park here, it's a no-parking zone!": "do n't park here it 's a no-parking zone",
    "Two dogs' bowls (one blue; one red) are on the floor...": (
        "two dogs bowls -lrb- one blue one red -rrb- are on the floor"
    ),
    'The sign says "STOP" and "Don\'t walk".': "the sign says stop and do n't walk",
    "A plate of food: rice, beans, and a 1/2 avocado.": "a plate of food rice beans and a 1/2 avocado",
    "It costs $3.50, or 20% off.": "it costs $ 3.50 or 20 % off",
    "U.S. Air Force planes over St. Louis at 3:30 p.m.": "u.s. air force planes over st. louis at 3:30 p.m.",
    "A black-and-white cat -- sleeping -- on a mother's lap": ("a black-and-white cat sleeping on a mother 's lap"),
    "he'll I'm we've they'd can't won't cannot gonna gotta wanna lemme gimme": (
        "he 'll i 'm we 've they 'd ca n't wo n't can not gon na got ta wan na lem me gim me"
    ),
    "e.g. this, i.e. that, etc.": "e.g. this i.e. that etc.",
    "Mr. Smith & Mrs. Jones vs. Dr. Who": "mr. smith & mrs. jones vs. dr. who",
    "A [bracketed] {brace} text / slash": "a -lsb- bracketed -rsb- -lcb- brace -rcb- text / slash",
    "café naïve 北京 street": "café naïve 北京 street",
    "It was 1,000,000.5 or -5 degrees": "it was 1,000,000.5 or -5 degrees",
    "email me@x.com or http://a.com/b?c=d": "email me@x.com or http://a.com/b?c=d",
    "a man , a plan . a canal": "a man a plan a canal",
    "end of sentence.  Another one.": "end of sentence another one",
    "'quoted phrase' and ''double'' and `tick'": "quoted phrase and double and tick",
    "what?! really?? no!!! ok....": "what ?! really ?? no !!! ok",
    "a--b a-b a - b": "a b a-b a b",
    "A 2-year-old boy's toy. His. U.S.": "a 2-year-old boy 's toy his u.s.",
    "#hashtag @user *star* ~tilde ^hat a+b=c <tag> x_y": (
        "#hashtag @user * star * ~ tilde ^ hat a + b = c <tag> x_y"
    ),
    "The word isn't. Shouldn't've": "the word is n't should n't 've",
    "I.B.M. computer": "i.b.m. computer",
    "No. 5 on the list, no.": "no. 5 on the list no",
    "a man.A woman": "a man.a woman",
    "w/ a dog w/o a leash": "w / a dog w/o a leash",
    "Remove all items from D.": "remove all items from d.",
    "GIF ('87 and '89 variants)": "gif -lrb- '87 and '89 variants -rrb-",
    "a dog.  ": "a dog",
    ".": "",
    "": "",
}


@pytest.mark.parametrize("text", RECORDED)
def test_as_recorded(text: str) -> None:
    assert " ".join(coco_tokens(text)) == RECORDED[text]
