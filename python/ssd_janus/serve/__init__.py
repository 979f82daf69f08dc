"""Pictures over HTTP, as OpenAI's clients ask for them (docs/serving.md). Needs the extra ``serve``."""
