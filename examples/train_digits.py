"""Train a ResNet-20 sparsely on scikit-learn's digits, and lose its channels on the way.

Run it with ``python examples/train_digits.py``.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

import chase_fx
from chase_fx.data import load_digits
from chase_fx.models import resnet20


def main(epochs: int = 10, batch: int = 64) -> None:
    """Train, remove half of the channels, and compare masked and slim on the test images."""
    torch.manual_seed(0)
    data = load_digits()
    traced = chase_fx.trace(resnet20(), (data.train.images[:2],))
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    steps_per_epoch = len(data.train) // batch
    trainer = chase_fx.Chase(
        traced, optimizer, total_steps=epochs * steps_per_epoch, sparsity=0.9, channel_sparsity=0.5
    )
    for epoch in range(epochs):
        traced.train()
        order = torch.randperm(len(data.train))
        for rows in order[: steps_per_epoch * batch].split(batch):
            optimizer.zero_grad()
            loss = cross_entropy(traced(data.train.images[rows]), data.train.labels[rows])
            loss.backward()
            optimizer.step()
            trainer.step()
        channels = sum(trainer.channels_left.values())
        print(f"epoch {epoch}: loss {loss.item():.3f}, {trainer.nnz:,} weights in {channels} channels")

    slim = trainer.finalize().eval()
    traced.eval()
    with torch.no_grad():
        masked_logits, slim_logits = traced(data.test.images), slim(data.test.images)
    difference = (masked_logits - slim_logits).abs().max().item()
    accuracy = (slim_logits.argmax(1) == data.test.labels).float().mean().item()
    print(f"slim: test accuracy {accuracy:.1%}, {sum(p.numel() for p in slim.parameters()):,} parameters")
    print(f"largest difference from the masked model: {difference:.1e}")


if __name__ == "__main__":
    main()
