"""Fine-tuning with rejected rows left out against a plain loop over the joint batch: python benchmarks/finetune_step.py

Both train the same AdaptFormer in the same randomly initialised ViT (a Transformer of open_clip, 12 blocks) on the same
views, with the same head in the plain loop written in PyTorch and in ours by the library. The share of kept rows is
fixed by the threshold: all pseudo-labels of a random model are alike, so it is set between two confidences of a step.
Prints a Markdown table: row passes counted at the tower, images per second, and the ratio of both within one round.
"""

from __future__ import annotations
