"""DeepSeek's own Janus (deepseek-ai/Janus), which is no class of transformers: its checkpoints and its living models.

`checkpoint` reads its folders with `weights`, which knows names, and `processor`, which knows prompts; `live` puts
the engine around a model that is in memory, `loops` compressed caches into the loops over it.
"""

from __future__ import annotations

from .checkpoint import MODEL_TYPE, download, is_official_config, load
from .live import as_transformers, is_official
from .loops import rollout
from .processor import chat_template, load_processor

__all__ = ["MODEL_TYPE", "as_transformers", "chat_template", "download", "is_official", "is_official_config", "load",
           "load_processor", "rollout"]
