"""``keytoken submit``: a training job on a Ray cluster, watched from here and started again if it fails.

:mod:`request` says what is submitted, :mod:`client` talks to the cluster's job server, :mod:`restarts`
decides whether a failed job is worth another try.
"""
