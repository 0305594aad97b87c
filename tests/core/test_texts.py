"""Captions and tables as people's programs write them: read right, or refused with the line."""

from __future__ import annotations

import csv
import io
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from face_files import write_root

from ec2face_core.backbone import warn_of_lost_words
from ec2face_core.data import FaceDataset
from ec2face_core.io.report import DataError, Report
from ec2face_core.io.texts import (
    MANIFEST_COLUMNS,
    MAX_CAPTION,
    LostWordsWarning,
    Row,
    check_id,
    clean,
    describe_loss,
    lost_texts,
    read_captions,
    read_manifest,
    read_text,
)

TWO = ("She smiles.", "Café, naïve 漢字 😀.")


def captions_of(tmp_path, data: bytes) -> tuple[str, ...]:
    (tmp_path / "0.txt").write_bytes(data)
    return read_captions(tmp_path / "0.txt")


# ------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le-bom", "utf-16-be-bom"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", "\r\n \r\n"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    text = end.join(TWO) + end
    if encoding.endswith("-bom"):
        text = "\ufeff" + text
    assert captions_of(tmp_path, text.encode(encoding.removesuffix("-bom"))) == TWO


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x0b", "\x0c", "\x85", "\xa0", "\t"])
def test_other_separators_do_not_split_a_caption(tmp_path, separator):
    text = f"She smiles.{separator}She wears a hat.\nTwo."
    assert captions_of(tmp_path, text.encode()) == ("She smiles. She wears a hat.", "Two.")


def test_captions_are_composed_and_nothing_invisible_stays(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Café é")
    assert decomposed != "Café é"
    text = f"  {decomposed}\ufeff\u200b \u00ad"
    assert captions_of(tmp_path, text.encode()) == ("Café é",)
    assert clean("a \u200d b") == "a \u200d b"  # a joiner of scripts and emoji is no decoration
    assert clean("plain  text, 'quoted' \\ $5") == "plain  text, 'quoted' \\ $5"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty caption file"),
        (b" \r\n\t\r \xe2\x80\xa8\n", "empty caption file"),
        (b"\xef\xbb\xbf", "empty caption file"),
        ("One.\nTwo.\nCafé".encode("latin-1"), r"not UTF-8 \(.* at byte 13, line 3\)"),
        ("One.\r\nCaf“é”".encode("cp1252"), "line 2"),
        ("One.\rCafé".encode("latin-1"), "line 2"),
        ("漢字".encode("shift-jis"), "not UTF-8"),
        (
            "One.\nTwo.".encode("utf-16-le"),
            "a NUL byte in line 1.*UTF-16 without a byte order mark",
        ),
        (b"One.\nTw\0o.", "a NUL byte in line 2"),
        (b"\xff\xfeO\0n\0e", "not UTF-16"),
        (b"One.\nTwo.\x1a", r"line 2: control character U\+001A"),
        (b"One.\n\x1b[1mTwo", r"line 2: control character U\+001B"),
        (b"x" * (2**20 + 1), r"1\.0 MB are no captions"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8"),
    ],
)
def test_what_is_no_caption_is_refused_with_its_line(tmp_path, data, reason):
    with pytest.raises(DataError, match=reason):
        captions_of(tmp_path, data)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"unreadable caption.*No such file"):
        read_captions(tmp_path / "0.txt")
    (tmp_path / "1.txt").mkdir()
    with pytest.raises(DataError, match="unreadable"):
        read_captions(tmp_path / "1.txt")


def test_ordinary_captions_stay_what_they_are(tmp_path):
    lines = ("The woman has wavy hair.", "She is young, and smiles.", "5_o_Clock; 3,5 %")
    assert captions_of(tmp_path, "\n".join(lines).encode()) == lines
    assert read_text(tmp_path / "0.txt") == "\n".join(lines)


# ------------------------------------------------------------------------------------- manifest


def manifest(tmp_path: Path, data: bytes | str, encoding: str = "utf-8") -> dict[str, Row]:
    content = data if isinstance(data, bytes) else data.encode(encoding)
    (tmp_path / "manifest.csv").write_bytes(content)
    return read_manifest(tmp_path)


HEAD = "id,split,caption_index,caption\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_manifests_of_spreadsheets(tmp_path, encoding, end):
    rows = manifest(tmp_path, f"{HEAD}0,train,0,Café.\n".replace("\n", end), encoding)
    assert rows == {"0": Row("train", 0, "Café.")}


@pytest.mark.parametrize(
    "name", ["0012", "1e5", "NA", "nan", "None", "null", "1.0", "-0", "TRUE", "a b", "漢", "#NV"]
)
def test_ids_are_text(tmp_path, name):
    assert list(manifest(tmp_path, f"{HEAD}{name},train,0,One.\n")) == [name]


def test_quotes_commas_and_newlines_in_captions(tmp_path):
    captions = ['She says "hi", and smiles.', "Two\nlines.", "A; b", "'=1+1"]
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(MANIFEST_COLUMNS)
    writer.writerows([[str(i), "train", 0, text] for i, text in enumerate(captions)])
    rows = manifest(tmp_path, buffer.getvalue())
    assert [row.caption for row in rows.values()] == [text.replace("\n", " ") for text in captions]


def test_cells_are_trimmed_and_composed(tmp_path):
    name = unicodedata.normalize("NFD", "Amélie")
    rows = manifest(tmp_path, f" id ,split, caption_index,caption\n{name}, train , 1 , One. \n")
    assert rows == {"Amélie": Row("train", 1, "One.")}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0,train,0,a,b", "5 cells instead of 4: quote a caption"),
        ("0,train,0", "3 cells instead of 4"),
        ("0,train", "2 cells instead of 4"),
        ("0,train,0,", "empty caption of id 0"),
        ("0,train,0,\u200b", "empty caption"),
        (",train,0,x", "id ''"),
        ("0,,0,x", "split ''"),
        ("0,train,,x", "caption_index ''"),
        ("0,train,-1,x", "caption_index '-1'"),
        ("0,train,0.0,x", "caption_index '0.0'"),
        ("0,train,1e0,x", "caption_index '1e0'"),
        ("0,train,²,x", "caption_index '²'"),
        ("0,train,٣,x", "caption_index '٣'"),
        ("0,train,99999999999999999999,x", "caption_index"),
        ("../0,train,0,x", r"id '\.\./0' is no name of a file"),
        ("/etc/passwd,train,0,x", "is no name of a file"),
        ("a\\b,train,0,x", "is no name of a file"),
        (".hidden,train,0,x", "is no name of a file"),
        ('"a\nb",train,0,x', "is no name of a file"),
        ("0,train,0,\x07", r"control character U\+0007"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, reason):
    with pytest.raises(DataError, match=f"manifest.csv row 2: .*{reason}"):
        manifest(tmp_path, f"{HEAD}{row}\n")
    report = Report(tmp_path)
    (tmp_path / "manifest.csv").write_text(f"{HEAD}{row}\n1,train,0,Good.\n", newline="")
    assert list(read_manifest(tmp_path, report)) == ["1"] and len(report.problems) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", r"columns \[\]"),
        (
            "id;split;caption_index;caption\n0;train;0;x\n",
            "separated by ';', export it with commas",
        ),
        ("id\tsplit\tcaption_index\tcaption\n", r"separated by '\\t'"),
        ("id,caption\n", r"columns \['id', 'caption'\]"),
        ("ID,Split,Caption_Index,Caption\n", "columns"),
        (f'{HEAD}0,train,0,"never closed\n1,train,0,x\n', "unreadable .*line 3"),
        (f'{HEAD}0,train,0,"odd" quote\n', "unreadable .*line 2"),
        (f"{HEAD}0,train,0,{'x' * 200_000}\n", "unreadable .*field larger"),
        (f"{HEAD}0,train,0,Café\n".encode("latin-1"), r"manifest\.csv: not UTF-8 .*line 2"),
        (b"id\0,split", "NUL byte in line 1"),
        (HEAD.encode("utf-16-le"), "NUL byte in line 1"),
    ],
)
def test_tables_that_are_no_manifest(tmp_path, content, reason):
    with pytest.raises(DataError, match=reason):
        manifest(tmp_path, content)


def test_mutated_manifests_are_read_or_refused(tmp_path):
    """Any bytes: rows with whole cells, or `DataError`; never another exception."""
    good = (HEAD + "".join(f'{i:04d},train,{i},"Face, {i}."\n' for i in range(8))).encode()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(len(data)))
            kind = int(rng.integers(3))
            if kind == 0:
                data[place] = int(rng.integers(256))
            elif kind == 1:
                del data[place : place + int(rng.integers(1, 9))]
            else:
                data[place:place] = bytes(rng.integers(0, 256, 2, np.uint8))
        try:
            rows = manifest(tmp_path, bytes(data))
        except DataError as error:
            assert "manifest.csv" in str(error)
            refused += 1
        else:
            assert all(name and row.split and row.caption for name, row in rows.items())
    assert 100 < refused < 390


def test_lost_zeros_are_said(tmp_path):
    root = write_root(tmp_path / "faces")
    for kind in ("image", "mask", "text"):
        for path in list((root / kind).iterdir()):
            path.rename(path.with_name(f"00{path.name}"))
    with pytest.raises(
        DataError, match=r"missing image: 000\.png is there, whose id has other zeros"
    ):
        FaceDataset(root)


def test_texts_with_marks_are_one_data_set(tmp_path):
    """BOM and CRLF in captions and manifest: the same captions as without."""
    root = write_root(tmp_path / "faces")
    before = [face.captions for face in FaceDataset(root, None)]
    for path in [*(root / "text").iterdir(), root / "manifest.csv"]:
        text = path.read_text()
        path.write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    faces = FaceDataset(root, None)
    assert [face.captions for face in faces] == before
    assert faces.manifest_caption("1") == "Second of 1."


# ------------------------------------------------------------------------------------ lost words


@pytest.fixture(scope="module")
def tokenizers():
    """CLIP's and T5's of the miniature's kind, 24 tokens each."""
    from ec2face_lab.world.networks import _t5_tokenizer, clip_tokenizer

    corpus = [f"she has wavy hair and wears {what}." for what in ("a hat", "earrings", "glasses")]
    clip = clip_tokenizer(corpus, length=24)
    return SimpleNamespace(tokenizer=clip, tokenizer_2=_t5_tokenizer(corpus, length=24))


def test_lost_words_are_exactly_those_that_change_nothing(tokenizers):
    text = "she has wavy hair and " * 8 + "a red hat."
    for tokenizer in (tokenizers.tokenizer, tokenizers.tokenizer_2):
        options = {"padding": "max_length", "truncation": True, "max_length": 24}
        lost = lost_texts(tokenizer, [text, "a hat."], 24)
        assert list(lost) == [text] and text.endswith(lost[text]) and "red hat." in lost[text]
        kept = text.removesuffix(lost[text])
        assert tokenizer(text, **options).input_ids == tokenizer(kept, **options).input_ids
        shorter = kept.rstrip()[:-1]
        assert tokenizer(text, **options).input_ids != tokenizer(shorter, **options).input_ids


def test_a_text_that_fits_exactly_loses_nothing(tokenizers):
    tokenizer = tokenizers.tokenizer
    text = "hair " * 8
    length = len(tokenizer(text).input_ids)
    assert lost_texts(tokenizer, [text], length) == {}
    assert list(lost_texts(tokenizer, [text], length - 1).values()) == ["hair"]
    assert lost_texts(tokenizer, [], length) == {} == lost_texts(tokenizer, [""], length)


def test_one_warning_names_the_words(tokenizers):
    long = "she has wavy hair " * 9 + "and a red hat."
    with pytest.warns(
        LostWordsWarning, match=r"1 of 2 texts are longer than T5 .*red hat\."
    ) as seen:
        warn_of_lost_words(tokenizers, ["a hat.", long], 24)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lost_words(tokenizers, ["a hat.", ""], 24)
    with pytest.warns(LostWordsWarning, match="CLIP"):
        warn_of_lost_words(tokenizers, [long], 200)


def test_endless_losses_are_shortened():
    told = describe_loss({"a": "word " * 100_000, "b": "more"}, 7, "CLIP")
    assert told.startswith("2 of 7 texts are longer than CLIP reads") and len(told) < 300


@pytest.mark.parametrize(
    "text",
    [
        '["She smiles."]',
        '{"caption": "She smiles."}',
        '[\n  "She smiles.",\n  "A woman."\n]\n',
        '["She smiles.",\n "A wo',
        "['She smiles.', 'A woman.']",
        '{"text": "She smiles."}\n{"text": "A woman."}\n',
        "caption: She smiles.",
        "captions:\n  - She smiles.",
        "0,She smiles.",
        "00;She smiles.\n",
        "0.png\tShe smiles.",
        '"0.jpg","She smiles."',
        "id,caption\n0,She smiles.",
        "file_name,text\n0.png,She smiles.",
        '"She smiles, and ""laughs"""',
        "<!DOCTYPE html><title>404</title>",
        "{\\rtf1\\ansi She smiles.}",
    ],
)
def test_tables_are_no_captions(tmp_path, text):
    path = tmp_path / "0.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"holds .*: write plain text, one caption a line"):
        read_captions(path)


@pytest.mark.parametrize(
    "text",
    [
        "She smiles, and has brown hair.",
        "woman, smiling, blond hair",
        "3, perhaps 4 people",
        "[trigger] a woman who smiles",
        "{a|the} woman",
        "<s1> smiles.",
        "1. She smiles.",
        "A sign with the text: hello",
        "\u5979\u5fae\u7b11\u3002",
        'She says "hello".',
        "Captions are below her.",
    ],
)
def test_captions_with_odd_signs_are_captions(tmp_path, text):
    path = tmp_path / "0.txt"
    path.write_text(text)
    assert read_captions(path) == (text,)


def test_the_longest_caption_fits_into_a_manifest(tmp_path):
    path = tmp_path / "0.txt"
    path.write_text("a" * MAX_CAPTION)
    (caption,) = read_captions(path)
    rows = f'id,split,caption_index,caption\n0,test,0,"{caption}"\n'
    (tmp_path / "manifest.csv").write_text(rows)
    assert read_manifest(tmp_path)["0"].caption == caption
    path.write_text("A.\n" + "a" * (MAX_CAPTION + 1))
    with pytest.raises(DataError, match="line 2: 131,073 characters are no caption"):
        read_captions(path)


@pytest.mark.parametrize(
    "name",
    ["0 ", " 0", "0\u200b", "a\nb", "a\tb", "a\\b", "a/b", ".0", "", "\udcff\udcfe", "\x07",
     "a\u00a0b", "e\u0301", "a\u2028b", "9" * 161, "\u00e9" * 81],
)  # fmt: skip
def test_ids_that_a_manifest_cannot_hold_are_refused(name):
    with pytest.raises(DataError, match="rename the files of this face"):
        check_id(name)


@pytest.mark.parametrize(
    "name", ["0", "a b", "\u00e9", 'a,"b"', "=1+1", "\u00b2", "NA", "9" * 160, "a."]
)
def test_other_ids_are_kept(name):
    check_id(name)
