"""Code that the recipe's programs share, in rooms by concern.

Imports go one way: ``text`` <- ``speech`` <- ``reward`` <- ``training``, and ``evaluation`` imports ``speech`` and
``text``. Two environments use it, which cannot be one: the trainer (veRL, numpy >= 2) and the speech environment
(funasr and PyTriton, numpy < 2). Each room says which of them may import it; tests/test_rooms.py checks both rules.
"""
