"""A separate recipe that trains the models of ``assets/tiny`` from scratch (``bash tiny_stack/run.sh``).

It runs in its own environment: the speech environment plus the teacher's packages (``requirements-corpus.txt``). It may
import ``tts_grpo.text``, ``tts_grpo.speech`` and ``tts_grpo.reward``; nothing else imports it.
"""
