"""Token attribution, pure torch: views of a prompt -> scores of tokens -> selection -> token weights.

Read in this order: ``types``, ``views``, ``scores``, ``selection``, ``weights``, ``methods``.
"""
