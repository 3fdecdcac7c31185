"""The page, read as a browser does: text, titles and what each token is marked as."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rwkv_core.data import preview
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.preview import Bar, Counts, Findings, histogram, read_findings
from rwkv_core.tokenizer import END, bytes_tokenizer, world

STATES = {"mark": "learned", "s": "cut"}


class Page(HTMLParser):
    """Documents as lists of (state, title, text), the texts of headers, and all else that is read."""

    def __init__(self, text):
        super().__init__()
        self.open, self.documents, self.headers, self.text, self.names = [], [], [], "", set()
        self.feed(text)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.names |= {tag, *(name for name, _ in attributes)}
        if tag in ("meta", "input"):
            return
        self.open.append(tag)
        match tag:
            case "article":
                self.documents.append([])
                self.headers.append("")
            case "i":
                state = next(t for t in reversed(self.open) if t in ("mark", "s", "span"))
                self.documents[-1].append((STATES.get(state, "ignored"), dict(attributes)["title"], ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "i" in self.open:
            state, title, text = self.documents[-1][-1]
            self.documents[-1][-1] = state, title, text + data
        elif "header" in self.open:
            self.headers[-1] += data + " "
        elif "style" not in self.open:
            self.text += data


def make(folder, documents, tokenizer=None, **how):
    """The page of documents of (tokens, learned, weight)."""
    writer = Writer(folder / "x")
    for tokens, learned, weight in documents:
        writer.add(tokens, None if learned is None else np.array(learned, bool), weight)
    writer.close()
    settings = {"side": "train", "ctx_len": 64, "rows": "stream", "samples": 20} | how
    preview.write(folder / "x.html", Documents(folder / "x"), tokenizer or world(), **settings)
    text = (folder / "x.html").read_text(encoding="utf-8")
    return Page(text), text


def chat(question, answer):
    asked, said = world().encode(f"User: {question}\n\nAssistant:"), [*world().encode(f" {answer}"), END]
    return [*asked, *said], [False] * len(asked) + [True] * len(said), 1.0


def test_each_token_is_shown_as_what_becomes_of_it(tmp_path):
    tokens, learned, _ = chat("What is it?\n\tlook", "A test, of two  blanks.")
    for rows, limit in (("stream", 10**6), ("pad", 12), ("only", 12)):
        page, _ = make(tmp_path, [(tokens, learned, 1.0)], rows=rows, ctx_len=12)
        shown = page.documents[0]
        assert [title for _, title, _ in shown] == [str(i) for i in tokens]
        assert "".join(text for _, _, text in shown[:-1]) == world().decode(tokens)  # blanks and line ends are there
        assert shown[-1][2] == "end"
        assert [state for state, _, _ in shown] == [
            "cut" if i >= limit else "learned" if learned[i] else "ignored" for i in range(len(tokens))
        ]


def test_a_state_reads_one_token_more(tmp_path):
    tokens, learned, _ = chat("What is it?", "A test.")
    page, _ = make(tmp_path, [(tokens, learned, 1.0)], rows="pad", ctx_len=5, after_state=True)
    assert [state for state, _, _ in page.documents[0]].index("cut") == 6


@pytest.mark.parametrize(
    "text",
    ["<script>alert('x')</script>", "</pre></body>", "&lt;b&gt; &amp; \"'", "{{ 7 * 7 }} {% raw %}", "a\\n<!-- b"],
)
def test_text_is_only_ever_text(text, tmp_path):
    finding = {"where": text, "message": text}
    page, raw = make(
        tmp_path,
        [chat(text, text)],
        findings={text: Findings(1, [finding])},
        manifest={text: {text: text}, "path": text},
        side=text,
    )
    assert "".join(shown for _, _, shown in page.documents[0]).count(text) == 2
    assert page.text.count(text) >= 6
    assert not page.names & {"script", "link", "img", "iframe", "href", "src", "onclick"}
    assert not re.search(r"https?:|url\(|@import", raw), "nothing is loaded"


def test_characters_of_several_tokens_are_shown_together_and_broken_ones_as_bytes(tmp_path):
    """Bytes, as the vocabulary of 256 has them."""
    tokens = [*"é龘🦅".encode(), 0xF0, 0x9F, END, 0xA6, 0x85, ord("x"), END]
    page, _ = make(tmp_path, [(tokens, None, 1.0)], bytes_tokenizer())
    assert [(title, text) for _, title, text in page.documents[0]] == [
        ("195 + 169", "é"), ("233 + 190 + 152", "龘"), ("240 + 159 + 166 + 133", "🦅"), ("240", "f0"), ("159", "9f"),
        ("0", "end"), ("166", "a6"), ("133", "85"), ("120", "x"), ("0", "end"),
    ]  # fmt: skip
    learned = [True, False, *[True] * (len(tokens) - 2)]
    page, _ = make(tmp_path, [(tokens, learned, 1.0)], bytes_tokenizer())  # of one half something else becomes
    assert [text for _, _, text in page.documents[0]][:3] == ["c3", "a9", "龘"]


def test_what_is_not_seen_is_named(tmp_path):
    page, _ = make(tmp_path, [([*world().encode("a\u200bb\u00a0c\u202ed\re🪿"), 65535, END], None, 1.0)])
    text = "".join(text for _, _, text in page.documents[0])
    assert text == "aU+200BbU+00A0cU+202EdU+000De🪿token 65535end"


def test_counts_add_up_and_are_said(tmp_path):
    rng = np.random.default_rng(0)
    documents = [
        (rng.integers(1, 60000, size).tolist(), (rng.random(size) < 0.5).tolist(), 1.0)
        for size in rng.integers(1, 200, 50)
    ]
    for rows, limit in (("stream", None), ("pad", 64)):
        page, _ = make(tmp_path, documents, rows=rows)
        learned = sum(sum(mask[:limit]) for _, mask, _ in documents)
        tokens = sum(len(x) for x, _, _ in documents)
        cut = sum(len(x[limit:]) for x, _, _ in documents) if limit else 0
        counts = preview.count(Documents(tmp_path / "x"), limit)
        assert counts == Counts(learned, tokens - cut - learned, cut, 50)
        assert counts.tokens == tokens
        for number in (tokens, learned, tokens - cut - learned, cut):
            assert f"{number:,}" in page.text
        assert f"{100 * learned / tokens:.1f} % of the tokens" in page.text
        longer = sum(len(x) > 64 for x, _, _ in documents)
        assert f"{longer} of 50 documents are longer" in page.text
        assert ("never read" in page.text) == (limit is not None)


def test_many_masks_are_counted_by_a_sample_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "_EXACT", 40)
    rng = np.random.default_rng(0)
    documents = [(rng.integers(1, 9, 50).tolist(), (rng.random(50) < 0.3).tolist(), 1.0) for _ in range(1000)]
    page, _ = make(tmp_path, documents)
    counts = preview.count(Documents(tmp_path / "x"), None)
    assert (counts.tokens, counts.cut, counts.looked_at) == (50_000, 0, 40)
    assert 0.25 < counts.learned / 50_000 < 0.35
    assert "estimated from 40 documents" in page.text


def test_samples_are_spread_and_the_longest_is_among_them(tmp_path):
    documents = [([i + 1] * (30 if i == 57 else 3), None, 0.5 if i == 0 else 1.0) for i in range(101)]
    page, _ = make(tmp_path, documents, samples=5)
    assert [int(header.split()[0]) for header in page.headers] == [0, 25, 50, 57, 75, 100]
    assert [i for i, header in enumerate(page.headers) if "the longest" in header] == [3]
    assert [i for i, header in enumerate(page.headers) if "weight 0.5" in header] == [0]
    assert [document[0][1] for document in page.documents] == ["1", "26", "51", "58", "76", "101"]


def test_of_a_long_document_the_ends_and_the_cut_are_shown(tmp_path):
    tokens = [5 + i % 100 for i in range(50_000)]
    page, raw = make(tmp_path, [(tokens, None, 1.0)], rows="pad", ctx_len=20_000)
    states = [state for state, _, _ in page.documents[0]]
    assert len(states) == 1500 + 300 + 200
    assert [states.count(state) for state in ("learned", "cut")] == [1650, 350]
    assert re.findall(r"([\d,]+) tokens are not shown", page.text) == ["18,350", "29,650"]
    assert len(raw) < 200_000


def test_nothing_to_show(tmp_path):
    page, _ = make(tmp_path, [], findings={})
    assert (page.documents, "There are none." in page.text, "None: no row" in page.text) == ([], True, True)
    page, _ = make(tmp_path, [([], None, 1.0)])
    assert page.documents == [[]]
    assert "Findings" not in page.text


def test_findings_are_by_code_the_most_frequent_first(tmp_path):
    rows = [f"colon-blank,a.jsonl:{i},1,is said" for i in range(12)]
    rows.insert(3, "end-text,b.jsonl:9,7,is said too")
    (tmp_path / "lints.csv").write_text("\n".join(["code,where,character,message", *rows]))
    page, _ = make(tmp_path, [chat("a", "b")], findings=read_findings(tmp_path / "lints.csv"))
    assert re.findall(r"(colon-blank|end-text)(\d+)", page.text) == [("colon-blank", "12"), ("end-text", "1")]
    assert re.findall(r"[ab]\.jsonl:\d+", page.text) == ["a.jsonl:0", "a.jsonl:1", "a.jsonl:2", "b.jsonl:9"]


@pytest.mark.parametrize("sizes", [[0], [1], [1, 2, 3, 4, 5, 8, 9], [100, 3000, 3000, 2**40], []])
def test_the_histogram_is_of_powers_of_two(sizes):
    bars = histogram(np.array(sizes, np.int64))
    assert sum(bar.documents for bar in bars) == len(sizes)
    for bar in bars:
        assert bar.documents == sum(max(bar.least, bar.most // 2 + 1) <= max(size, 1) <= bar.most for size in sizes)
    assert [a.most + 1 for a in bars[:-1]] == [b.least for b in bars[1:]]
    if len(sizes) == 7:
        assert bars == [Bar(0, 1, 1), Bar(2, 2, 1), Bar(3, 4, 2), Bar(5, 8, 2), Bar(9, 16, 1)]


def test_the_same_documents_are_the_same_page(tmp_path):
    pages = {make(tmp_path, [chat("a", "b"), chat("c", "d")])[1] for _ in range(2)}
    assert len(pages) == 1
