"""Values of settings, read by the annotations in the source."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from isthmus.exporter.options import check_settings, coerce, load_yaml
from isthmus.exporter.registry import Entry, Option


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("int", "8", 8),
        ("int", "-3", -3),
        ("float", "1e-5", 1e-5),
        ("float", "1", 1.0),
        ("float", ".5", 0.5),
        ("bool", "true", True),
        ("bool", "no", False),
        ("str", "12", "12"),
        ("str", "a: b", "a: b"),
        ("tuple[int, ...]", "1,2", (1, 2)),
        ("tuple[int, ...]", "[1, 2]", (1, 2)),
        ("tuple[int, ...]", "(1, 2)", (1, 2)),
        ("tuple[int, ...]", "", ()),
        ("tuple[int, float]", "1,2", (1, 2.0)),
        ("int | None", "null", None),
        ("int | None", "4", 4),
        ("str | int", "4", 4),
        ("None | str", "x", "x"),
        ("Literal['a', 'b']", "b", "b"),
        ("Literal[1, 2]", "2", 2),
        ("tuple[tuple[int, ...], ...]", "[1, 2], [3]", ((1, 2), (3,))),
    ],
)
def test_texts_are_read(annotation, text, value):
    got = coerce(annotation, text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        ("int", "x"), ("int", "1.5"), ("int", "true"), ("int", True), ("int", 1.0), ("float", "nan"), ("float", "inf"), ("float", True),
        ("float", "1" * 400), ("bool", "1"), ("bool", 0), ("str", 1), ("tuple[int, ...]", "1,x"), ("tuple[int, int]", "1,2,3"),
        ("tuple[int, ...]", 3), ("int | None", "x"), ("Literal[1, 2]", "3"), ("Literal[1]", True), ("Callable[[int], int]", "1"),
        ("__import__('os').system('true')", "1"), ("int |", "1"), ("str", "x" * 100_000),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(annotation, value):
    with pytest.raises(ValueError, match=r"got .*, expected|cannot be read|characters"):
        coerce(annotation, value)


KINDS = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "int | None": int | None,
    "tuple[int, ...]": tuple[int, ...],
    "Literal['a', 2]": Literal["a", 2],
}


@given(
    st.sampled_from(sorted(KINDS)),
    st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none(), st.tuples(st.integers())),
)
def test_plain_values_are_taken_as_pydantic_takes_them_strictly(annotation, value):
    """An oracle for values that are not texts: pydantic in strict mode."""
    try:
        expected = TypeAdapter(KINDS[annotation]).validate_python(value, strict=True)
    except ValidationError:
        with pytest.raises(ValueError, match="expected"):
            coerce(annotation, value)
    else:
        assert coerce(annotation, value) == expected


@given(st.text(max_size=50))
def test_any_text_is_read_or_refused_with_a_value_error(text):
    for annotation in KINDS:
        try:
            coerce(annotation, text)
        except ValueError as error:
            assert "expected" in str(error)  # noqa: PT017 - most texts are refused, and some are read


def test_settings_name_the_unknown_and_the_wrong():
    options = {"depth": Option("depth", "int", 12), "ratio": Option("ratio", "float", 4.0)}
    values, problems = check_settings(Entry("m", "m", options=options), {"depth": "3", "ratio": "x", "dept": "1"})
    assert values == {"depth": 3}
    assert [str(p) for p in problems] == [
        "--set ratio: got 'x', expected float (fix: the default is ratio=4.0)",
        "--set: unknown setting of m 'dept' (fix: did you mean depth?)",
    ]


@pytest.mark.parametrize("text", ["&a [*a]", "a: 1\na: 2", "!!python/name:os.system", "[" * 50_000, "{", "\x00", "2024-99-99"])
def test_yaml_that_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        load_yaml(text)
