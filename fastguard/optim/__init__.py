"""Optimizers whose step takes the guard's decision."""

from .adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
