"""The texts of methods and compressors: what is read, what is written, and what is refused in a sentence."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distcomp
from distcomp.compressors import Chain, Compressor, Quantize, RandomK, ScaledSign, TopK, parse_compressor
from distcomp.errors import DistcompError
from distcomp.grammar import MOST_CHARACTERS, MOST_NESTED, split_call
from distcomp.methods import METHODS, Method, compressor_of, from_compressor, parse
from distcomp.registry import COMPRESSORS, load_all
from distcomp.schedule import Schedule
from tests.buffers import draw
from tests.lockstep import once
from tests.registry import text_fuzz

load_all()


def deep(depth: int, text: str = "qsgd") -> str:
    for _ in range(depth):
        text = f"warmup:inner=({text})"
    return text


REFUSED = {
    "twice": ("qsgd:bits=4,bits=2", "bits is given twice"),
    "a fraction for a count": ("qsgd:bits=4.0", "bits takes int"),
    "a word for a number": ("topk:ratio=much", "ratio takes float, not 'much'; the default is 0.01"),
    "a number for a word": ("qsgd:norm=max,block=max", "block takes int"),
    "words for numbers in a tuple": ("onebit_adam:betas=('a','b')", "betas takes"),
    "a tuple too short": ("onebit_adam:betas=(0.9,)", "betas takes"),
    "a number that overflows": ("qsgd:block=100000000000000000000", "block takes int"),
    "a float that overflows": (f"topk:ratio=1{'0' * 400}", "ratio takes float"),
    "a value too long": ("qsgd:block=" + "1" * 1_000_000, f"at most {MOST_CHARACTERS} characters"),
    "brackets too deep": ("qsgd:block=" + "(" * 500 + ")" * 500, f"at most {MOST_NESTED} deep"),
    "methods too deep": (deep(MOST_NESTED + 1), f"at most {MOST_NESTED} deep"),
    "without brackets, too deep": ("warmup:inner=" * 50 + "qsgd", f"at most {MOST_NESTED} deep"),
    "a bracket left open": ("two_level:across=(qsgd:bits=4", "is not closed"),
    "a bracket closed twice": ("two_level:across=qsgd),inside=bf16", "is not closed"),
    "a quote left open": ("qsgd:norm='max", "is not closed"),
    "a name nearly right": ("qsdg:bits=4", r"did you mean qsgd\?"),
    "a setting nearly right": ("qsgd:bit=4", r"did you mean bits\?"),
    "a compressor nearly right": ("ef21:compressor=Quantise", r"did you mean quantize\?"),
    "a schedule of a word": ("qsgd:norm=1 -> 2 @ 5", "norm cannot change with the step"),
    "a schedule of a tuple": ("two_level:nodes=1 -> 2 @ 5", "nodes cannot change with the step"),
    "a count by halves": ("topk:chunk=1 ~> 0.01 @ 3", "chunk counts; give a schedule of whole numbers"),
    "no number at all": ("powersgd:min_compression=1e999", "min_compression takes float, not inf"),
    "a word without end": ("fixed_point:pattern=" + "1" * 5000, "pattern takes str"),
    "a text without end": (f"warmup:inner=(qsgd:{'b' * 5000})", "qsgd has no setting"),
    "a schedule without end": (f"qsgd:bits=1 -> {'1' * 5000} x", "takes int|is no schedule"),
    "a topology misspelt": ("dcd:topology=rng", "there is no topology 'rng'"),
    "a step beyond the mean": ("deepsqueeze:eta=100000000000000000000", "eta is above 0 and at most 1"),
    "more than all bytes": ("allocate:budget=1e308", "above 0 and at most 100"),
    "a rotation of everything": ("shared_range:hadamard=true,block=1073741824", "at most 1,048,576"),
    "no gradient method": ("warmup:inner=local_sgd", "no method for gradients"),
}


@pytest.mark.parametrize(("text", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(DistcompError, match=sentence) as refusal:
        parse(text)
    assert len(str(refusal.value)) < 1500
    assert "\n" not in str(refusal.value)


CALLS = {
    "a float": lambda: distcomp.qsgd(4.0),
    "a text": lambda: distcomp.qsgd(bits="4"),
    "a truth": lambda: distcomp.qsgd(bits=True),
    "a number for a word": lambda: distcomp.qsgd(norm=2),
    "a number for a method": lambda: distcomp.warmup(5),
    "a text for a number": lambda: distcomp.topk("0.1"),
    "nan": lambda: distcomp.topk(float("nan")),
    "a list too long": lambda: distcomp.onebit_adam(betas=[0.9, 0.99, 0.999]),
    "an averaging's": lambda: distcomp.choco(gamma="much"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_is_held_to_the_same_annotations(call) -> None:
    with pytest.raises(DistcompError, match=r"^\w+: \w+ takes .+, not "):
        call()


def test_what_fits_after_all_is_made_to_fit() -> None:
    assert repr(distcomp.topk(1)) == repr(distcomp.topk(1.0))
    assert distcomp.onebit_adam(betas=[0, 0.99]) == distcomp.onebit_adam(betas=(0.0, 0.99))
    assert distcomp.qsgd(torch.tensor(3).item()) == parse("qsgd:bits=3")


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (distcomp.qsgd(bits=4), "qsgd"),
        (distcomp.qsgd(bits=8, block=512, error_feedback=False), "qsgd:bits=8"),
        (distcomp.qsgd("8 -> 4 @ 1000"), "qsgd:bits=8 -> 4 @ 1000"),
        (distcomp.powersgd(Schedule(((0, 4), (10, 2)))), "powersgd:rank=4 -> 2 @ 10"),
        (distcomp.ef21("quantize:bits=4"), "ef21:compressor=quantize"),
        (distcomp.ef21(Quantize(3, block=512)), "ef21:compressor=(quantize:bits=3)"),
        (distcomp.ef21("quantize:block=512, bits=1"), "ef21:compressor=int1"),
        (distcomp.warmup("(qsgd:bits=4)", 5), "warmup:inner=qsgd,steps=5"),
        (distcomp.topk(values=Quantize(4, rounding="nearest")), "topk:values=int4"),
        (distcomp.topk(values="4bit"), "topk:values=int4"),
        (distcomp.choco("sign"), "choco:compressor=sign"),
        (distcomp.warmup("none"), "warmup:inner=(none)"),
        (distcomp.warmup("qsgd:bits=8 -> 4 @ 1000"), "warmup:inner=(qsgd:bits=8 -> 4 @ 1000)"),
        (distcomp.diloco(50, TopK(0.1)), "diloco:period=50,compressor=(topk:ratio=0.1)"),
        (distcomp.local_sgd("1 -> 16 @ 5000"), "local_sgd:period=1 -> 16 @ 5000"),
        (
            distcomp.two_level("bf16", "qsgd:bits=2,block=64", ((0, 1), (2, 3))),
            "two_level:inside=bf16,across=(qsgd:bits=2,block=64),nodes=((0, 1), (2, 3))",
        ),
    ],
    ids=str,
)
def test_a_method_has_one_text(method: object, text: str) -> None:
    assert str(method) == text
    assert str(parse(text)) == text


def test_a_text_means_the_same_wherever_a_compressor_is_wanted() -> None:
    assert compressor_of("topk:ratio=0.1") == TopK(0.1)
    assert compressor_of("random_k:ratio=0.1,scaled=false") == RandomK(0.1, scaled=False)
    assert compressor_of("sign") == parse_compressor("sign") == ScaledSign()
    assert compressor_of("topk:ratio=0.1,values=int4") == Chain(TopK(0.1), Quantize(4, rounding="nearest"))
    assert compressor_of("qsgd:bits=2") == compressor_of(distcomp.qsgd(bits=2))
    chained = "chain:sparsifier=(topk:ratio=0.1),quantizer=(quantize:bits=2)"
    assert parse_compressor(chained) == Chain(TopK(0.1), Quantize(2))
    assert str(parse_compressor(chained)) == chained


def test_what_was_put_together_by_hand_says_what_it_is_made_of() -> None:
    method = from_compressor(Quantize(4))
    assert str(method) == repr(method)
    assert method.text is None


@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_a_compressors_name_is_read_and_written(name: str) -> None:
    compressor = parse_compressor(name)
    assert isinstance(compressor, Compressor)
    assert parse_compressor(str(compressor)) == compressor
    assert str(parse_compressor(str(compressor))) == str(compressor)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_methods_name_is_read_and_written(name: str) -> None:
    assert str(parse(name)) == name
    assert parse(str(parse(name))) == parse(name)


def test_none_is_a_method_where_no_value_may_be_left_out() -> None:
    assert parse("warmup:inner=none") == distcomp.warmup("none")


@pytest.mark.parametrize("text", ["natural:block=2147483647", "shared_range:block=2147483647"])
def test_a_block_longer_than_every_parameter_is_one_block_of_each(text: str) -> None:
    """The values are those of any block that is long enough, and so is the memory."""
    given = draw(2, text_fuzz.LAYOUT)
    long, enough = (
        once(parse(one), given, text_fuzz.LAYOUT) for one in (text, f"{text.split(':')[0]}:block=480")
    )
    assert torch.equal(long.estimate, enough.estimate)
    assert long.sent_bytes == enough.sent_bytes


def test_odd_texts_are_refused_or_make_a_method_that_works() -> None:
    """``python -m benchmarks.fuzz_texts`` tries 20,000."""
    became = [text_fuzz.try_to_use(*case) for case in text_fuzz.cases(400, seed=0)]
    assert 40 < became.count("used") < 360


TEXTS = [
    *REFUSED.keys(),
    "qsgd:bits=4",
    "ef21:compressor=(topk:ratio=0.1),eta=0.5",
    deep(3),
    "choco:gamma=0.5",
]
PIECES = st.sampled_from([*"(){}[]'\",:=@", "->", "~>", "none", "1e309", "-1", "0x1", "qsgd", "values", "é"])


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(TEXTS), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 4), PIECES), max_size=6))
def test_damaged_texts_make_a_method_or_a_sentence(text: str, edits: list[tuple[int, int, str]]) -> None:
    for place, removed, added in edits:
        text = text[:place] + added + text[place + removed :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = parse(text)
        except DistcompError:
            return
        if isinstance(made, Method):
            assert parse(str(made)) == made


@given(st.text(max_size=200))
def test_any_text_is_cut_or_refused(text: str) -> None:
    try:
        name, texts = split_call(text, "method")
    except DistcompError:
        return
    assert isinstance(name, str)
    assert all(value is None or isinstance(value, str) for value in texts.values())
