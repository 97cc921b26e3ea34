"""Weights, BREAK, LoRA tags and chunks, without models."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from models.make_tiny import tokenizer
from pipelines.errors import InvalidValueError
from pipelines.text.chunks import Token, into_chunks
from pipelines.text.syntax import LoraTag, check_weights, read_sections, take_lora_tags
from tests.support import prompts

PIECES = ["a", "b c", " ", ",", "(", ")", "[", "]", ":1.3)", ":-.5 )", ":", "\\", "\\(", "\\\\", " BREAK ", "BREAKS"]


def read(text: str) -> list[list[tuple[str, float]]]:
    return [[(f.text, pytest.approx(f.weight)) for f in section] for section in read_sections(text, "weighted")]


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("a (b:1.3) [c] ((d))", [[("a ", 1), ("b", 1.3), (" ", 1), ("c", 1 / 1.1), (" ", 1), ("d", 1.21)]]),
        ("(a (b:2) c:0.5)", [[("a ", 0.5), ("b", 1), (" c", 0.5)]]),
        (r"\(a\) \[b\] \\ c", [[(r"(a) [b] \ c", 1)]]),
        ("(a [b) c]", [[("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]]),
        ("((to the end", [[("to the end", 1.21)]]),
        ("nothing opened) b:1.3) c]", [[("nothing opened) b:1.3) c]", 1)]]),
        ("(no number:1.2.3)", [[("no number:1.2.3", 1.1)]]),
        ("(spaces : 1.2 )", [[("spaces ", 1.2)]]),
        ("a BREAK b BREAKS", [[("a", 1)], [("b BREAKS", 1)]]),
        ("(a BREAK b:1.5)", [[("a", 1.5)], [("b", 1.5)]]),
        ("BREAK a BREAK BREAK b BREAK", [[], [("a", 1)], [], [("b", 1)]]),
        ("", [[]]),
        ("()", [[]]),
    ],
)
def test_weighted_text(text: str, sections: list[list[tuple[str, float]]]) -> None:
    assert read(text) == sections


@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
@settings(deadline=None)
def test_any_text_reads_as_the_rules_say(text: str) -> None:
    """Beside a second reader, which multiplies weights in place; spaces around BREAK are no token of either."""

    def words(sections: list[list[tuple[str, float]]]) -> list[list[tuple[str, float]]]:
        letters = [[(letter, weight) for run, weight in section for letter in run] for section in sections]
        return [[(letter, pytest.approx(weight)) for letter, weight in section if letter != " "] for section in letters]

    ours = [[(f.text, f.weight) for f in section] for section in read_sections(text, "weighted")]
    assert words(ours) == words(prompts.parse(text))


@given(st.text(max_size=60))
@settings(deadline=None)
def test_plain_text_is_never_read(text: str) -> None:
    ((fragment,),) = read_sections(text, "plain")
    assert (fragment.text, fragment.weight) == (text, 1)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000,
        "[" * 10_000 + "x",
        "()" * 10_000,
        "(" * 10 + "[" * 10 + "x" + ")]" * 5_000,
        "((a:1)b:1)" * 2_000,
        "\\(" * 10_000,
        ":1" * 10_000,
        ":" + "1" * 19_000,
        " " * 20_000,
        "BREAK " * 3_000,
        "<lora:" * 3_000,
    ],
    ids=lambda text: text[:8],
)
def test_the_longest_texts_are_read_at_once(text: str) -> None:
    check_weights(take_lora_tags(text, "prompt")[0], "prompt")


@pytest.mark.parametrize(
    "text", ["(x:1000000000)", "(" * 10_000 + "x", "((x:99):2)", "(x:-101)", "(x:" + "9" * 400 + ")"]
)
def test_weights_out_of_range_are_named(text: str) -> None:
    with pytest.raises(
        InvalidValueError, match=r"prompt_2: the weight .* of 'x' is out of range: -100 to 100"
    ) as caught:
        check_weights(text, "prompt_2")
    assert caught.value.param == "prompt_2"


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:a>", LoraTag("a", 1, 1)),
        ("<LORA: a b : 0.5 >", LoraTag("a b", 0.5, 0.5)),
        ("<lora:a:0.5:-1>", LoraTag("a", 0.5, -1)),
        ("<lora:a:unet=0.3>", LoraTag("a", 1, 0.3)),
        ("<lora:a:te=0.2:unet=0.3>", LoraTag("a", 0.2, 0.3)),
        ("<lora:a:te=0.2>", LoraTag("a", 0.2, 0.2)),
    ],
)
def test_lora_tags_leave_the_text(tag: str, expected: LoraTag) -> None:
    assert take_lora_tags(f"x {tag}, y <b> <hypernet:c:1>", "prompt") == ("x , y <b> <hypernet:c:1>", (expected,))


@pytest.mark.parametrize(
    "tag", ["<lora:>", "<lora::1>", "<lora:a:>", "<lora:a:x>", "<lora:a:1:2:3>", "<lora:a:nan>", "<lora:a:te=inf>"]
)
def test_lora_tags_that_cannot_be_read_are_refused(tag: str) -> None:
    with pytest.raises(InvalidValueError, match="cannot be read; write <lora:name>"):
        take_lora_tags(f"x {tag}", "prompt")


@given(st.lists(st.lists(st.sampled_from(["w", ","]), max_size=200), min_size=1, max_size=3), st.integers(30, 75))
@settings(deadline=None)
def test_chunks_break_where_the_rules_say(sections: list[list[str]], room: int) -> None:
    words = tokenizer()
    words.model_max_length = room + 2
    ids = {letter: words(letter, add_special_tokens=False).input_ids[0] for letter in "w,"}
    ours = into_chunks([[Token(ids[letter], 1.0) for letter in section] for section in sections], room, ids[","])
    theirs = prompts.chunks(words, [[(" ".join(section), 1.0)] for section in sections])
    assert [unframed(words, chunk) for chunk, _ in theirs] == [[token.id for token in chunk] for chunk in ours]


def unframed(words: CLIPTokenizer, ids: list[int]) -> list[int]:
    return ids[1 : ids.index(words.eos_token_id)]


def test_a_vocabulary_without_a_comma_breaks_where_a_chunk_is_full() -> None:
    chunks = into_chunks([[Token(i, 1.0) for i in range(200)]], 75, None)
    assert [len(chunk) for chunk in chunks] == [75, 75, 50]
