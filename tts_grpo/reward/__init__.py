"""The reward of a rollout.

- ``scorer``: speech tokens -> waveform -> transcript -> score, in the reward server; ``curves``: error rate -> reward.
- ``protocol``: requests and responses as tensors; ``client``: sends them from veRL's processes.

``scorer``: speech environment only. ``client`` and ``protocol``: both, since they are the two ends of the wire; the
rest of the reward server does not enter the trainer. Imports ``speech`` and ``text``.
"""
