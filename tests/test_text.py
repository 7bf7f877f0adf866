import pytest
from nanogpt.sample import TextStream

from nanogpt.tokenizer import ByteTokenizer


def pieces(text: str, stop: list[str], prompt: str = "") -> tuple[list[str], bool]:
    """What a stream gives for the bytes of a text, one at a time."""
    stream = TextStream(ByteTokenizer(), list(prompt.encode()), stop)
    given = []
    for byte in text.encode():
        given.append(stream.push([byte]))
        if stream.stopped:
            break
    else:
        given.append(stream.push([], final=True))
    return given, stream.stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcabd", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("abab", ["abc"], "abab"),  # a beginning that never became one
        ("one two", ["two", "one t"], ""),
        ("one, two", ["wo", "two"], "one, "),  # the one that begins first, though both are there at once
        ("x€y€", ["y€"], "x€"),
        ("anything", [], "anything"),
    ],
)
def test_a_text_ends_before_its_stop_string(text: str, stop: list[str], expected: str) -> None:
    given, stopped = pieces(text, stop)
    assert "".join(given) == expected
    assert stopped == (expected != text)


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    assert pieces("ab\nc\n\nd", ["\n\n"]) == (["a", "b", "", "\nc", "", ""], True)
    assert pieces("€", [])[0] == ["", "", "€", ""]  # three bytes
    assert pieces("\nb", ["\n\n"], prompt="a\n")[0] == ["", "\nb", ""]  # the prompt is no part of the text


def test_a_character_that_is_cut_off_is_shown_as_such() -> None:
    stream = TextStream(ByteTokenizer())
    assert stream.push(list("€".encode()[:2])) == ""
    assert stream.push([], final=True) == "\ufffd"
