"""Make the data files of this folder from their sources and print their sha256.

    python -m ulfine_fast.assets.build_assets OUTPUT_FOLDER

`fashion_mnist_subset.npz`: from the full Fashion-MNIST (see `ulfine_fast.datasets`), 400 training and 200
test images of each class, drawn without replacement by numpy's RandomState(0) class by class, training set
first, kept in data-set order. Arrays: {train,test}_images uint8 [N, 28, 28], {train,test}_labels uint8 [N],
and {train,test}_indices uint16 [N], the place of each image in the full set.

`lite_clip_text.npz`: text embeddings by all-MiniLM-L6-v2. Arrays: gloss_embeddings float16 [1000, 384] of
"lemmas: gloss" in ImageNet class order; gloss_names, the first lemma of each; gloss_synsets, their WordNet
3.0 identifiers; fashion_mnist_names [10]; fashion_mnist_prompts [10], "name: gloss"; fashion_mnist_embeddings
float16 [10, 384]. The glosses are read from the package timm, which ships WordNet's text for the ImageNet
synsets.

Needs the extra [offline-text], timm (its data files; it is not imported) and the full Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

import numpy as np

from ulfine_fast.datasets import FASHION_MNIST_CLASSES, load_dataset
from ulfine_fast.encoder import embed_text

SUBSET_SEED = 0
SUBSET_PER_CLASS = {"train": 400, "test": 200}
# chosen by reading the glosses; an ankle boot has no synset of its own
FASHION_MNIST_SYNSETS = {
    "T-shirt/top": "n03595614",
    "Trouser": "n04489008",
    "Pullover": "n04021028",
    "Dress": "n03236735",
    "Coat": "n03057021",
    "Sandal": "n04133789",
    "Shirt": "n04197391",
    "Sneaker": "n03472535",
    "Bag": "n02774152",
    "Ankle boot": "n02872752",
}


def fashion_mnist_subset() -> dict[str, np.ndarray]:
    """The arrays of `fashion_mnist_subset.npz`."""
    random = np.random.RandomState(SUBSET_SEED)
    arrays: dict[str, np.ndarray] = {}
    for part, data in zip(("train", "test"), load_dataset("fashion-mnist"), strict=True):
        chosen = [
            random.choice(np.flatnonzero(data.labels == k), SUBSET_PER_CLASS[part], replace=False)
            for k in range(len(data.class_names))
        ]
        indices = np.sort(np.concatenate(chosen))
        arrays[f"{part}_images"] = data.images[indices]
        arrays[f"{part}_labels"] = data.labels[indices].astype(np.uint8)
        arrays[f"{part}_indices"] = indices.astype(np.uint16)
    return arrays


def lite_clip_text() -> dict[str, np.ndarray]:
    """The arrays of `lite_clip_text.npz`."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise ImportError("timm (its WordNet text files) is missing: pip install --no-deps timm")
    folder = Path(spec.origin).parent / "data" / "_info"
    lemmas = _synset_table(folder / "imagenet_synset_to_lemma.txt")
    glosses = _synset_table(folder / "imagenet_synset_to_definition.txt")
    synsets = (folder / "imagenet_synsets.txt").read_text(encoding="utf-8").split()
    prompts = [f"{name}: {glosses[FASHION_MNIST_SYNSETS[name]]}" for name in FASHION_MNIST_CLASSES]
    return {
        "gloss_embeddings": embed_text([f"{lemmas[s]}: {glosses[s]}" for s in synsets]).half().numpy(),
        "gloss_names": np.array([lemmas[s].split(", ")[0] for s in synsets]),
        "gloss_synsets": np.array(synsets),
        "fashion_mnist_names": np.array(FASHION_MNIST_CLASSES),
        "fashion_mnist_prompts": np.array(prompts),
        "fashion_mnist_embeddings": embed_text(prompts).half().numpy(),
    }


def main() -> None:
    """Write both files into the folder named on the command line."""
    parser = argparse.ArgumentParser(
        description="Make the data files of ulfine_fast.assets from their sources."
    )
    parser.add_argument("output", type=Path, help="folder to write the two .npz files into")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    arrays = {"fashion_mnist_subset.npz": fashion_mnist_subset(), "lite_clip_text.npz": lite_clip_text()}
    for name, content in arrays.items():
        path = output / name
        np.savez_compressed(path, **content)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        sys.stdout.write(f"{name}: {path.stat().st_size} bytes, sha256 {sha256}\n")


def _synset_table(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)


if __name__ == "__main__":
    main()
