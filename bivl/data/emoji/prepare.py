"""Builds the packaged emoji set as a TFDS ArrayRecord directory, without TensorFlow.

`source` is a folder (a node_modules, say) with the unpacked npm packages named in PACKAGES. Each
record holds `image` (64x64 RGB, lossy WebP), `text` (the name, lower case), `keywords` (comma
separated), `category` and `subcategory` (class labels) and `concept` (what the split goes by).
"""

import contextlib
import hashlib
import io
import json
import pathlib
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from bivl.core.errors import UserError

PACKAGES = {"emoji-datasource-google": "16.0.0", "emojilib": "4.0.3"}
IMAGE_SIZE = 64
TEST_FRACTION = 0.215  # of the hash range: 399 of the 1,906 records

# Two drawings nearer than this (root mean square over 32x32 RGB, of 255) are one concept: the
# flag of France three times, the two mirrored fists, the two speakers. The nearest pair that is
# kept apart lies at 12.2 (two flags that differ by a triangle), the farthest joined one at 11.5.
NEAR_DUPLICATE = 12.0

# Unicode spells a variant as a sequence: these parts carry no concept of their own.
_MODIFIERS = {"fe0f", "200d", "2640", "2642", "27a1"}  # style, joiner, woman, man, facing right
_ADULT, _CHILD, _FAMILY = "1f9d1", "1f9d2", "1f46a"
_PERSON = {"1f468": _ADULT, "1f469": _ADULT, "1f466": _CHILD, "1f467": _CHILD}

# Variants that Unicode gave unrelated code points. The first of each group names the concept.
_VARIANTS = (
    ("1f491", "1f9d1-2764-1f9d1"),  # couple with heart
    ("1f48f", "1f9d1-2764-1f48b-1f9d1"),  # kiss
    ("1f46b", "1f46c", "1f46d", "1f9d1-1f91d-1f9d1"),  # two people holding hands
    ("1f385", "1f936", "1f9d1-1f384"),  # father, mother and mx claus
    ("1fac5", "1f934", "1f478"),  # person with crown, prince, princess
    ("1fac4", "1f930", "1fac3"),  # pregnant person, woman, man
    ("1f9d3", "1f474", "1f475"),  # older adult, man, woman
    ("1f9d1-1f37c", "1f931"),  # feeding a baby
    ("1f483", "1f57a"),  # dancers
    ("1f6b9", "1f6ba"),  # mens and womens symbol
    ("1f446", "1f447", "1f448", "1f449"),  # backhand pointing up, down, left, right
    ("1faf7", "1faf8"),  # hand pushing left, right
)
_CONCEPT_OF = {variant: group[0] for group in _VARIANTS for variant in group}


class Emoji(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes finished records; `records` is what `read_records` returns."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Noto emoji of Unicode 16 with the keywords of emojilib 4.0.3."}

    def __init__(self, records, **kwargs):
        self.records = records
        super().__init__(**kwargs)

    def _info(self):
        def names(key):
            return sorted({record[key] for record in self.records})

        return tfds.core.DatasetInfo(
            builder=self,
            description="Noto emoji with names, keywords and categories; the split is by concept.",
            homepage="https://github.com/iamcal/emoji-data",
            license="Art Apache-2.0 (Google), names and keywords MIT; see NOTICE.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3)),
                    "text": tfds.features.Text(),
                    "keywords": tfds.features.Text(),
                    "category": tfds.features.ClassLabel(names=names("category")),
                    "subcategory": tfds.features.ClassLabel(names=names("subcategory")),
                    "concept": tfds.features.Text(),
                }
            ),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

    def _generate_examples(self, split):
        for record in self.records:
            if split_of(record["concept"]) == split:
                # TFDS orders records by a hash of this key, so the order is fixed yet mixed.
                yield record["codes"], {k: v for k, v in record.items() if k != "codes"}


def prepare(source, out):
    """Builds OUT/emoji/1.0.0 from the npm packages in `source` and returns that directory.

    The same packages and the same Pillow give the same bytes. Nothing is written unless every
    record could be read. Raises UserError when a package, a version or an image is not as
    expected, or when the directory is there already or cannot be made.
    """
    target = pathlib.Path(out) / "emoji" / str(Emoji.VERSION)
    if target.exists():
        raise UserError(f"--out: {target} exists already; remove it or name another directory")
    records = read_records(source)
    tfds.disable_progress_bar()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out: cannot create {target.parent} ({error.strerror}); name another"
        ) from None
    # Built beside the target and renamed when whole: an interrupted run leaves no half set.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
        builder = Emoji(records, data_dir=scratch, file_format="array_record")
        config = tfds.download.DownloadConfig(num_shards=1, try_download_gcs=False)
        with contextlib.redirect_stdout(None):  # it would name the scratch folder
            builder.download_and_prepare(download_config=config)
        built = pathlib.Path(builder.data_path)
        for shard in built.glob("*.array_record*"):
            _rewrite_in_fixed_order(shard)
        built.rename(target)
    return target


def _rewrite_in_fixed_order(shard):
    """Writes a shard again: TFDS leaves the order of fields within a record to chance."""
    with contextlib.closing(ArrayRecordReader(str(shard))) as reader:
        examples = [tf_example_pb2.Example.FromString(record) for record in reader.read_all()]
    shard.unlink()
    with contextlib.closing(ArrayRecordWriter(str(shard), "group_size:1")) as writer:
        for example in examples:
            writer.write(example.SerializeToString(deterministic=True))


def read_records(source):
    """Reads and checks the npm packages; returns the records, ordered by code points.

    A record is a dict of the features plus `codes`, the code points as in "1f468-200d-1f680".
    """
    source = pathlib.Path(source)
    for package, version in PACKAGES.items():
        found = _read_json(source / package / "package.json").get("version")
        if found != version:
            raise UserError(f"{source / package} has version {found}, not {version}; {_cure()}")
    art = source / "emoji-datasource-google"
    keywords = _read_json(source / "emojilib" / "dist" / "emoji-en-US.json")
    keywords = {_bare(emoji): words for emoji, words in keywords.items()}
    entries = [e for e in _read_json(art / "emoji.json") if e["category"] != "Component"]
    entries.sort(key=lambda e: e["unified"])
    if not entries:
        raise UserError(f"{art / 'emoji.json'} lists no emoji; {_cure()}")
    pixels, records = [], []
    for entry in entries:
        image = _read_image(art / "img" / "google" / str(IMAGE_SIZE) / entry["image"])
        pixels.append(np.asarray(image))
        emoji = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
        records.append(
            {
                "codes": entry["unified"].lower(),
                "image": _encode(image),
                "text": entry["name"].lower(),
                "keywords": _join(keywords.get(_bare(emoji), ())),
                "category": entry["category"],
                "subcategory": entry["subcategory"],
            }
        )
    concepts = merge_near_duplicates([concept_of(r["codes"]) for r in records], np.stack(pixels))
    return [{**r, "concept": concept} for r, concept in zip(records, concepts, strict=True)]


def concept_of(codes: str) -> str:
    """The code points without gender, direction and style, so that all variants give one key."""
    parts = [_PERSON.get(code, code) for code in codes.lower().split("-")]
    parts = parts[:1] + [code for code in parts[1:] if code not in _MODIFIERS]
    if len(parts) > 1 and set(parts) <= {_ADULT, _CHILD}:
        return _FAMILY
    concept = "-".join(parts)
    return _CONCEPT_OF.get(concept, concept)


def merge_near_duplicates(concepts, pixels):
    """Joins concepts with (nearly) the same drawing, mirrored or not.

    pixels: uint8 [N, 64, 64, 3]. Returns N concepts, each the smallest of those joined.
    """
    n, side = len(pixels), IMAGE_SIZE // 2
    small = pixels.reshape(n, side, 2, side, 2, 3).mean((2, 4), dtype=np.float32)
    plain, mirrored = small.reshape(n, -1), small[:, :, ::-1].reshape(n, -1)
    norms = (plain * plain).sum(1)
    near = np.zeros((n, n), bool)
    for other in (plain, mirrored):
        square = norms[:, None] + norms[None] - 2 * plain @ other.T
        near |= square < NEAR_DUPLICATE**2 * plain.shape[1]
    merged = dict(zip(concepts, concepts, strict=True))
    for i, j in np.argwhere(np.triu(near, 1)):
        low, high = sorted((merged[concepts[i]], merged[concepts[j]]))
        merged = {concept: low if to == high else to for concept, to in merged.items()}
    return [merged[concept] for concept in concepts]


def split_of(concept):
    """Returns "train" or "test" by SHA-256: fixed on every machine, and when the set grows."""
    digest = hashlib.sha256(concept.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_FRACTION * 2**64 else "train"


def _cure():
    wanted = " ".join(f"{name}@{version}" for name, version in PACKAGES.items())
    return f"run `npm install {wanted}` and pass its node_modules folder as --source"


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--source: cannot read {path} ({type(error).__name__}); {_cure()}"
        ) from None


def _read_image(path):
    """The drawing on white, since the features ask for RGB and white is what text prints on."""
    try:
        with Image.open(path) as image:
            drawing = image.convert("RGBA")
    except OSError as error:
        raise UserError(
            f"--source: cannot read {path} ({type(error).__name__}); {_cure()}"
        ) from None
    if drawing.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(f"--source: {path} is {drawing.size}, not 64x64 pixels; {_cure()}")
    flat = Image.new("RGBA", drawing.size, "white")
    flat.alpha_composite(drawing)
    return flat.convert("RGB")


def _encode(image):
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=6)
    return buffer.getvalue()


def _bare(emoji):
    return emoji.replace("\ufe0f", "")  # the packages disagree on where the style selector goes


def _join(words):
    """Keywords as one string: no commas inside a keyword, none twice, the order kept."""
    clean = (" ".join(word.replace("_", " ").replace(",", " ").split()) for word in words)
    return ", ".join(dict.fromkeys(word for word in clean if word))
