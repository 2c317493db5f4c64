"""The tiny stack's decoder: ``codec`` has its networks, ``token2wav`` decodes with them; ``tiny_stack/`` trains them.

Speech environment only.
"""
