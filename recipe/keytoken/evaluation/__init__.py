"""`keytoken evaluate`: a model answers the questions of a benchmark; every answer is kept, then scored."""
