"""CLIP's byte-level BPE: its files, checked, and the library's tokenizer that splits as it does.

Text is lower-cased, words are split from spaces, and the last piece of a word ends in `</w>`
(openai/CLIP `clip/simple_tokenizer.py`; here as transformers' CLIPTokenizer, which neither repairs
text nor unescapes HTML). Whoever wrote the files is not trusted: every fault is a ValueError.
"""

import functools
import gzip
import io
import json
import zlib
from typing import Any

from bivl.data.vocabulary import layouts

START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
OPENAI = "bpe_simple_vocab_16e6.txt"
LAYOUTS = (("vocab.json", "merges.txt"), ("tokenizer.json",), (f"{OPENAI}.gz",), (OPENAI,))
MERGES = 49_152 - 256 - 2  # as many of OpenAI's file are in use
MAX_BYTES = 2**26
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPLITS = (rf"<\|startoftext\|>|<\|endoftext\|>|{_WORDS}", _WORDS)  # of newer and older files
_UNSET = ("dropout", "continuing_subword_prefix", "byte_fallback", "ignore_merges")


@functools.lru_cache(4)
def make(names: tuple[str, ...], contents: tuple[bytes, ...]) -> tuple:
    """The contents of the files of one layout -> (the library's tokenizer as JSON, size, and the
    ids of bos, pad, eos, unk and mask, all but the first END's)."""
    vocabulary, merges = parse(names, contents)
    data, end = build(vocabulary, merges).to_str().encode(), vocabulary[END]
    return data, len(vocabulary), vocabulary[START], end, end, end, end


def parse(names: tuple[str, ...], contents: tuple[bytes, ...]) -> tuple[dict, layouts.Merges]:
    """The contents of the files of one layout -> (piece -> id, merges)."""
    if names[0] == "vocab.json":
        vocabulary = json.loads(contents[0].decode("utf-8-sig"))
        merges = layouts.parse_merges(contents[1].decode("utf-8-sig"))
    elif names[0] == "tokenizer.json":
        vocabulary, merges = _parse_tokenizer_json(json.loads(contents[0].decode("utf-8-sig")))
    else:
        vocabulary, merges = _parse_openai(contents[0])
    layouts.check_vocabulary(vocabulary)
    for name in (START, END):
        if name not in vocabulary:
            raise ValueError(f"the vocabulary has no {name}")
    for left, right in merges:
        if not (left and right and {left, right, left + right} <= vocabulary.keys()):
            raise ValueError(f"the merge {left!r} {right!r} is not in the vocabulary")
        if left + right in (START, END):
            raise ValueError(f"a merge makes the special token {left + right}")
    return vocabulary, merges


def _parse_openai(content: bytes) -> tuple[dict[str, int], layouts.Merges]:
    """Merges alone: bytes, bytes that end a word, the merges and the two special ones are the
    vocabulary, in this order."""
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"it is damaged: {error}") from error
        if len(content) > MAX_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_BYTES} bytes")
    lines = content.decode("utf-8-sig").split("\n")
    lines = lines[1:] if "#version" in lines[0] else lines
    merges = [layouts.pair(line.split()) for line in lines[:MERGES] if line.strip()]
    letters = _letters()
    pieces = [*letters, *(letter + SUFFIX for letter in letters)]
    pieces += [*(left + right for left, right in merges), START, END]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        raise ValueError("a merge stands twice")
    return vocabulary, merges


def _letters() -> list[str]:
    """The 256 letters that stand for bytes in GPT-2's vocabulary, the printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _parse_tokenizer_json(tree: Any) -> tuple[dict[str, int], layouts.Merges]:
    """(vocabulary, merges). Rules other than CLIP's are refused."""
    model = layouts.mapping(tree, "model")
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != SUFFIX:
        raise ValueError(f"it is no BPE whose words end in {SUFFIX}")
    for rule in _UNSET:
        if model.get(rule):
            raise ValueError(f"its model.{rule} is set, which CLIP's is not")
    if _steps(tree, "normalizer", "normalizers") != NORMALIZER:
        raise ValueError("it changes text otherwise than CLIP's")
    if _steps(tree, "pre_tokenizer", "pretokenizers") not in SPLITTERS:
        raise ValueError("it splits text otherwise than CLIP's")
    return layouts.pieces_of(tree, model)


NORMALIZER = [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"},
]
SPLITTERS = [
    [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False},
    ]
    for split in SPLITS
]


def _steps(tree: dict, key: str, members: str) -> list | None:
    """The steps of a sequence, without what makes no difference here."""
    found = layouts.mapping(tree, key).get(members)
    if not isinstance(found, list) or not all(isinstance(step, dict) for step in found):
        return None
    idle = ("trim_offsets", "use_regex")
    return [{k: v for k, v in step.items() if k not in idle} for step in found]


def build(vocabulary: dict[str, int], merges: layouts.Merges) -> Any:
    """The library's tokenizer; what has no piece becomes END."""
    import tokenizers
    from tokenizers import Regex, normalizers, pre_tokenizers

    options = {"unk_token": END, "continuing_subword_prefix": "", "end_of_word_suffix": SUFFIX}
    codec = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, **options))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    codec.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(SPLITS[0]), behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    return codec


def opened(data: bytes):
    """What `build` gave, as JSON -> functions (texts -> rows of ids) and (ids -> text)."""
    import tokenizers

    codec, space = tokenizers.Tokenizer.from_str(data.decode()), "Ġ"
    decoder = tokenizers.decoders.ByteLevel()

    def decode(ids: list[int]) -> str:
        pieces = (codec.id_to_token(i) or "" for i in ids)
        spaced = (piece.removesuffix(SUFFIX) + space * piece.endswith(SUFFIX) for piece in pieces)
        return decoder.decode(["".join(spaced)]).strip()

    return lambda texts: [row.ids for row in codec.encode_batch_fast(texts)], decode
