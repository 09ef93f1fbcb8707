"""Change language models: steering vectors, head offsets, exports. Nothing is here yet; the
foundation it stands on is `probes` (edits at every site, on three engines)."""

__all__: list[str] = []
