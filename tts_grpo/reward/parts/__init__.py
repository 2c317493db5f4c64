"""The parts of the reward, one file for each; ``interface`` describes what a part is given and what it returns.

Speech environment only. The setting ``rewards`` names the parts of a training, see ``tts_grpo.reward.rewards``. A file
outside the repository works in the same way.
"""
