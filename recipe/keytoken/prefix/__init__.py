"""One prompt for a whole group: exact passes that compute the prompt once for all answers to it.

- :mod:`keytoken.prefix.layout`: where a stem and its branches lie in a sequence, and what that costs
- :mod:`keytoken.prefix.packs`: from answers to packs, and from what a pack gave back to the answers
- :mod:`keytoken.prefix.attention`: attention that follows a layout, registered with transformers
"""
