"""A small, real Janus model of a procedural shapes world: data, training and export.

Submodules are imported on demand: ``world`` (scenes, prompts, pictures), ``tokens`` (code book), ``text``
(tokenizer), ``janus`` (the model's configuration), ``data`` (batches), ``train`` (the language model), ``vq`` (the
VQ model) and ``export`` (the complete folder, kept in ``model/``).
"""
