"""Refusals of chat models, and answers that look like them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.core.refusal import is_refusal

REFUSALS = """
I'm sorry, but I can't assist with that.
I’m sorry, but I cannot help with identifying people in images.
Sorry, I can't help with that request.
I am very sorry, but I am unable to view the image.
I apologize, but I cannot provide that information.
My apologies, but I'm not able to see the picture.
Apologies, but I couldn't process this video.
Unfortunately, I cannot determine the answer from the image.
Unfortunately, it is not possible to tell who this is.
Sorry, this request goes against my guidelines.
I'm sorry, but I won't describe this person.
As an AI language model, I do not have access to images.
As a large language model, I don't have eyes.
As an AI, my knowledge of the picture is limited.
I'm just an AI and cannot see pictures.
I am an AI assistant. I can't watch videos.
I cannot assist with that.
I can not identify real people.
I can't help you with that.
I can't see any image in our conversation. Please upload it.
I can't tell what is in the picture.
I cannot comply.
I won't help with that.
I will not assist with this request.
I'm unable to view images directly.
I'm currently unable to process audio.
I am not able to determine the colour.
I'm not comfortable answering that.
I am not programmed to discuss this.
I don't have the ability to hear audio files.
I do not feel comfortable describing this image.
Unable to analyze the image.
Unable to determine the number of people.
It is not possible to determine the age of the man.
It's impossible to say if the man is happy.
This request violates the content policy.
Your question goes against our usage policies.
"I'm sorry, but I can't assist with that."
**I cannot assist with that.**
"""

ANSWERS = """
A man who can't swim
A sign that says "I'm sorry"
A boy says sorry to his mother.
A person unable to walk sits in a wheelchair.
The man is unable to see the dog behind him.
The image shows a robot, an AI, that cannot climb stairs.
I can see a red circle on a white background.
I see a dog.
I am a red circle.
I can't help falling in love
I can't tell you how much I miss you
I can't hear you
I can't give up
I won't give up
I will not go quietly.
I couldn't stop laughing.
I'm not sure, perhaps a cat.
I'm not allowed to eat cake.
I'm sorry for your loss, says the card.
Sorry we're closed
Unfortunately for the fisherman, the boat is sinking.
As an airplane takes off, I see smoke.
As an aid worker hands out food, people wait.
It is impossible.
It's not possible to park here.
This question mark is red.
This content is sponsored.
no
Yes.
unclear
{"name": "sorry", "age": 3}

An AI generated image of a castle
Ai Weiwei's sunflower seeds
"""


@pytest.mark.parametrize("text", REFUSALS.strip().split("\n"))
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS.strip().split("\n"))
def test_answers(text: str) -> None:
    assert not is_refusal(text)


def test_a_refusal_over_two_lines() -> None:
    assert is_refusal("  I'm sorry,\n  but I can't do that.")


@given(st.text())
def test_any_text(text: str) -> None:
    assert is_refusal(text) in (True, False)
    assert not is_refusal("A picture of " + text)


def test_a_long_text_takes_no_time_of_its_square() -> None:
    for text in ("I'm sorry " * 20_000, "as an ai " * 20_000, "unfortunately " + "not " * 50_000):
        start = time.perf_counter()
        is_refusal(text)
        # The square of a length would be minutes.
        assert time.perf_counter() - start < 20
