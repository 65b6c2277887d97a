"""Accuracy at equal cost: Chase against small from scratch, random channels, and pruning with fine-tuning."""
