"""The second recipe: makes the weights and texts of ``assets/tiny`` from nothing (``bash tiny_stack/run.sh``).

It has an environment of its own, the speech environment and the teacher's packages (``requirements-corpus.txt``), and
may import ``tts_grpo.text``, ``tts_grpo.speech`` and ``tts_grpo.reward``; nothing else imports it.
"""
