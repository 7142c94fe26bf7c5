"""Encoder-cache connector for vLLM: embeddings travel from encode to prefill/decode through a shared store.

vLLM finds it with ``"ec_connector": "ECMooncakeStoreConnector"`` and
``"ec_connector_module_path": "epd_connector.connector"``. Importing this package imports neither
vLLM nor a store, so that tools can use :mod:`epd_connector.keys` and :mod:`epd_connector.header` alone.
"""

__version__ = "0.1.0"
