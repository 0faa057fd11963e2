import json
import os
import pickle

import numpy as np
import pytest
import soundfile

from bivl.core.errors import UserError
from bivl.data import transcripts
from bivl.data.audio import decode_audio
from bivl.data.speech import holds_speech, librispeech_table, speech_folder_table


def write(folder, *names):
    """Sounds of one level each, so that a decoded one tells which it was: 0.1, 0.2, ..."""
    for number, name in enumerate(names, 1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.full(160, number / 10), 16_000, format="WAV")
    return folder


def records(folder, split="train", table=speech_folder_table):
    """{file name: (text, class name)}, None for columns that the table lacks."""
    table = table({"dir": str(folder), "split": split})
    rows = table.rows(tuple(table.columns))
    names = table.columns["label"].names if "label" in table.columns else None
    found = {}
    for i in range(len(rows)):
        row = rows[i]
        assert rows.where(i) == row["audio"]
        text = row["text"] if "text" in table.columns else None
        found[os.path.relpath(row["audio"], folder)] = (text, names and names[row["label"]])
    assert len(found) == len(rows)
    return found


def message(folder, split="train", table=speech_folder_table):
    with pytest.raises(UserError) as error:
        table({"dir": str(folder), "split": split})
    assert "\n" not in str(error.value)
    return str(error.value)


TRANSCRIPTS = {
    "transcripts.tsv": "a.wav\tone two\n\nsub/b.wav\tthree \r\n",
    "transcripts.jsonl": '{"audio": "a.wav", "text": "one two"}\n'
    '{"audio": "./sub/b.wav", "text": "three", "more": 1}\n',
    "metadata.csv": 'file_name,transcription,x\na.wav,"one two",1\nsub/b.wav,three,2\n',
    "transcription": "<s> one two </s> (a)\n<s> three </s> (b)\n",
    "cards.transcription": "one two (a)\n<s> three  </s> (sub/b)\n",
    "any.trans.txt": "a one two\nsub/b three\n",
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts(tmp_path, name):
    write(tmp_path, "a.wav", "sub/b.wav", "unspoken.wav")
    (tmp_path / name).write_text("\ufeff" + TRANSCRIPTS[name], "utf-8")  # as Windows begins files
    assert records(tmp_path) == {"a.wav": ("one two", None), "sub/b.wav": ("three", None)}


def test_records_are_decodable_and_travel(tmp_path):
    write(tmp_path, "a.wav", "b.wav")
    (tmp_path / "transcripts.tsv").write_text("b.wav\tgrün\na.wav\tblau\n", "utf-8")
    table = speech_folder_table({"dir": str(tmp_path)})
    rows = pickle.loads(pickle.dumps(table.rows(("audio", "text"))))
    levels = {rows[i]["text"]: decode_audio(rows[i]["audio"]).mean() for i in range(2)}
    assert levels == pytest.approx({"blau": 0.1, "grün": 0.2}, abs=1e-3)


def test_text_is_kept_whole(tmp_path):
    write(tmp_path, "a.wav", "b.wav")
    (tmp_path / "transcription").write_text("<s> one (or two) </s> (a)\n<s>three</s> (b)\n")
    assert {text for text, _ in records(tmp_path).values()} == {"one (or two)", "three"}


def test_splits_are_folders(tmp_path):
    write(tmp_path, "train/a.wav", "train/b.wav", "test/a.wav")
    (tmp_path / "train/transcripts.tsv").write_text("a.wav\tone\nb.wav\ttwo\n")
    (tmp_path / "test/transcripts.tsv").write_text("a.wav\tthree\n")
    assert records(tmp_path, "test") == {"test/a.wav": ("three", None)}
    assert set(records(tmp_path, "train")) == {"train/a.wav", "train/b.wav"}
    assert len(records(tmp_path, "train[:50%]+test")) == 2
    assert "did you mean 'test'" in message(tmp_path, "tst")
    assert "does not exist" in message(tmp_path, "../other")
    (tmp_path / "test/transcripts.tsv").unlink()
    assert records(tmp_path, "test") == {"test/a.wav": (None, None)}
    assert "test has no transcripts" in message(tmp_path, "train+test")


def test_without_its_own_train_a_test_set_is_not_taken_for_it(tmp_path):
    write(tmp_path, "test-clean/a.wav", "dev_clean/b.wav")
    assert "there is dev_clean, test-clean" in message(tmp_path)


def test_one_folder_is_the_split_train(tmp_path):
    write(tmp_path, *(f"{i}.wav" for i in range(9)))
    first, second = (set(records(tmp_path, split)) for split in ("train[:4]", "train[4:]"))
    assert len(first) == 4 and len(second) == 5 and not first & second
    wrong = message(tmp_path, "test")
    assert "no split 'test'" in wrong and "train[90%:]" in wrong


def test_folders_are_classes(tmp_path):
    write(tmp_path, "train/yes/a.wav", "train/no/a.wav", "test/no/b.wav", "test/up/b.flac")
    write(tmp_path, "train/_background_noise_/hum.wav")
    assert records(tmp_path) == {
        "train/yes/a.wav": (None, "yes"),
        "train/no/a.wav": (None, "no"),
    }
    names = speech_folder_table({"dir": str(tmp_path), "split": "test"}).columns["label"].names
    assert names == ("no", "up", "yes")  # over all splits, so that numbers agree
    write(tmp_path, "test/loose.wav")
    assert {name for _, name in records(tmp_path).values()} == {None}


def test_classes_without_splits(tmp_path):
    write(tmp_path, "yes/a.wav", "no/a.wav")
    assert records(tmp_path) == {"yes/a.wav": (None, "yes"), "no/a.wav": (None, "no")}


@pytest.mark.parametrize("name", ["../secret.wav", "{outside}/secret.wav", "gone.wav", "link.wav"])
def test_transcripts_name_only_files_inside(tmp_path, name):
    folder = write(tmp_path / "data", "a.wav")
    write(tmp_path, "secret.wav")
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    name = name.format(outside=tmp_path)
    for file, text in {
        "transcripts.tsv": f"a.wav\tone\n{name}\ttwo\n",
        "transcripts.jsonl": json.dumps({"audio": name, "text": "two"}),
        "metadata.csv": f"file_name,transcription\n{name},two\n",
        "transcription": f"two ({name.removesuffix('.wav')})\n",
        "x.trans.txt": f"{name.removesuffix('.wav')} two\n",
    }.items():
        (folder / file).write_text(text)
        wrong = message(folder)
        assert file in wrong and name.removesuffix(".wav") in wrong
        (folder / file).unlink()


def test_links_out_of_the_folder_are_left_out(tmp_path):
    folder = write(tmp_path / "data", "in/a.wav")
    write(tmp_path / "other", "b.wav")
    (folder / "in" / "link.wav").symlink_to(tmp_path / "other" / "b.wav")
    (folder / "out").symlink_to(tmp_path / "other")
    (folder / "in" / "round").symlink_to(folder)  # a circle
    (folder / "broken.wav").symlink_to(folder / "none.wav")
    assert set(records(folder)) == {"in/a.wav"}


def test_transcript_errors(tmp_path):
    write(tmp_path, "a.wav", "x/b.wav", "y/b.wav")

    def wrong(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        found = message(tmp_path)
        (tmp_path / name).unlink()
        return found

    assert "line 2" in wrong("transcripts.tsv", "a.wav\tone\nno tab\n")
    assert "line 1" in wrong("transcripts.jsonl", "[" * 100_000)
    assert "line 1" in wrong("transcripts.jsonl", "[1]")
    assert "line 1" in wrong("transcripts.jsonl", '{"audio": "a.wav", "text": 3}')
    assert "line 1" in wrong("transcription", "no id\n")
    assert "transcription" in wrong("metadata.csv", "file_name,words\na.wav,one\n")
    assert "transcription" in wrong("metadata.csv", "file_name,transcription\na.wav\n")
    assert "CSV" in wrong("metadata.csv", "file_name,transcription\na.wav," + "x" * 200_000)
    assert "UTF-8" in wrong("transcripts.tsv", b"a.wav\t\xff\n")
    assert "two transcripts" in wrong("transcripts.tsv", "a.wav\tone\n./a.wav\ttwo\n")
    assert "not the name of one sound" in wrong("transcription", "one (b)\n")  # x/b or y/b
    (tmp_path / "transcription").write_text("one (a)\n")
    assert "keep one" in wrong("transcripts.tsv", "a.wav\tone\n")


def test_transcripts_are_bounded(tmp_path, monkeypatch):
    write(tmp_path, "a.wav")
    (tmp_path / "transcripts.tsv").write_text("a.wav\tone\n")
    monkeypatch.setattr(transcripts, "MAX_BYTES", 5)
    assert "larger than 5 bytes" in message(tmp_path)


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match=r"data\.dir is empty"):
        speech_folder_table({})
    assert "is not a folder" in message(tmp_path / "nowhere")
    assert "holds no sounds" in message(tmp_path)
    assert "holds no LibriSpeech" in message(tmp_path, table=librispeech_table)


def libri(root):
    for speaker, chapter in ((19, 198), (103, 1240)):
        name = f"{speaker}/{chapter}/{speaker}-{chapter}"
        write(root, *(f"train-clean-100/{name}-{i:04}.flac" for i in range(2)))
        (root / f"train-clean-100/{name}.trans.txt").write_text(
            "".join(f"{speaker}-{chapter}-{i:04} WORD {speaker} {i}\n" for i in range(2))
        )
    write(root, "dev-clean/84/1/84-1-0000.flac")
    (root / "dev-clean/84/1/84-1.trans.txt").write_text("84-1-0000 DEV\n")
    (root / "SPEAKERS.TXT").write_text("about\n")


@pytest.mark.parametrize("above", [False, True])
def test_librispeech(tmp_path, above):
    libri(tmp_path / "LibriSpeech" if above else tmp_path)
    found = records(tmp_path, "train-clean-100", librispeech_table)
    assert len(found) == 4
    for path, (text, speaker) in found.items():
        name = os.path.basename(path).removesuffix(".flac")
        assert speaker == name.split("-")[0] and text == f"WORD {speaker} {int(name[-4:])}"
    assert len(records(tmp_path, "train-clean-100[:50%]+dev-clean", librispeech_table)) == 3
    table = librispeech_table({"dir": str(tmp_path), "split": "dev-clean"})
    assert table.columns["label"].names == ("19", "84", "103")  # over all splits, as numbers
    assert "there is dev-clean, train-clean-100" in message(tmp_path, "train", librispeech_table)


def test_librispeech_misses_a_file(tmp_path):
    libri(tmp_path)
    (tmp_path / "dev-clean/84/1/84-1-0000.flac").rename(tmp_path / "dev-clean/84/1/84-1-0001.flac")
    assert "84-1-0000" in message(tmp_path, "dev-clean", librispeech_table)


def test_holds_speech(tmp_path):
    images = (".png",)
    (tmp_path / "a.txt").write_text("")
    assert not holds_speech(tmp_path, images)
    write(tmp_path, "train/yes/b.WAV")
    assert holds_speech(tmp_path, images)
    (tmp_path / "train/yes/a.png").write_bytes(b"")
    assert not holds_speech(tmp_path, images)
