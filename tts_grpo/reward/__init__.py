"""The reward of a rollout: scorer, reward curves, and the protocol between reward server and trainer.

- ``scorer`` runs in the reward server: speech tokens -> waveform -> transcript -> score. ``curves`` maps an error rate
  to a reward. ``ports`` checks that a TCP port is free.
- ``protocol`` defines requests and responses as tensors. ``client`` sends requests from veRL's processes.

``scorer`` is imported in the speech environment only. ``client`` and ``protocol`` are imported in both environments,
because server and trainer communicate through them. This package imports ``speech`` and ``text``.
"""
