"""The tiny stack's decoder: ``codec`` defines its networks, ``token2wav`` runs them; ``tiny_stack/`` trains them.

Speech environment only.
"""
