"""Where the keys of a TOML text stand."""

import tomllib

from hypothesis import given, settings
from hypothesis import strategies as st

from vfu_server.toml_lines import line_numbers, line_of


def test_lines_are_found_behind_strings_comments_and_brackets() -> None:
    rows = (
        'a = """',
        "b = 1",
        '"""  # c = [',
        "list = [  # [",
        "  [1, 2], # ]",
        '  "]", ',
        "]",
        "[t.'x.y'] # [no]",
        'deep."k e y" = { z = 1 }',
        "[[many]]",
        "v = '''x''' # '",
        "[[many]]",
        "[[many.below]]",
        "w = 1",
        "[many.table]",
        "u = '\"'",
        "last = 2",
    )
    text = "\n".join(rows)
    lines = line_numbers(text)
    assert lines == {
        (): 1,
        ("a",): 1,
        ("list",): 4,
        ("t",): 8,
        ("t", "x.y"): 8,
        ("t", "x.y", "deep"): 9,
        ("t", "x.y", "deep", "k e y"): 9,
        ("many",): 10,
        ("many", 0): 10,
        ("many", 0, "v"): 11,
        ("many", 1): 12,
        ("many", 1, "below"): 13,
        ("many", 1, "below", 0): 13,
        ("many", 1, "below", 0, "w"): 14,
        ("many", 1, "table"): 15,
        ("many", 1, "table", "u"): 16,
        ("many", 1, "table", "last"): 17,
    }
    assert line_of(lines, ("t", "x.y", "deep", "k e y", "z")) == 9
    assert line_of(lines, ("nothing", "here")) == 1


KEYS = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True),
    st.from_regex(r'"[a-z =.#\[\]\']{0,6}"', fullmatch=True),
    st.from_regex(r"'[a-z =.#\[\]\"]{0,6}'", fullmatch=True),
)
VALUES = st.sampled_from(
    ["1", '"x = 1 # ["', "'y\"'", '"""\n[a]\nb = 1\n"""', "'''\n[[a]]\n'''", "[1, 2]", '""', '"\\""', "1 # c = '''"]
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "[{}]", "[[{}]]"]), st.lists(KEYS, min_size=1, max_size=3), VALUES), max_size=6
    )
)
def test_lines_are_those_of_the_keys(statements) -> None:
    """A document built statement by statement, so that the right line of each key is known."""
    text = ""
    wanted: dict[int, str] = {}
    for form, keys, value in statements:
        statement = form.format(".".join(keys)) if form else f"{' . '.join(keys)} = {value}"
        try:
            tomllib.loads(f"{text}{statement}\n")
        except tomllib.TOMLDecodeError:
            continue  # defined twice, or the like
        if not form:
            wanted[text.count("\n") + 1] = keys[-1]
        text += f"{statement}\n"
    found = line_numbers(text)
    for line, key in wanted.items():
        name = key[1:-1] if key[0] in "\"'" else key
        assert any(path[-1:] == (name,) for path, at in found.items() if at == line)
    document = tomllib.loads(text)
    for path in found:
        at = document
        for part in path:
            at = at[part]
