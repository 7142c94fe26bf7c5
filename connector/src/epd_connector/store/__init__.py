"""Stores that hold embeddings: one file per backend, all behind :class:`epd_connector.store.base.Store`."""
