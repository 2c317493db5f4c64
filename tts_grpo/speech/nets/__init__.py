"""Networks that measure speech quality: one module per metric, ``costly`` runs them all on one recording.

Speech environment only. The figures that they give are declared in ``tts_grpo.speech.quality``.
"""
