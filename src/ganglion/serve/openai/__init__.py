"""OpenAI's HTTP interface over the LanguageService seam. Mounted by `serve.app`; knows no model, no torch, no engine."""
