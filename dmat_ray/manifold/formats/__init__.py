"""Generators that come from elsewhere: checkpoints of other projects, and decoders exported as programs."""
