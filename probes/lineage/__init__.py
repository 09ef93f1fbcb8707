"""The lineage that ships: SmolLM2-135M-Instruct and small adapters that align it and let it drift."""
